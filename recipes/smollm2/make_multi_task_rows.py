"""Write the rows of the multi-task recipes: small functions, short chats, and SFT rows of these and of sums, as JSONL.

    python recipes/smollm2/make_preferences.py runs/politeness
    python recipes/smollm2/make_multi_task_rows.py runs/politeness runs/multi-task

code.jsonl and chats.jsonl are prompts for RLOO, and code-held-out.jsonl and chats-held-out.jsonl those of the
evaluation. sft.jsonl has 48 worked examples of each task. Half of its chats have the impolite answer, so that RLOO has
something to improve.
"""

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from ruamel.yaml import YAML

from rekatrain.data.sources import load_rows

RLOO_RECIPE = Path(__file__).parent / "multi-task-rloo.yaml"
NUM_SFT_ROWS = 48  # of each task
FRACTION_HELD_OUT = 0.25
MAX_CHARACTERS = 60  # of a question and of an answer: a short completion is sampled fast
OPERATORS = {"add": "+", "subtract": "-", "multiply_by": "*", "modulo": "%"}


def main() -> None:
    """Write the five files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preferences", type=Path, help="folder that make_preferences.py has written")
    parser.add_argument("folder", type=Path, help="folder to write")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    code = [make_function(name, sign, number) for name, sign in OPERATORS.items() for number in range(2, 100)]
    random.Random(0).shuffle(code)
    num_held_out = round(len(code) * FRACTION_HELD_OUT)
    chats = {name: read_chats(options.preferences / f"{name}.jsonl") for name in ("train", "held_out")}
    sft = [
        *(
            worked(row["prompt"], row["answer"], row["answer"].partition("return ")[2])
            for row in code[num_held_out:][:NUM_SFT_ROWS]
        ),
        *make_sums(NUM_SFT_ROWS),
        *(
            worked(row["prompt"], row["rejected" if number % 2 else "chosen"], "A short answer.")
            for number, row in enumerate(chats["train"][:NUM_SFT_ROWS])
        ),
    ]
    random.Random(0).shuffle(sft)
    write(options.folder / "code-held-out.jsonl", code[:num_held_out])
    write(options.folder / "code.jsonl", code[num_held_out:])
    write(options.folder / "chats-held-out.jsonl", chats["held_out"])
    write(options.folder / "chats.jsonl", chats["train"])
    write(options.folder / "sft.jsonl", sft)


def make_function(name: str, sign: str, number: int) -> dict[str, object]:
    """Return the task of a function of one number, with its tests.

    >>> make_function("add", "+", 7)["answer"]
    'def add_7(x): return x + 7'
    """
    code = f"def {name}_{number}(x): return x {sign} {number}"
    function = eval(f"lambda x: x {sign} {number}")  # noqa: S307  # from the table above
    return {
        "prompt": f"Write the Python function {name}_{number}(x).",
        "answer": code,
        "tests": [f"assert {name}_{number}({x}) == {function(x)}" for x in (0, 1, 5, 100, 1234)],
    }


def read_chats(file: Path) -> list[dict[str, str]]:
    """Return the preferences whose question and answers are short."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    chats = [
        {
            "prompt": f"{row['instruction']}\n\n{row['input']}".strip(),
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in rows
    ]
    return [chat for chat in chats if all(len(text) <= MAX_CHARACTERS for text in chat.values())]


def make_sums(number: int) -> list[dict[str, object]]:
    """Return worked sums of the recipe's task that are not in its held-out rows."""
    recipe = YAML(typ="safe", pure=True).load(RLOO_RECIPE)
    held_out = {row.messages[0]["content"] for row in load_rows(**recipe["eval_dataset"][0]).rows}
    rows = [row.messages for row in load_rows(**recipe["dataset"][0]).rows]
    texts = [(user["content"], assistant["content"]) for user, assistant in rows if user["content"] not in held_out]
    return [
        worked(question, answer, f"{question.removeprefix('Calculate ').removesuffix('.')} = {answer}")
        for question, answer in texts[:number]
    ]


def worked(question: str, answer: object, thought: str) -> dict[str, object]:
    """Return a row of layout messages."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "reasoning_content": thought},
        ]
    }


def write(file: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as JSONL, and print their number."""
    lines = [json.dumps(row) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines)} rows")


if __name__ == "__main__":
    main()
