"""`rekatrain filter`: prompts by their pass rate, as rows that every stage reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rekatrain import load_recipe
from rekatrain.data.mixture import load_mixture
from rekatrain.trainer import api
from tests.conftest import write_jsonl
from tests.helpers.json_servers import JsonServer

# The digit that a prompt asks for, and how many of four completions are right.
NUM_RIGHT = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}


@pytest.fixture
def recipe(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., JsonServer]
) -> str:
    monkeypatch.chdir(tmp_path)
    asked: dict[int, int] = {}

    def answer(path: str, body: dict) -> tuple[int, dict]:
        digit = int(body["messages"][-1]["content"].split()[-1])
        asked[digit] = asked.get(digit, 0) + 1
        content = str(digit) if asked[digit] <= NUM_RIGHT[digit] else "wrong"
        return 200, {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}

    server = serve(answer)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "train": False}]
    rows = [
        {"messages": [*turns, {"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}]}
        | {"answer": str(n), "topic": "digits"}
        for n in NUM_RIGHT
    ]
    write_jsonl(Path("rows.jsonl"), *rows, rows[0])
    content = {
        "stage": "rloo",
        "output_dir": "run",
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": {"path": "rows.jsonl"},
        "rewards": {"exact_match": None},
        "rloo": {"max_steps": 1},
        "filter": {"out": "kept", "server": {"base_url": f"{server.url}/v1", "model": "m", "concurrency": 1}},
    }
    Path("recipe.yaml").write_text(json.dumps(content))
    return "recipe.yaml"


def test_filter_writes_prompts_with_their_pass_rate(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = api.filter_prompts(recipe, "filter.pass_rate={min: 0.25, max: 0.75}")
    shown = capsys.readouterr().out
    assert "3 of 5 prompts have a pass rate from 0.25 to 0.75 (4 completions each)" in shown
    assert "1 none right, 3 some right, 1 all right, 0 not judged" in shown
    assert "1 rows repeat the prompt of an earlier row" in shown
    mixture = load_mixture({"path": str(path), "order": {"by": "pass_rate"}, "only": {"pass_rate": {"max": 0.5}}})
    assert [(row.columns["pass_rate"], row.columns["answer"]) for row in mixture.rows] == [(0.25, "1"), (0.5, "2")]
    before = load_mixture(load_recipe(recipe).dataset).rows[1]
    assert mixture.rows[0].messages == before.messages and mixture.rows[0].trains == before.trains
    # another range asks nothing: the server would answer wrong from now on
    api.filter_prompts(recipe, "filter.pass_rate={min: 1}")
    assert "1 of 5 prompts" in capsys.readouterr().out
    # the rows can be filtered again
    api.filter_prompts(recipe, "filter.pass_rate={}")
    shutil.copy("kept/rows.jsonl", "earlier.jsonl")
    again = api.filter_prompts(recipe, "filter.pass_rate={}", "dataset.path=earlier.jsonl")
    assert again.read_text() == Path("earlier.jsonl").read_text()
