"""Habits of users' files: read right or rejected by name, so that no text is lost in silence."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rekatrain.data.errors import InputError
from rekatrain.data.sources import load_rows
from tests.conftest import write_jsonl

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
NODE = {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Q"}


def load(folder: Path, text: str | bytes, suffix: str = ".jsonl", **section: Any) -> list[Any]:
    path = folder / f"rows{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_rows(str(path), **section).rows


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        '{"messages": [], "messages": [{"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "b"}], "extra": {"x": {"y": 1, "y": 1}}}',
    ],
)
def test_json_object_with_a_key_twice_is_rejected(line: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:1: an object has the key '\w+' twice"):
        load(tmp_path, line)
    with pytest.raises(InputError, match="twice"):
        load(tmp_path, f"[{line}]", ".json")


@pytest.mark.parametrize(
    ("record", "section", "message"),
    [
        (
            {"messages": [{**HI, "content": [{"type": "text", "text": "a", "value": "b"}]}, HELLO]},
            {},
            "has two of text",
        ),
        ({"instruction": "a", "context": "b", "output": "c"}, {"format": "alpaca"}, "'context'.*out of the prompt"),
        ({"prompt": "a", "input": "b", "answer": "c"}, {"format": "prompt_answer"}, "'input'.*out of the prompt"),
        ({"prompt": "a", "context": "b", "completion": "c"}, {"format": "prompt_completion"}, "'context'"),
        ({"prompt": "a", "answer": float("nan")}, {"format": "prompt_answer"}, "the answer is nan"),
        ({"prompt": "a", "answer": [1, float("inf")]}, {"format": "prompt_answer"}, "the answer is inf"),
        ({"messages": [HI, HELLO], "weights": [0, 1]}, {}, "'weights'.*shapes the prompt or the loss"),
        ({"messages": None}, {}, "messages is null: it must be a list"),
        ({"prompt": "a", "chosen": "b", "rejected": " b\n"}, {"format": "preference"}, "are the same"),
    ],
)
def test_text_that_would_be_lost_is_rejected(
    record: Any, section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"rows.jsonl:1: .*{message}"):
        load(tmp_path, json.dumps(record), **section)


def test_rejected_prompt_parts_are_columns_by_another_name(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a", "input": "b", "answer": "c"})
    (row,) = load(tmp_path, line, format="prompt_answer", columns={"other_input": "input"})
    assert row.columns == {"other_input": "b", "answer": "c"}
    dolly = json.dumps({"instruction": "a", "context": "b", "response": "c"})
    (row,) = load(tmp_path, dolly, format="alpaca", columns={"input": "context", "output": "response"})
    assert [turn["content"] for turn in row.messages] == ["a\n\nb", "c"]


@pytest.mark.parametrize(
    ("nodes", "number", "message"),
    [
        ([NODE, {**NODE, "message_id": "2", "parent_id": "9"}], 2, "the file has no message '9'"),
        ([NODE, {**NODE, "text": "Other"}], 2, r"message_id '1' is also that of .*rows.jsonl:1"),
        ([NODE, {**NODE, "message_id": "2", "parent_id": "2"}], 2, "replies to itself"),
        ([{**NODE, "parent_id": "2"}, {**NODE, "message_id": "2", "parent_id": "1"}], 1, "replies to itself"),
        (
            [{**NODE, "parent_id": "2"}, {**NODE, "message_id": "2", "parent_id": "3"}]
            + [{**NODE, "message_id": "3", "parent_id": "2"}],
            1,
            "replies to itself",
        ),
    ],
)
def test_oasst_message_outside_every_tree_is_rejected(
    nodes: list[dict[str, Any]], number: int, message: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", *nodes)
    with pytest.raises(InputError, match=f"rows.jsonl:{number}: .*{message}"):
        load_rows(str(tmp_path / "rows.jsonl"), format="oasst")
    answered = {**NODE, "message_id": "a", "parent_id": "root", "role": "assistant", "text": "A"}
    write_jsonl(tmp_path / "rows.jsonl", *nodes, {**NODE, "message_id": "root"}, answered)
    rows = load_rows(str(tmp_path / "rows.jsonl"), format="oasst", bad_rows="skip").rows
    assert [turn["content"] for turn in rows[-1].messages] == ["Q", "A"]


def test_cells_of_tables_are_json_values(tmp_path: Path) -> None:
    cells = {
        "prompt": [b"a?"],
        "answer": [Decimal("1.50")],
        "when": [datetime.datetime(2020, 1, 2, 3)],
        "day": [datetime.date(2020, 1, 2)],
        "took": [datetime.timedelta(seconds=90)],
        "nested": [{"days": [datetime.date(2020, 1, 2)]}],
    }
    parquet.write_table(pa.table(cells), tmp_path / "rows.parquet")
    (row,) = load_rows(str(tmp_path / "rows.parquet"), format="prompt_answer").rows
    assert [turn["content"] for turn in row.messages] == ["a?", "1.50"]
    assert row.columns == {
        "answer": "1.50",
        "when": "2020-01-02T03:00:00",
        "day": "2020-01-02",
        "took": 90.0,
        "nested": {"days": ["2020-01-02"]},
    }
    parquet.write_table(pa.table({"prompt": ["a?"], "raw": [b"\xff"]}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="raw holds bytes that are not UTF-8"):
        load_rows(str(tmp_path / "rows.parquet"), format="prompt_answer")


def test_suffixes_in_capitals_and_spaced_headers_are_read(tmp_path: Path) -> None:
    (tmp_path / "ROWS.CSV").write_text("prompt , answer\na?,1\n")
    for path in (tmp_path / "ROWS.CSV", tmp_path):
        (row,) = load_rows(str(path), format="prompt_answer").rows
        assert row.columns == {"answer": "1"}


def test_line_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\r\nf"
    line = json.dumps({"messages": [{"role": "user", "content": text}, HELLO]}, ensure_ascii=False)
    for mark in (b"", b"\xef\xbb\xbf"):
        rows = load(tmp_path, mark + line.encode() + b"\r\n" + mark + line.encode())
        assert [row.messages[0]["content"] for row in rows] == [text, text]


def test_file_or_folder_is_never_read_in_part(tmp_path: Path) -> None:
    rows = [{"messages": [HI, HELLO]}]
    with pytest.raises(InputError, match="lists of rows under data and validation"):
        load(tmp_path, json.dumps({"data": rows, "validation": rows}), ".json")
    assert len(load(tmp_path, json.dumps({"data": rows, "version": 1, "tags": ["a"]}), ".json")) == 1
    (tmp_path / "more.jsonl.bz2").write_bytes(b"")
    with pytest.raises(InputError, match=r"files that cannot be read, such as .*more.jsonl.bz2"):
        load_rows(str(tmp_path))


def test_imports_of_sanitized_mbpp_reach_the_tests(tmp_path: Path) -> None:
    line = json.dumps(
        {"prompt": "Pi.", "code": "p = 3", "test_imports": ["import math"], "test_list": ["assert math.pi"]}
    )
    (row,) = load(tmp_path, line, format="mbpp", columns={"text": "prompt"})
    assert row.columns == {"tests": {"asserts": ["assert math.pi"], "setup": "import math"}}


@pytest.mark.parametrize("arguments", ["arguments", "parameters", "input"])
@pytest.mark.parametrize("is_text", [True, False])
def test_tool_call_keeps_its_arguments_under_any_name(arguments: str, is_text: bool, tmp_path: Path) -> None:
    calls = [{"id": "1", "type": "function", "index": 0, "function": {"name": "f", arguments: {"a": 1}}}]
    turn = {"role": "assistant", "content": None, "tool_calls": json.dumps(calls) if is_text else calls}
    turns = [HI, turn, {"role": "tool", "content": "2"}, HELLO]
    (row,) = load(tmp_path, json.dumps({"messages": turns}), tool_turns="literal")
    assert row.messages[1]["content"] == '{"name": "f", "arguments": {"a": 1}}'
    for wrong in ({"name": "f", "arguments": {}, "input": {}}, {"name": "f", "kwargs": {"a": 1}}):
        turn["tool_calls"] = [{"function": wrong}]
        with pytest.raises(InputError, match="tool call with (both 'arguments'|the unknown key 'kwargs')"):
            load(tmp_path, json.dumps({"messages": turns}), tool_turns="literal")
