"""Turns as people write them: each is read right, or rejected by the name of its key, role or part."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rekatrain.data.chat import Message, encode_row
from rekatrain.data.errors import InputError
from rekatrain.data.sources import load_rows
from tests.conftest import write_jsonl

QUESTION: Message = {"role": "user", "content": "2+2?"}
ANSWER: Message = {"role": "assistant", "content": "4"}
BRIEF: Message = {"role": "system", "content": "Be brief."}
REASONED: Message = {**ANSWER, "reasoning_content": "Two and two."}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALL_TEXT = '{"name": "add", "arguments": {"a": 2}}'


def load(tmp_path: Path, record: dict[str, Any], **options: Any) -> Any:
    return load_rows(write_jsonl(tmp_path / "rows.jsonl", record), **options).rows[0]


def turns(*pairs: tuple[str, Any], role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    return [{role: name, content: text} for name, text in pairs]


PLAIN = [QUESTION, ANSWER]
READ_RIGHT: dict[str, tuple[dict[str, Any], dict[str, Any], list[Message]]] = {
    "capitals": ({"messages": turns(("User", "2+2?"), ("Assistant", "4"))}, {}, PLAIN),
    "model": ({"messages": turns(("user", "2+2?"), ("model", "4"))}, {}, PLAIN),
    "developer": ({"messages": turns(("developer", "Be brief."), ("user", "2+2?"))}, {}, [BRIEF, QUESTION]),
    "from and value": ({"messages": turns(("human", "2+2?"), ("gpt", "4"), role="from", content="value")}, {}, PLAIN),
    "roles": (
        {"messages": turns(("Dan", "2+2?"), ("bing", "4"))},
        {"roles": {"Dan": "user", "bing": "assistant"}},
        PLAIN,
    ),
    "roles go first": ({"messages": turns(("model", "2+2?"), ("bot", "4"))}, {"roles": {"model": "user"}}, PLAIN),
    "turn_keys": (
        {"messages": [{"speaker": "Dan", "said": "2+2?", "time": 1}, {"speaker": "bot", "said": "4", "time": 2}]},
        {"turn_keys": {"speaker": "role", "said": "content", "time": None}, "roles": {"Dan": "user"}},
        PLAIN,
    ),
    "empty extras": (
        {"messages": [{**QUESTION, "images": []}, {**ANSWER, "tool_calls": [], "function_call": {}, "name": None}]},
        {},
        PLAIN,
    ),
    "JSON text": ({"messages": json.dumps(PLAIN)}, {}, PLAIN),
    "lists": ({"messages": {"from": ["human", "gpt"], "value": ["2+2?", "4"]}}, {}, PLAIN),
    "text parts": ({"messages": turns(("user", [{"type": "text", "text": "2+2?"}]), ("assistant", "4"))}, {}, PLAIN),
    "two parts": (
        {"messages": turns(("user", [{"type": "text", "text": "a"}, {"type": None, "text": "b", "image": None}]))},
        {},
        [{"role": "user", "content": "a\nb"}],
    ),
    "reasoning part": (
        {
            "messages": [
                QUESTION,
                *turns(
                    ("assistant", [{"type": "thinking", "thinking": "Two and two."}, {"type": "text", "text": "4"}])
                ),
            ]
        },
        {},
        [QUESTION, REASONED],
    ),
    "reasoning key": ({"messages": [QUESTION, {**ANSWER, "thinking": "Two and two."}]}, {}, [QUESTION, REASONED]),
    "system": ({"system": "Be brief.", "messages": PLAIN}, {}, [BRIEF, *PLAIN]),
    "system_prompt": ({"system_prompt": "Be brief.", "messages": PLAIN}, {"system": "No."}, [BRIEF, *PLAIN]),
    "equal systems": ({"system": "Be brief.", "messages": [BRIEF, *PLAIN]}, {}, [BRIEF, *PLAIN]),
    "empty tools": ({"tools": [], "functions": None, "messages": PLAIN}, {}, PLAIN),
    "tools": (
        {"tools": [{"name": "add"}], "system": "Be brief.", "messages": PLAIN},
        {"tool_turns": "literal"},
        [{"role": "system", "content": 'Be brief.\n\nTools: [{"name": "add"}]'}, *PLAIN],
    ),
    "tool calls": (
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"},
                ANSWER,
            ]
        },
        {"tool_turns": "literal"},
        [
            QUESTION,
            {"role": "assistant", "content": f"{CALL_TEXT}\n{CALL_TEXT}"},
            {"role": "tool", "content": "4"},
            ANSWER,
        ],
    ),
    "text before a call": (
        {"messages": [QUESTION, {"role": "assistant", "content": "I add.", "function_call": CALL["function"]}]},
        {"tool_turns": "literal"},
        [QUESTION, {"role": "assistant", "content": f"I add.\n{CALL_TEXT}"}],
    ),
    "function_call role": (
        {"messages": turns(("human", "2+2?"), ("function_call", CALL_TEXT), ("observation", "4"), ("gpt", "4"))},
        {"tool_turns": "literal"},
        [QUESTION, {"role": "assistant", "content": CALL_TEXT}, {"role": "tool", "content": "4"}, ANSWER],
    ),
    "think": (
        {"messages": turns(("user", "2+2?"), ("assistant", "<think>\nTwo and two.\n</think>\n\n4"))},
        {"reasoning_tags": ["<think>", "</think>"]},
        [QUESTION, REASONED],
    ),
    "think without its opening": (
        {"messages": turns(("user", "2+2?"), ("assistant", "Two and two.\n</think>\n\n4"))},
        {"reasoning_tags": ["<think>", "</think>"]},
        [QUESTION, REASONED],
    ),
    "empty think": (
        {"messages": turns(("user", "2+2?"), ("assistant", "<think>\n\n</think>\n\n4"))},
        {"reasoning_tags": ["<think>", "</think>"]},
        PLAIN,
    ),
    "thought and solution": (
        {"messages": turns(("user", "2+2?"), ("assistant", "<|t|>\nTwo and two.\n<|/t|>\n\n<|s|>\n4\n<|/s|>"))},
        {"reasoning_tags": ["<|t|>", "<|/t|>", "<|s|>", "<|/s|>"]},
        [QUESTION, REASONED],
    ),
}


@pytest.mark.parametrize(("record", "options", "messages"), READ_RIGHT.values(), ids=READ_RIGHT)
def test_turns_are_read_as_these_messages(
    tmp_path: Path, record: dict[str, Any], options: dict[str, Any], messages: list[Message]
) -> None:
    row = load(tmp_path, record, **options)
    assert row.messages == messages and row.trains is None and row.columns == {}


REJECTED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown role": ({"messages": turns(("bing", "a"))}, {}, "message 1 is from 'bing', which is not one of"),
    "tools": ({"tools": [{"name": "add"}], "messages": PLAIN}, {}, "'tools', which shape the prompt"),
    "tool calls": (
        {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {},
        r"message 2 \(assistant\) has 'tool_calls': set tool_turns to literal",
    ),
    "tool result": ({"messages": turns(("user", "a"), ("observation", "b"))}, {}, "is a tool turn: set tool_turns"),
    "image part": (
        {"messages": turns(("user", [{"type": "image_url", "image_url": {"url": "a"}}]))},
        {},
        "a part of type 'image_url': the model reads text alone",
    ),
    "image": ({"image": "a.jpg", "messages": PLAIN}, {}, "'image', which this format does not use"),
    "history": ({"history": [["a", "b"]], "messages": PLAIN}, {}, "'history', which this format does not use"),
    "weight of a row": ({"weight": 0.5, "messages": PLAIN}, {}, "'weight', which this format does not use"),
    "template options": (
        {"chat_template_kwargs": {"enable_thinking": False}, "messages": PLAIN},
        {},
        "'chat_template_kwargs', which this format does not use",
    ),
    "completions": ({"completions": ["a"], "messages": PLAIN}, {}, "'completions', a name that reward functions"),
    "two systems": ({"system": "a", "messages": [BRIEF, QUESTION]}, {}, "and another text under 'system'"),
    "system twice": ({"system": "a", "system_prompt": "b", "messages": PLAIN}, {}, "both 'system' and 'system_prompt'"),
    "two texts": ({"messages": [{**QUESTION, "value": "b"}]}, {}, "has both 'content' and 'value'"),
    "half a weight": ({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, {}, "weight must be 0 or 1, not 0.5"),
    "trained user": ({"messages": [{**QUESTION, "train": True}, ANSWER]}, {}, "only turns of the assistant"),
    "two answers": ({"messages": [QUESTION, ANSWER, ANSWER]}, {}, r"message 3 \(assistant\) follows another one"),
    "image in a turn": ({"messages": [{**QUESTION, "images": ["a"]}]}, {}, "has the unknown key 'images'"),
    "empty content": ({"messages": [{**QUESTION, "content": []}]}, {}, "message 1: content must be text, not a list"),
    "lists of two lengths": ({"messages": {"role": ["user"], "content": []}}, {}, "lists of different lengths"),
    "think twice": (
        {"messages": [QUESTION, *turns(("assistant", "<think>a</think>b<think>c</think>"))]},
        {"reasoning_tags": ["<think>", "</think>"]},
        "has 2 <think> and 2 </think>",
    ),
    "think left open": (
        {"messages": [QUESTION, *turns(("assistant", "<think>a"))]},
        {"reasoning_tags": ["<think>", "</think>"]},
        "has 1 <think> and 0 </think>",
    ),
    "think in both": (
        {"messages": [QUESTION, {**REASONED, "content": "<think>a</think>4"}]},
        {"reasoning_tags": ["<think>", "</think>"]},
        "both in <think> and in reasoning_content",
    ),
    "role not ours": ({"messages": PLAIN}, {"roles": {"assistant": "gpt"}}, "which is not one of system, user"),
    "unknown turn key": ({"messages": [{**QUESTION, "time": 1}]}, {}, "to leave it out: turn_keys: {time: null}"),
    "turn key not ours": ({"messages": PLAIN}, {"turn_keys": {"a": "rolle"}}, "did you mean 'role'"),
    "two turn keys": ({"messages": [{**QUESTION, "a": "b"}]}, {"turn_keys": {"a": "role"}}, "gives one name"),
    "one tag": ({"messages": PLAIN}, {"reasoning_tags": ["<think>"]}, "reasoning_tags must be an opening"),
}


@pytest.mark.parametrize(("record", "options", "problem"), REJECTED.values(), ids=REJECTED)
def test_turns_are_rejected_by_name(
    tmp_path: Path, record: dict[str, Any], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        load(tmp_path, record, **options)
    assert "\n" not in str(caught.value)


def test_turn_options_are_rejected_for_formats_without_turns(tmp_path: Path) -> None:
    for options in ({"roles": {"a": "user"}}, {"tool_turns": "literal"}):
        with pytest.raises(InputError, match="format alpaca is a format without turns: remove"):
            load(tmp_path, {"instruction": "a", "output": "b"}, format="alpaca", **options)


def test_masks_of_turns_say_which_are_trained(tmp_path: Path) -> None:
    conversation = [{**BRIEF, "weight": None}, {**QUESTION, "weight": 0.0}, {**ANSWER, "weight": 0}, QUESTION, ANSWER]
    row = load(tmp_path, {"messages": conversation})
    assert row.trains == [True, False, False, True, True] and "weight" not in row.messages[1]
    without_system = [{**QUESTION}, {**ANSWER, "train": False}, QUESTION, {**ANSWER, "train": True}]
    row = load(tmp_path, {"messages": without_system}, system="Be brief.")
    assert row.messages[0] == BRIEF and row.trains == [False, True, False, True, True]


def test_parquet_lists_and_nulls_are_read_as_turns(tmp_path: Path) -> None:
    table = {"conversations": [{"from": ["human", "gpt"], "value": ["2+2?", "4"]}], "tools": [None], "id": ["a"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    (row,) = load_rows(str(tmp_path / "rows.parquet"), format="sharegpt").rows
    assert row.messages == PLAIN and row.columns == {"id": "a"}


def test_unread_reasoning_tags_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tagged = [QUESTION, {**ANSWER, "content": "<think>\nHm.\n</think>\n\n4"}]
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": tagged}, {"messages": PLAIN}, {"messages": tagged})
    with caplog.at_level(logging.WARNING):
        load_rows(path, reasoning_tags=["<think>", "</think>"])
        assert not caplog.records
        load_rows(path)
    (record,) = caplog.records
    assert "2 of 3 rows have <think> in an answer, first" in record.getMessage()
    assert 'reasoning_tags: ["<think>", "</think>"]' in record.getMessage()


def test_answer_keeps_the_indentation_of_code(tokenizer: Any, tmp_path: Path) -> None:
    code = "    y = x + 1\n    return y"
    row = load(tmp_path, {"messages": [QUESTION, {**ANSWER, "content": f"{code}\n"}]})
    assert tokenizer.decode(encode_row(row.messages, tokenizer).input_ids) == (
        f"human: 2+2? <sep> assistant: {code} <sep>"
    )
    opened = "assistant: <reasoning>\na\n</reasoning>\n\n"
    for stored, trained in {
        "\n\n\tx\n": "assistant: \tx",
        "\u00a0 4": "assistant: 4",
        " 4": "assistant: 4",
        "<reasoning>a</reasoning>\n\n  x": f"{opened}  x",
        "<reasoning>a</reasoning>  x": f"{opened}x",
    }.items():
        text = tokenizer.decode(encode_row([QUESTION, {**ANSWER, "content": stored}], tokenizer).input_ids)
        assert text == f"human: 2+2? <sep> {trained} <sep>"
