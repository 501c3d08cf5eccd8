"""Layouts of other libraries: TRL's, verl's, rows of ids, and OpenAssistant's trees."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import EncodedRow, Message, encode_row
from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row
from rekatrain.data.sources import load_rows
from rekatrain.data.training_rows import encode_conversation
from tests.conftest import write_jsonl

QUESTION: Message = {"role": "user", "content": "2+2?"}
ANSWER: Message = {"role": "assistant", "content": "4"}
BRIEF: Message = {"role": "system", "content": "Be brief."}


def load(tmp_path: Path, *records: Any, **options: Any) -> list[Row]:
    return load_rows(write_jsonl(tmp_path / "rows.jsonl", *records), **options).rows


def test_prompt_completion_trains_only_the_completion(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        {"prompt": "2+2?", "completion": "4", "id": 1},
        {"prompt": [QUESTION], "completion": [ANSWER], "id": 1},
        {"prompt": [QUESTION], "completion": "4", "id": 1},
        {"prompt": json.dumps([QUESTION]), "completion": json.dumps([ANSWER]), "id": 1},
    ]
    for row in load(tmp_path, *records, format="prompt_completion"):
        assert row.messages == [QUESTION, ANSWER] and row.columns == {"id": 1}
    (row,) = load(
        tmp_path, {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}, format="prompt_completion"
    )
    assert encode_conversation(row, tokenizer) == [encode_row(row.messages, tokenizer)]


def test_prompt_that_begins_like_json_stays_text(tmp_path: Path) -> None:
    for text in ("[1, 2]", '[{"a": 1}]', "[{", "[user]"):
        (row,) = load(tmp_path, {"prompt": text, "completion": "4"}, format="prompt_completion")
        assert row.messages[0]["content"] == text


def test_prompt_answer_takes_messages_history_and_several_answers(tmp_path: Path) -> None:
    asked: list[Message] = [BRIEF, QUESTION, ANSWER, QUESTION]
    record = {"prompt": asked, "solution": "4"}
    (row,) = load(tmp_path, record, format="prompt_answer", columns={"answer": "solution"})
    assert row.messages == [*asked, ANSWER] and row.trains == [False] * 4 + [True] and row.columns == {"answer": "4"}
    (row,) = load(
        tmp_path, {"prompt": "2+2?", "history": [["2+2?", "4"]], "answer": [4, "four"]}, format="prompt_answer"
    )
    assert row.messages == [QUESTION, ANSWER, QUESTION, ANSWER] and row.columns == {"answer": ["4", "four"]}


def test_alpaca_history_and_reasoning_are_turns_of_the_row(tmp_path: Path) -> None:
    record = {
        "instruction": "2+2?",
        "output": "4",
        "history": [["2+2?", "4"]],
        "reasoning": "Two.",
        "system": "Be brief.",
    }
    (row,) = load(tmp_path, record, format="alpaca")
    assert row.messages == [BRIEF, QUESTION, ANSWER, QUESTION, {**ANSWER, "reasoning_content": "Two."}]
    with pytest.raises(InputError, match="history must be a list of pairs"):
        load(tmp_path, {**record, "history": [["2+2?"]]}, format="alpaca")


def test_verl_rows_are_prompts_with_their_ground_truth(tmp_path: Path) -> None:
    record = {
        "data_source": "openai/gsm8k",
        "prompt": [QUESTION],
        "reward_model": {"style": "rule", "ground_truth": 4},
        "extra_info": {"index": 1},
    }
    (row,) = load(tmp_path, record, format="verl")
    assert row.messages == row.prompt == [QUESTION]
    assert row.columns == {key: record[key] for key in ("data_source", "reward_model", "extra_info")} | {"answer": "4"}
    cells = {**record, **{key: json.dumps(record[key]) for key in ("prompt", "reward_model")}}
    (row,) = load(tmp_path, cells, format="verl")
    assert row.prompt == [QUESTION] and row.columns["answer"] == "4"
    with pytest.raises(InputError, match="no reward_model.ground_truth"):
        load(tmp_path, {"prompt": [QUESTION], "reward_model": {}}, format="verl")


IDS = [5, 6, 7, 8]


@pytest.mark.parametrize(
    "mask", [{"labels": [-100, -100, 7, 8]}, {"completion_mask": [0, 0, 1, 1]}, {"assistant_masks": [0, 0, 1, 1]}]
)
def test_tokenized_rows_are_trained_as_they_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, mask: dict[str, list[int]]
) -> None:
    (row,) = load(tmp_path, {"input_ids": IDS, "attention_mask": [1] * 4, "id": 3, **mask}, format="tokenized")
    assert encode_conversation(row, tokenizer) == [EncodedRow(input_ids=IDS, labels=[-100, -100, 7, 8])]
    assert row.columns == {"id": 3}
    with pytest.raises(InputError, match="rows.jsonl:1: a row of token ids has no prompt"):
        _ = row.prompt


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"input_ids": IDS}, "needs one of labels, .*; it has none"),
        ({"input_ids": IDS, "labels": IDS, "completion_mask": [1] * 4}, "it has labels and completion_mask"),
        ({"input_ids": IDS, "labels": [5, 6]}, "labels has 2 numbers, and input_ids has 4"),
        ({"input_ids": IDS, "labels": [6, 7, 8, -100]}, r"labels\[0\] is 6, neither .* labels are not shifted"),
        ({"input_ids": IDS, "labels": [-100] * 4}, "no token of the row is trained"),
        ({"input_ids": IDS, "completion_mask": [1, 0, 0, 0]}, "no token of the row is trained"),
        ({"input_ids": IDS, "completion_mask": [2, 0, 0, 0]}, "must hold only 0 and 1"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": [0, 1, 1, 1]}, "attention_mask is not all 1"),
        ({"input_ids": [5.0], "labels": [5]}, "input_ids must be a list of whole numbers"),
    ],
)
def test_tokenized_rows_with_faults_are_rejected(tmp_path: Path, record: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load(tmp_path, record, format="tokenized")


def test_tokenized_rows_outside_the_vocabulary_are_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(messages=[], tokens=EncodedRow(input_ids=[1, 10**6], labels=[1, 10**6]))
    with pytest.raises(InputError, match="input_ids holds 1000000, and the tokenizer has the ids 0 to"):
        encode_conversation(row, tokenizer)


def reply(text: str, *replies: dict[str, Any], role: str = "assistant", **keys: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), **keys}


TREE = reply(
    "2+2?",
    reply("5", rank=1),
    reply("4", reply("2+2?", reply("4", reply("Thanks", role="prompter")), role="prompter"), rank=0),
    reply("bad", rank=-1, deleted=True),
    reply("worse", rank=-1, review_result=False),
    reply("unranked", rank=None),
    role="prompter",
)


def flatten(node: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    name = f"{parent}/{node['text']}" if parent else node["text"]
    below = [message for one in node["replies"] for message in flatten(one, name)]
    keys = {key: value for key, value in node.items() if key != "replies"}
    return [{**keys, "message_id": name, "parent_id": parent, "message_tree_id": "t"}, *below]


def test_oasst_reads_the_best_thread_of_trees_and_messages(tmp_path: Path) -> None:
    (tree,) = load(tmp_path, {"message_tree_id": "t", "prompt": TREE}, format="oasst")
    assert tree.messages == [QUESTION, ANSWER, QUESTION, ANSWER] and tree.columns == {"message_tree_id": "t"}
    for messages in (flatten(TREE), flatten(TREE)[::-1]):
        (row,) = load(tmp_path, *messages, format="oasst")
        assert row.messages == tree.messages and row.columns == tree.columns
        assert row.where.endswith(f":{1 + messages.index(flatten(TREE)[0])}")
    loaded = load_rows(
        write_jsonl(tmp_path / "a.jsonl", {"prompt": TREE}, {"a": 1}, {"prompt": {"role": "bot"}}),
        format="oasst",
        bad_rows="skip",
    )
    assert len(loaded.rows) == 1
    assert [message.rpartition("jsonl:")[2][:3] for message in loaded.skipped] == ["2: ", "3: "]
