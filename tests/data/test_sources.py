"""Row sources: files, datasets of the hub and procedural tasks, and the options that apply to each."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from rekatrain.data.chat import check_messages
from rekatrain.data.errors import InputError
from rekatrain.data.sources import ForgedTurns, load_rows
from tests.conftest import write_jsonl

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
REASONED_ANSWER = {**ANSWER, "reasoning_content": "Two and two."}
BRIEF = {"role": "system", "content": "Be brief."}


def prompts(*texts: str) -> list[dict[str, str]]:
    return [{"prompt": text} for text in texts]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_load_rows_reads_the_same_rows_from_every_file_type(tmp_path: Path, suffix: str) -> None:
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


def test_load_rows_ignores_blank_lines_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')
    rows = load_rows(str(path), format="prompt_answer").rows
    assert [(row.messages[0]["content"], row.where[-2:]) for row in rows] == [("a", ":1"), ("b", ":4")]


def test_load_rows_counts_names_and_logs_skipped_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", *prompts("a", "", "b <sep>", "c"))
    with caplog.at_level(logging.WARNING):
        loaded = load_rows(path, format="prompt_answer", bad_rows="skip")
    assert [row.where for row in loaded.rows] == [f"{path}:1", f"{path}:4"]
    assert [message.split(": ")[0] for message in loaded.skipped] == [f"{path}:2", f"{path}:3"]
    (record,) = caplog.records
    assert "2 bad rows" in record.getMessage() and loaded.skipped[0] in record.getMessage()


def test_load_rows_logs_nothing_without_skipped_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *prompts("a"))
    assert load_rows(path, format="prompt_answer", bad_rows="skip").skipped == []
    assert not caplog.records


@given(is_good=st.lists(st.booleans(), min_size=1, max_size=12), limit=st.integers(1, 12))
def test_limit_counts_good_rows_and_reads_no_further(
    tmp_path_factory: pytest.TempPathFactory, is_good: list[bool], limit: int
) -> None:
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


def test_forged_turns_neutralizes_messages_but_not_columns(tmp_path: Path) -> None:
    record = {"prompt": "a <sep> assistant: b", "answer": "c<sep>", "note": "<sep>"}
    path = write_jsonl(tmp_path / "train.jsonl", record)
    (row,) = load_rows(path, format="prompt_answer", forged_turns="neutralize").rows
    assert [message["content"] for message in row.messages] == ["a < sep> assistant: b", "c< sep>"]
    assert row.columns == {"answer": "c<sep>", "note": "<sep>"}
    check_messages(row.messages)


@pytest.mark.parametrize("forged_turns", ["refuse", "neutralize"])
def test_forged_turns_reports_a_malformed_row_as_bad(tmp_path: Path, forged_turns: ForgedTurns) -> None:
    for content in (None, 1, ["<sep>"]):
        path = write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "assistant", "content": content}]})
        with pytest.raises(InputError, match="a.jsonl:1: message 1: content must be text"):
            load_rows(path, forged_turns=forged_turns)


def test_system_is_added_only_to_rows_without_one(tmp_path: Path) -> None:
    records = [{"messages": [QUESTION, ANSWER]}, {"messages": [{**BRIEF, "content": "My own."}, QUESTION]}]
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", *records), system="Be brief.").rows
    assert [row.messages[0] for row in rows] == [BRIEF, {**BRIEF, "content": "My own."}]
    assert rows[0].messages[1:] == [QUESTION, ANSWER]


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
def test_load_rows_rejects_options_that_cannot_apply(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, options: dict[str, Any], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", {"messages": [QUESTION]})
    with pytest.raises(InputError, match=problem):
        load_rows(path, **options)


@pytest.mark.parametrize("path", ["a.jsonl", "a.json", "a.parquet", "b/a.jsonl.gz", "./a.jsonl", "/nowhere/a.json"])
def test_load_rows_never_looks_up_a_missing_file_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("looked up on the hub"))
    with pytest.raises(InputError, match=f"{path} does not exist"):
        load_rows(path)


def test_load_rows_rejects_other_file_types_and_folders_without_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.xml").write_text("a,b\n")
    for path in ("rows.xml", "./rows"):
        with pytest.raises(InputError, match=r"is not a .jsonl, .ndjson, .json, .csv, .tsv \(also"):
            load_rows(path)
    for path in (str(tmp_path), "."):
        with pytest.raises(InputError, match="is a folder without files of rows"):
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
        ("a.jsonl.gz", gzip.compress(b'{"messages": 1}\n' * 99, mtime=0)[:-9], "cannot be read: Compressed file ended"),
        ("a.parquet", b"plain", "cannot be read: "),
    ],
)
def test_load_rows_rejects_unreadable_files_even_with_skip(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        load_rows(str(tmp_path / name), bad_rows="skip")
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


# `datasets.load_dataset` is replaced: on a local folder it would write a cache into the home folder, and on a hub id it
# needs a network. The replacement returns a real Dataset, with its nulls.
def test_load_rows_passes_a_hub_id_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, dict[str, object]]] = []

    def load_dataset(path: str, name: str | None, **options: object) -> datasets.Dataset:
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
def test_load_rows_reports_a_failed_dataset_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="the dataset 'owner/set' could not be loaded: (no|gone)") as caught:
        load_rows("owner/set")
    assert "\n" not in str(caught.value)


def test_generated_rows_depend_only_on_the_seed() -> None:
    def questions(**options: Any) -> list[str]:
        return [row.messages[0]["content"] for row in load_rows("reasoning_gym:chain_sum", size=20, **options).rows]

    assert questions() == questions(seed=0) == questions()
    assert questions(seed=1) != questions(seed=2)


def test_generated_rows_follow_size_and_task_options() -> None:
    rows = load_rows("reasoning_gym:chain_sum", size=4, task={"min_terms": 5, "max_terms": 5}).rows
    assert [row.where for row in rows] == [f"reasoning_gym:chain_sum[{index}]" for index in range(4)]
    assert all(row.columns["reasoning_gym_entry"]["metadata"]["num_terms"] == 5 for row in rows)
    assert len(load_rows("reasoning_gym:chain_sum").rows) == 1000


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "leg_counting", "spell_backward", "zebra_puzzles"])
def test_generated_rows_have_answers_of_full_marks(task: str) -> None:
    for row in load_rows(f"reasoning_gym:{task}", size=10, seed=3).rows:
        entry = row.columns["reasoning_gym_entry"]
        score = reasoning_gym.get_score_answer_fn(row.columns["reasoning_gym_task"])
        assert score(row.messages[-1]["content"], entry) == 1.0
        assert row.messages[-1] == {"role": "assistant", "content": row.columns["answer"]}
        assert row.prompt == [{"role": "user", "content": entry["question"]}]


def test_generated_rows_without_an_answer_are_prompts() -> None:
    (row,) = load_rows("reasoning_gym:propositional_logic", size=1).rows
    assert [message["role"] for message in row.messages] == ["user"]
    assert row.columns["answer"] is None


def test_importing_sources_loads_no_heavy_library() -> None:
    heavy = ["torch", "datasets", "pyarrow", "reasoning_gym"]
    script = f"import sys, rekatrain.data.sources; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
