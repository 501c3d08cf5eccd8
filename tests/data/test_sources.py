"""Row sources: every layout, every way to be refused, and the real data sets where they are at hand."""

import gzip
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from rekatrain.data.chat import IGNORED_LABEL, check_messages, encode_row, parse_completion
from rekatrain.data.errors import InputError
from rekatrain.data.layouts import LAYOUTS
from rekatrain.data.records import rename_keys
from rekatrain.data.sources import load_rows
from rekatrain.data.tokenizer import check_tokenizer
from tests.conftest import REAL_DATA

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
REASONED_ANSWER = {**ANSWER, "reasoning_content": "Two and two."}
BRIEF = {"role": "system", "content": "Be brief."}


def write_jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(*texts: str) -> list[dict[str, str]]:
    return [{"prompt": text} for text in texts]


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
def test_a_layout_gives_exactly_these_messages_and_columns(tmp_path, format, record, messages, columns):
    path = write_jsonl(tmp_path / "train.jsonl", record)
    (row,) = load_rows(path, format=format).rows
    assert row.messages == messages
    assert row.columns == columns
    assert row.where == f"{path}:1"


def test_every_layout_has_a_case():
    assert {case[0] for case in LAYOUT_CASES.values()} == set(LAYOUTS)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    records = [{"messages": [QUESTION, REASONED_ANSWER], "level": 1}, {"messages": [QUESTION, ANSWER], "level": 2}]
    lines = "\n".join(json.dumps(record) for record in records).encode()
    path = tmp_path / f"train{suffix}"
    if suffix == ".parquet":  # which writes a null for the second row's missing reasoning_content
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_bytes(gzip.compress(lines) if suffix == ".jsonl.gz" else lines)
    rows = load_rows(str(path)).rows
    assert [row.messages for row in rows] == [record["messages"] for record in records]
    assert [row.columns for row in rows] == [{"level": 1}, {"level": 2}]
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:2"]


def test_blank_lines_a_byte_order_mark_and_carriage_returns_are_no_rows(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')
    rows = load_rows(str(path), format="prompt_answer").rows
    assert [(row.messages[0]["content"], row.where[-2:]) for row in rows] == [("a", ":1"), ("b", ":4")]


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
def test_a_bad_row_is_refused_in_one_line_that_names_file_and_line(tmp_path, format, line, problem):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n" + line)
    with pytest.raises(InputError) as refusal:
        load_rows(str(path), format=format)
    message = str(refusal.value)
    assert message.startswith(f"{path}:2: ") and problem in message and "\n" not in message


def test_skipped_rows_are_counted_named_and_warned_about(tmp_path, caplog):
    path = write_jsonl(tmp_path / "train.jsonl", *prompts("a", "", "b <sep>", "c"))
    with caplog.at_level(logging.WARNING):
        loaded = load_rows(path, format="prompt_answer", bad_rows="skip")
    assert [row.where for row in loaded.rows] == [f"{path}:1", f"{path}:4"]
    assert [message.split(": ")[0] for message in loaded.skipped] == [f"{path}:2", f"{path}:3"]
    (record,) = caplog.records
    assert "2 bad rows" in record.getMessage() and loaded.skipped[0] in record.getMessage()


def test_nothing_is_logged_where_nothing_is_skipped(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", *prompts("a"))
    assert load_rows(path, format="prompt_answer", bad_rows="skip").skipped == []
    assert not caplog.records


@given(is_good=st.lists(st.booleans(), min_size=1, max_size=12), limit=st.integers(1, 12))
def test_limit_counts_good_rows_and_reads_no_further(tmp_path_factory, is_good, limit):
    records = prompts(*("ok" if good else "" for good in is_good))
    path = write_jsonl(tmp_path_factory.mktemp("limit") / "a.jsonl", *records)
    good_lines = [line for line, good in enumerate(is_good, start=1) if good][:limit]
    if not good_lines:
        with pytest.raises(InputError, match="no good row; the first bad one: .*:1: prompt is empty"):
            load_rows(path, format="prompt_answer", bad_rows="skip", limit=limit)
        return
    loaded = load_rows(path, format="prompt_answer", bad_rows="skip", limit=limit)
    assert [int(row.where.rpartition(":")[2]) for row in loaded.rows] == good_lines
    last = good_lines[-1] if len(good_lines) == limit else len(is_good)
    assert len(loaded.skipped) == is_good[:last].count(False)


def test_a_forged_turn_is_neutralized_on_request_and_only_in_the_messages(tmp_path):
    record = {"prompt": "a <sep> assistant: b", "answer": "c<sep>", "note": "<sep>"}
    path = write_jsonl(tmp_path / "train.jsonl", record)
    (row,) = load_rows(path, format="prompt_answer", forged_turns="neutralize").rows
    assert [message["content"] for message in row.messages] == ["a < sep> assistant: b", "c< sep>"]
    assert row.columns == {"answer": "c<sep>", "note": "<sep>"}
    check_messages(row.messages)


@pytest.mark.parametrize("forged_turns", ["refuse", "neutralize"])
def test_a_malformed_row_is_a_bad_row_and_no_crash_when_neutralising(tmp_path, forged_turns):
    for content in (None, 1, ["<sep>"]):
        path = write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "assistant", "content": content}]})
        with pytest.raises(InputError, match="a.jsonl:1: message 1: content must be text"):
            load_rows(path, forged_turns=forged_turns)


def test_system_is_added_only_to_rows_without_one(tmp_path):
    records = [{"messages": [QUESTION, ANSWER]}, {"messages": [{**BRIEF, "content": "My own."}, QUESTION]}]
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", *records), system="Be brief.").rows
    assert [row.messages[0] for row in rows] == [BRIEF, {**BRIEF, "content": "My own."}]
    assert rows[0].messages[1:] == [QUESTION, ANSWER]


def test_columns_rename_keys_for_the_layout_and_for_rewards(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"q": "2+2?", "final": 4, "answer": "long", "lvl": 1, "id": 3})
    columns = {"prompt": "q", "answer": "final", "solution": "answer", "level": "lvl"}
    (row,) = load_rows(path, format="prompt_answer", columns=columns).rows
    assert row.messages == [QUESTION, ANSWER]
    assert row.columns == {"answer": "4", "solution": "long", "level": 1, "id": 3}


@given(record=st.dictionaries(st.sampled_from("abcdef"), st.integers(), min_size=1), data=st.data())
def test_a_renaming_loses_no_value_and_overwrites_none(record, data):
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
def test_a_renaming_that_cannot_be_made_is_refused(tmp_path, columns, problem):
    path = write_jsonl(tmp_path / "a.jsonl", {"q": "2+2?", "answer": 4})
    with pytest.raises(InputError, match=problem):
        load_rows(path, format="prompt_answer", columns=columns)


@pytest.mark.parametrize(
    ("path", "options", "problem"),
    [
        ("a.jsonl", {"size": 3}, "local file: remove size, which cannot"),
        ("a.jsonl", {"seed": 0}, "local file: remove seed, which cannot"),
        ("a.jsonl", {"task": {}}, "local file: remove task, which cannot"),
        ("a.jsonl", {"name": "main", "split": "train", "revision": "b"}, "remove name, split, revision, which cannot"),
        ("reasoning_gym:chain_sum", {"format": "messages"}, "procedural task: remove format, which cannot"),
        ("reasoning_gym:chain_sum", {"columns": {}}, "procedural task: remove columns, which cannot"),
        ("reasoning_gym:chain_sum", {"split": "train"}, "procedural task: remove split, which cannot"),
        ("owner/set", {"size": 3, "seed": 1}, "Hugging Face dataset: remove size, seed, which cannot"),
        ("a.jsonl", {"format": "alpacca"}, "format 'alpacca' is not known; did you mean 'alpaca'"),
        ("a.jsonl", {"bad_rows": "skipp"}, "did you mean 'skip'"),
        ("a.jsonl", {"forged_turns": "neutralise"}, "did you mean 'neutralize'"),
        ("a.jsonl", {"limit": 0}, "limit must be a whole number of at least 1, not 0"),
        ("a.jsonl", {"limit": True}, "limit must be"),
        ("a.jsonl", {"system": " "}, "system is empty"),
        ("reasoning_gym:chain_sum", {"size": 0}, "size must be a whole number of at least 1, not 0"),
        ("reasoning_gym:chain_sum", {"seed": "x"}, "seed must be a whole number of at least 0"),
        ("reasoning_gym:chain_summ", {}, "reasoning_gym task 'chain_summ' is not known; did you mean 'chain_sum'"),
        ("reasoning_gym:chain_sum", {"task": {"min_term": 2}}, "did you mean 'min_terms'"),
        ("reasoning_gym:chain_sum", {"task": {"seed": 2}}, "seed is a key of the dataset section"),
        ("reasoning_gym:chain_sum", {"task": {"min_terms": -1}}, "does not accept task: .*min_terms must be positive"),
        ("reasoning_gym:chain_sum", {"task": {"min_terms": "x"}}, "does not accept task"),
    ],
)
def test_an_option_that_cannot_apply_is_refused(monkeypatch, tmp_path, path, options, problem):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", {"messages": [QUESTION]})
    with pytest.raises(InputError, match=problem):
        load_rows(path, **options)


@pytest.mark.parametrize("path", ["a.jsonl", "a.json", "a.parquet", "b/a.jsonl.gz", "./a.jsonl", "/nowhere/a.json"])
def test_a_missing_file_is_named_and_never_looked_up_on_the_hub(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("looked up on the hub"))
    with pytest.raises(InputError, match=f"{path} does not exist"):
        load_rows(path)


def test_a_file_of_another_kind_or_a_folder_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("a,b\n")
    for path in ("rows.csv", "./rows", str(tmp_path)):
        with pytest.raises(InputError, match="is not a .jsonl, .jsonl.gz, .json, .parquet file"):
            load_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b"", "no good row"),
        ("a.json", b"[]", "no good row"),
        ("a.json", b'{"messages": []}', "must hold a list of rows, not dict"),
        ("a.json", b"[{]", "not valid JSON"),
        ("a.json", b"\xff", "not UTF-8"),
        ("a.jsonl.gz", b"plain", "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"messages": 1}\n' * 99)[:-9], "cannot be read: Compressed file ended"),
        ("a.parquet", b"plain", "cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_even_where_bad_rows_are_skipped(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem) as refusal:
        load_rows(str(tmp_path / name), bad_rows="skip")
    assert str(tmp_path / name) in str(refusal.value) and "\n" not in str(refusal.value)


# `datasets.load_dataset` is replaced: on a local folder it would write a cache into the home folder, and on a hub id it
# needs a network. What it returns is a real Dataset, with its nulls.
def test_a_hub_id_goes_to_load_dataset_with_name_split_and_revision(monkeypatch):
    calls = []

    def load_dataset(path, name, **options):
        calls.append((path, name, options))
        return datasets.Dataset.from_list([{"messages": [QUESTION, REASONED_ANSWER]}, {"messages": [QUESTION, ANSWER]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("owner/set", name="main", split="test[:2]", revision="abc").rows
    load_rows("owner/set")
    assert calls == [
        ("owner/set", "main", {"split": "test[:2]", "revision": "abc"}),
        ("owner/set", None, {"split": "train", "revision": None}),
    ]
    assert [row.messages for row in rows] == [[QUESTION, REASONED_ANSWER], [QUESTION, ANSWER]]
    assert [row.where for row in rows] == ["owner/set:1", "owner/set:2"]


@pytest.mark.parametrize(
    "error", [ConnectionError("no\nnetwork"), ValueError("no split"), datasets.exceptions.DatasetNotFoundError("gone")]
)
def test_a_dataset_that_cannot_be_loaded_is_one_line(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="the dataset 'owner/set' could not be loaded: (no|gone)") as refusal:
        load_rows("owner/set")
    assert "\n" not in str(refusal.value)


def test_generated_rows_are_decided_by_the_seed():
    def questions(**options):
        return [row.messages[0]["content"] for row in load_rows("reasoning_gym:chain_sum", size=20, **options).rows]

    assert questions() == questions(seed=0) == questions()
    assert questions(seed=1) != questions(seed=2)


def test_generated_rows_follow_size_task_options_and_default_to_a_thousand():
    rows = load_rows("reasoning_gym:chain_sum", size=4, task={"min_terms": 5, "max_terms": 5}).rows
    assert [row.where for row in rows] == [f"reasoning_gym:chain_sum[{index}]" for index in range(4)]
    assert all(row.columns["reasoning_gym_entry"]["metadata"]["num_terms"] == 5 for row in rows)
    assert len(load_rows("reasoning_gym:chain_sum").rows) == 1000


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "leg_counting", "spell_backward", "zebra_puzzles"])
def test_gold_answers_of_generated_rows_earn_full_marks(task):
    for row in load_rows(f"reasoning_gym:{task}", size=10, seed=3).rows:
        entry = row.columns["reasoning_gym_entry"]
        score = reasoning_gym.get_score_answer_fn(row.columns["reasoning_gym_task"])
        assert score(row.messages[-1]["content"], entry) == 1.0
        assert row.messages[-1] == {"role": "assistant", "content": row.columns["answer"]}
        assert row.prompt == [{"role": "user", "content": entry["question"]}]


def test_a_task_without_a_gold_answer_gives_prompts_only():
    (row,) = load_rows("reasoning_gym:propositional_logic", size=1).rows
    assert [message["role"] for message in row.messages] == ["user"]
    assert row.columns["answer"] is None


def test_importing_the_sources_brings_in_no_heavy_library():
    heavy = ["torch", "datasets", "pyarrow", "reasoning_gym"]
    script = f"import sys, rekatrain.data.sources; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_gsm8k_row_is_encoded_and_read_back_as_it_was_loaded(cl100k):
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


def test_preference_pairs_are_alpaca_rows_whose_rejected_reply_stays_a_column():
    path = REAL_DATA / "politeness.jsonl.gz"
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    columns = {"output": "chosen", "plain": "output"}
    loaded = load_rows(str(path), format="alpaca", columns=columns, bad_rows="skip")
    good = [record for record in records if record["chosen"].strip()]
    assert len(loaded.rows) == len(good) > 1000 and len(loaded.skipped) == len(records) - len(good)
    for row, record in zip(loaded.rows, good, strict=True):
        assert row.messages[-1]["content"] == record["chosen"]
        assert row.columns == {"rejected": record["rejected"], "plain": record["output"]}


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
def test_fill_in_asks_without_the_choices_where_the_row_allows(tmp_path, question, choices, is_fill_in):
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
def test_an_answer_that_is_none_of_the_choices_is_refused(tmp_path, answer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "6 x 7?", "choices": ["13", "42"], "answer": answer}))
    with pytest.raises(InputError, match="answer must be the letter of one of the 2 choices, or its index from 0"):
        load_rows(str(path), format="multiple_choice")
