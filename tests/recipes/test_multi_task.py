"""The rows of the multi-task recipes: solutions pass their tests, and held-out prompts are trained on nowhere."""

import json
import os
import sys
from pathlib import Path

from tests.helpers import forks

RECIPES = Path(__file__).parents[2] / "recipes" / "smollm2"


def test_multi_task_rows_are_right_and_held_out(tmp_path: Path) -> None:
    for name, numbers in (("train", range(80)), ("held_out", range(80, 100))):
        rows = [
            {"instruction": f"Say {n}.", "input": "", "chosen": f"{n}, dear.", "rejected": f"{n}!"} for n in numbers
        ]
        rows.append({**rows[0], "instruction": "Long. " * 20})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = [sys.executable, str(RECIPES / "make_multi_task_rows.py"), str(tmp_path), str(tmp_path / "out")]
    finished = forks.run(script, env=os.environ)
    assert finished.returncode == 0, finished.stderr

    read = {file.stem: [json.loads(line) for line in file.open()] for file in (tmp_path / "out").iterdir()}
    assert {name: len(rows) for name, rows in read.items()} == {
        "code": 294,
        "code-held-out": 98,
        "chats": 80,
        "chats-held-out": 20,
        "sft": 3 * 48,
    }
    for row in read["code"] + read["code-held-out"]:
        names: dict[str, object] = {}
        for source in (row["answer"], *row["tests"]):
            exec(source, names)
    prompts = {name: {row["prompt"] for row in rows} for name, rows in read.items() if name != "sft"}
    trained = prompts["code"] | prompts["chats"] | {row["messages"][0]["content"] for row in read["sft"]}
    assert not trained & (prompts["code-held-out"] | prompts["chats-held-out"])
    assert all(row["messages"][1]["reasoning_content"] for row in read["sft"])
