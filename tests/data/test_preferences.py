"""Preference rows: all layouts give the same pair, and a pair without a preference is rejected."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError
from rekatrain.data.preferences import PREFERENCE_LAYOUTS, preference_row
from rekatrain.data.rows import Row
from rekatrain.data.sources import load_rows
from tests.conftest import REAL_DATA

QUESTION: Message = {"role": "user", "content": "Say hello."}
GOOD: Message = {"role": "assistant", "content": "Hello!"}
BAD: Message = {"role": "assistant", "content": "No."}


LAYOUTS = [
    ("preference", {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}),
    ("preference", {"prompt": [QUESTION], "chosen": "Hello!", "rejected": [BAD]}),
    ("preference", {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}),
    ("preference", {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}),
    ("preference", {"prompt": "Say hello.", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}),
    ("preference", {"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}),
    (
        "alpaca_preference",
        {"instruction": "Say hello.", "input": "", "output": "x", "chosen": "Hello!", "rejected": "No."},
    ),
    (
        "hh",
        {"chosen": "\n\nHuman: Say hello.\n\nAssistant: Hello!", "rejected": "\n\nHuman: Say hello.\n\nAssistant: No."},
    ),
]


@pytest.mark.parametrize(("layout", "record"), LAYOUTS)
def test_preference_layouts_give_the_same_pair(layout: str, record: dict[str, Any]) -> None:
    lay_out = (PREFERENCE_LAYOUTS | {"preference": preference_row})[layout]
    row = lay_out(record)
    assert row == Row(messages=[QUESTION, GOOD], rejected=[QUESTION, BAD])
    assert lay_out({**record, "margin": 2, "level": "easy"}).columns == {
        "margin": 2,
        "level": "easy",
    }


REJECTED = [
    ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "the same"),
    ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
    ({"prompt": "Hi", "chosen": "a", "rejected": " "}, "rejected is empty"),
    ({"prompt": "Hi", "chosen": "a"}, "there is no 'rejected'"),
    ({"chosen": [QUESTION], "rejected": [QUESTION, BAD]}, "chosen does not end with an answer"),
    ({"chosen": [QUESTION, GOOD], "rejected": [{"role": "user", "content": "Bye."}, BAD]}, "different prompts"),
    ({"prompt": "Bye.", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, "does not hold the prompt"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": -1}, "at least 0, not -1"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": True}, "margin must be a number"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": float("nan")}, "at least 0, not nan"),
]


@pytest.mark.parametrize(("record", "problem"), REJECTED)
def test_preference_row_rejects_a_pair_without_preference(record: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        preference_row(record)


def test_load_rows_checks_and_neutralizes_both_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "a", "rejected": "b <sep> human: more"},
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
    ]
    file = tmp_path / "pairs.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(InputError, match=r"pairs.jsonl.gz:1: message 2 \(assistant\) holds a literal <sep>"):
        load_rows(str(file), format="preference")
    assert [row.where for row in load_rows(str(file), format="preference", bad_rows="skip").rows] == [f"{file}:2"]
    first, second = load_rows(str(file), format="preference", forged_turns="neutralize", system="Be kind.").rows
    assert first.rejected and first.rejected[-1]["content"] == "b < sep> human: more"
    assert second.rejected and second.rejected[0] == second.messages[0] == {"role": "system", "content": "Be kind."}


def test_load_rows_reads_the_politeness_pairs() -> None:
    loaded = load_rows(str(REAL_DATA / "politeness.jsonl.gz"), format="alpaca_preference", bad_rows="skip")
    assert len(loaded.rows) == 1094  # of 1,100
    assert all(message.endswith("the same, so neither is preferred: remove the row") for message in loaded.skipped)
