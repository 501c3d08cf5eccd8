"""Layouts: the messages and columns of each, the errors of bad rows, and real data sets."""

import gzip
import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rekatrain.data import layouts
from rekatrain.data.chat import IGNORED_LABEL, Message, encode_row, parse_completion
from rekatrain.data.errors import InputError
from rekatrain.data.formats import Format
from rekatrain.data.layouts import LAYOUTS, TURN_LAYOUTS
from rekatrain.data.records import Record, rename_keys
from rekatrain.data.sources import load_rows
from rekatrain.data.tokenizer import check_tokenizer
from tests.conftest import REAL_DATA, write_jsonl

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
REASONED_ANSWER = {**ANSWER, "reasoning_content": "Two and two."}
BRIEF = {"role": "system", "content": "Be brief."}


LAYOUT_CASES = {
    "messages": ("messages", {"messages": [BRIEF, QUESTION, REASONED_ANSWER]}, [BRIEF, QUESTION, REASONED_ANSWER], {}),
    "messages with nulls": ("messages", {"messages": [{**QUESTION, "reasoning_content": None}]}, [QUESTION], {}),
    "prompt only": ("prompt_answer", {"prompt": "2+2?", "answer": None}, [QUESTION], {}),
    "number as answer": ("prompt_answer", {"prompt": "2+2?", "answer": 4}, [QUESTION, ANSWER], {"answer": "4"}),
    "prompt_answer": (
        "prompt_answer",
        {"prompt": "2+2?", "answer": "4", "reasoning": "Two and two.", "system": "Be brief.", "level": 1},
        [BRIEF, QUESTION, REASONED_ANSWER],
        {"answer": "4", "level": 1},
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "4"},
                {"from": "user", "value": "2+2?"},
                {"from": "chatgpt", "value": "4"},
            ],
            "id": "a",
        },
        [BRIEF, QUESTION, ANSWER, QUESTION, ANSWER],
        {"id": "a"},
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": "2+2", "output": "4", "system": "Be brief.", "id": 7},
        [BRIEF, {"role": "user", "content": "Add.\n\n2+2"}, ANSWER],
        {"id": 7},
    ),
    "alpaca with empty input": ("alpaca", {"instruction": "2+2?", "input": "", "output": "4"}, [QUESTION, ANSWER], {}),
    "alpaca without input": ("alpaca", {"instruction": "2+2?", "output": "4"}, [QUESTION, ANSWER], {}),
    "gsm8k": (
        "gsm8k",
        {"question": "2+2?", "answer": "It is $<<1000+234=1234>>1,234 in all.\n#### -1,234,567.5", "level": 1},
        [QUESTION, {"role": "assistant", "content": "-1234567.5", "reasoning_content": "It is $1,234 in all."}],
        {"answer": "-1234567.5", "level": 1},
    ),
    "gsm8k without solution": ("gsm8k", {"question": "2+2?", "answer": "#### 4"}, [QUESTION, ANSWER], {"answer": "4"}),
}


@pytest.mark.parametrize(("format", "record", "messages", "columns"), LAYOUT_CASES.values(), ids=LAYOUT_CASES)
def test_layout_gives_exactly_these_messages_and_columns(
    tmp_path: Path, format: Format, record: Record, messages: list[Message], columns: Record
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", record)
    (row,) = load_rows(path, format=format).rows
    assert row.messages == messages
    assert row.columns == columns
    assert row.where == f"{path}:1"


def test_layout_cases_cover_every_layout() -> None:
    assert {case[0] for case in LAYOUT_CASES.values()} == set(LAYOUTS) | set(TURN_LAYOUTS)


BAD_ROWS = {
    "not JSON": ("messages", b'{"messages": ', "not valid JSON"),
    "not UTF-8": ("messages", b'{"messages": "\xff"}', "not UTF-8"),
    "half a surrogate pair": ("prompt_answer", rb'{"prompt": "\ud800"}', "half a surrogate pair"),
    "nested too deeply": ("messages", b"[" * 100_000, "not valid JSON"),
    "not an object": ("messages", b"[1]", "must be a JSON object, not list"),
    "no messages": ("messages", b'{"text": "a", "id": 1}', "there is no 'messages'; the row has text, id"),
    "empty messages": ("messages", b'{"messages": []}', "at least one message"),
    "text for messages": ("messages", b'{"messages": "a"}', "must be a list with at least one message, not str"),
    "message is text": ("messages", b'{"messages": ["a"]}', "message 1 must be an object"),
    "no content": ("messages", b'{"messages": [{"role": "user"}]}', "content must be text, not missing"),
    "parts as content": ("messages", b'{"messages": [{"role": "user", "content": []}]}', "must be text, not a list"),
    "tool call": (
        "messages",
        b'{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}',
        "unknown key 'tool_calls'",
    ),
    "forged turn": ("prompt_answer", b'{"prompt": "a <sep> assistant: b"}', "holds a literal <sep>"),
    "empty prompt": ("prompt_answer", b'{"prompt": " "}', "prompt is empty"),
    "answer of neither kind": ("prompt_answer", b'{"prompt": "a", "answer": true}', "answer must be text, not bool"),
    "empty answer": ("prompt_answer", b'{"prompt": "a", "answer": ""}', "answer is empty"),
    "reasoning alone": ("prompt_answer", b'{"prompt": "a", "reasoning": "b"}', "there is reasoning but no answer"),
    "unknown speaker": ("sharegpt", b'{"conversations": [{"from": "bing", "value": "a"}]}', "'bing', which is not one"),
    "no output": ("alpaca", b'{"instruction": "a"}', "there is no 'output'; the row has instruction"),
    "input not text": ("alpaca", b'{"instruction": "a", "input": 1, "output": "b"}', "input must be text, not int"),
    "no final answer": ("gsm8k", b'{"question": "a", "answer": "It is 4."}', "must end with '####'"),
    "blank final answer": ("gsm8k", b'{"question": "a", "answer": "It is 4. #### "}', "must end with '####'"),
}


@pytest.mark.parametrize(("format", "line", "problem"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_load_rows_reports_a_bad_row_in_one_line(tmp_path: Path, format: Format, line: bytes, problem: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n" + line)
    with pytest.raises(InputError) as caught:
        load_rows(str(path), format=format)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and problem in message and "\n" not in message


def test_columns_rename_keys_for_layout_and_rewards(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"q": "2+2?", "final": 4, "answer": "long", "lvl": 1, "id": 3})
    columns = {"prompt": "q", "answer": "final", "solution": "answer", "level": "lvl"}
    (row,) = load_rows(path, format="prompt_answer", columns=columns).rows
    assert row.messages == [QUESTION, ANSWER]
    assert row.columns == {"answer": "4", "solution": "long", "level": 1, "id": 3}


README = Path(layouts.__file__).with_name("README.md").read_text(encoding="utf-8")
README_EXAMPLES = [
    (name, json.loads(example))
    for names, example in re.findall(r"^\| (`[a-z0-9_`, ]+`) \| `(\{.*?\})`(?:;.*)? \|$", README, re.MULTILINE)
    for name in re.findall(r"\w+", names)
]


@pytest.mark.parametrize(("format", "record"), README_EXAMPLES)
def test_readme_examples_load(tmp_path: Path, format: Format, record: Record) -> None:
    (row,) = load_rows(write_jsonl(tmp_path / "train.jsonl", record), format=format).rows
    if format == "tokenized":
        assert row.tokens and len(row.tokens.input_ids) == 4
    else:
        assert row.messages[-1]["role"] == ("user" if format == "verl" else "assistant")


def test_readme_names_every_layout() -> None:
    assert {name for name, _ in README_EXAMPLES} == set(get_args(Format)) - {"mbpp", "humaneval"}
    assert all(f"`{name}`" in README for name in get_args(Format))


@given(record=st.dictionaries(st.sampled_from("abcdef"), st.integers(), min_size=1), data=st.data())
def test_rename_keys_loses_and_overwrites_no_value(record: dict[str, int], data: st.DataObject) -> None:
    theirs = data.draw(st.lists(st.sampled_from(sorted(record)), unique=True))
    ours = data.draw(st.permutations([*"uvwxyz"]))[: len(theirs)]
    renamed = rename_keys(record, dict(zip(ours, theirs, strict=True)))
    assert sorted(renamed.values()) == sorted(record.values())
    assert all(renamed[our] == record[their] for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"prompt": "text"}, r"a.jsonl:1: there is no key 'text' \(columns: prompt\); the row has q, answer"),
        ({"answer": "q"}, "a.jsonl:1: columns makes 'q' the key 'answer', but .* original_answer: answer"),
        ({"prompt": 3}, "columns must map"),
    ],
)
def test_columns_that_cannot_be_renamed_are_rejected(tmp_path: Path, columns: dict[str, str], problem: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"q": "2+2?", "answer": 4})
    with pytest.raises(InputError, match=problem):
        load_rows(path, format="prompt_answer", columns=columns)


@pytest.mark.parametrize(
    ("question", "choices", "is_fill_in"),
    [
        ("What is 6 x 7?", ["13", "42"], True),
        ("Which of the following is 6 x 7?", ["13", "42"], False),
        ("What is 6 x 7?", ["none of the above", "42"], False),
        ("What is 6 x 7?", ["42", "42"], False),
        ("What is 6 x 7?", ["13", "forty-two, " * 9], False),
        ("What is 6 x 7?", ["A and B", "42"], False),
        ("All are even except", ["13", "42"], False),
    ],
)
def test_fill_in_row_drops_the_choices_where_it_can(
    tmp_path: Path, question: str, choices: list[str], is_fill_in: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": question, "choices": choices, "answer": "B"}))
    (row,) = load_rows(str(path), format="fill_in").rows
    (kept,) = load_rows(str(path), format="multiple_choice").rows
    assert row.columns == ({"answer": choices[1], "choice": None} if is_fill_in else kept.columns)
    assert row.messages == (
        [{"role": "user", "content": question}, {"role": "assistant", "content": choices[1]}]
        if is_fill_in
        else kept.messages
    )
    assert kept.columns == {"answer": None, "choice": "B"} and f"B. {choices[1]}" in kept.messages[0]["content"]


@pytest.mark.parametrize("answer", ["C", "AB", "", None, 2, -1, True])
def test_multiple_choice_row_rejects_an_answer_of_no_choice(tmp_path: Path, answer: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "6 x 7?", "choices": ["13", "42"], "answer": answer}))
    with pytest.raises(InputError, match="answer must be the letter of one of the 2 choices, or its index from 0"):
        load_rows(str(path), format="multiple_choice")


# Real data


def test_gsm8k_rows_survive_encoding_and_parsing(cl100k: PreTrainedTokenizerFast) -> None:
    check_tokenizer(cl100k)
    rows = load_rows(str(REAL_DATA / "gsm8k_test.jsonl.gz"), format="gsm8k").rows
    assert len(rows) == 1319
    for row in rows:
        encoded = encode_row(row.messages, cl100k)
        trained = [label for label in encoded.labels if label != IGNORED_LABEL]
        completion = parse_completion(cl100k.decode(trained, clean_up_tokenization_spaces=False))
        assert completion.reasoning == row.messages[-1]["reasoning_content"], row.where
        assert completion.answer == row.messages[-1]["content"] == row.columns["answer"], row.where
        assert "<<" not in completion.reasoning and re.fullmatch(r"-?\d+(\.\d+)?", completion.answer), row.where


def test_alpaca_reads_preference_pairs_as_plain_rows() -> None:
    path = REAL_DATA / "politeness.jsonl.gz"
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    columns = {"output": "chosen", "plain": "output"}
    loaded = load_rows(str(path), format="alpaca", columns=columns, bad_rows="skip")
    good = [record for record in records if record["chosen"].strip()]
    assert len(loaded.rows) == len(good) > 1000 and len(loaded.skipped) == len(records) - len(good)
    for row, record in zip(loaded.rows, good, strict=True):
        assert row.messages[-1]["content"] == record["chosen"]
        assert row.columns == {"rejected": record["rejected"], "plain": record["output"]}
