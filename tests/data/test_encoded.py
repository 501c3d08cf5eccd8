"""Encoded rows in Arrow files: equal to those in memory, made once, found again, and made anew after a change."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.encoded import EncodedRows, encode_source
from rekatrain.data.encoded_mixture import encode_mixture
from rekatrain.data.errors import InputError
from rekatrain.data.mixture import load_mixture
from rekatrain.data.sources import open_rows
from rekatrain.data.streaming import stream_mixture
from rekatrain.data.training_rows import encode_rows
from tests.conftest import write_jsonl


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the test works in the folder above it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "rekatrain"


def conversation(number: int) -> dict[str, Any]:
    """Two trained turns; every third conversation has reasoning in its first, and is two rows."""
    first = {"role": "assistant", "content": str(number)}
    if number % 3 == 0:
        first["reasoning_content"] = "Hm."
    turns = [{"role": "user", "content": f"Say {number}"}, first, {"role": "user", "content": "Again"}]
    return {"messages": [*turns, {"role": "assistant", "content": f"{number}!"}], "level": -number}


def write_files() -> None:
    write_jsonl(Path("a.jsonl"), *map(conversation, range(700)), {"messages": [], "level": 0})
    write_jsonl(Path("b.jsonl"), *map(conversation, range(1000, 1100)))


A, B = {"path": "a.jsonl", "bad_rows": "skip"}, {"path": "b.jsonl"}


@pytest.mark.parametrize(
    "section",
    [
        A,
        {**A, "limit": 5},
        [A, B],
        [{**A, "weight": 1}, {**B, "weight": 3}],
        {"sources": [A, B], "order": {"by": "level"}},
        {**A, "order": {"by": "level"}},
    ],
)
def test_encoded_rows_equal_those_in_memory(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    write_files()
    expected = encode_rows(load_mixture(section).rows, tokenizer, 200)
    for _ in range(2):
        rows = encode_mixture(section, tokenizer, 200, {}).rows
        assert list(rows) == expected
    assert [(ids.tolist(), labels.tolist()) for ids, labels in rows.arrays()] == [
        (row.input_ids, row.labels) for row in expected
    ]
    assert rows.lengths().tolist() == [len(row.input_ids) for row in expected]
    assert rows[1] == expected[1] and list(rows[1:3]) == expected[1:3]


def test_rows_left_out_for_length_keep_the_shares(tokenizer: PreTrainedTokenizerFast) -> None:
    def chat(words: int, answer: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": "word " * words}, {"role": "assistant", "content": answer}]
        return {"messages": turns}

    write_jsonl(Path("short.jsonl"), *[chat(1, "S")] * 30)
    write_jsonl(Path("mixed.jsonl"), *[chat(500, "L")] * 45, *[chat(1, "M")] * 10)
    section = [{"path": "short.jsonl", "weight": 1}, {"path": "mixed.jsonl", "weight": 1, "long_rows": "skip"}]
    texts = [tokenizer.decode(row.input_ids) for row in encode_mixture(section, tokenizer, 200, {}).rows]
    assert [sum(text.endswith(f" {name} <sep>") for text in texts) for name in "SM"] == [20, 20]


def test_encoded_rows_are_made_once(
    cache: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    write_files()

    def encode(max_length: int = 200, **keys: Any) -> EncodedRows:
        return encode_mixture({**A, **keys}, tokenizer, max_length, {}).rows

    with caplog.at_level(logging.INFO):
        first = encode()
        messages = list(caplog.messages)
        caplog.clear()
        second = encode()
    assert "encoded in" in messages[-1] and "encoded before" in caplog.messages[-1]
    assert caplog.messages[:-1] == messages[:-1] and "1 bad rows skipped" in messages[0]
    assert first.dataset.cache_files == second.dataset.cache_files
    assert first.dataset._fingerprint == second.dataset._fingerprint

    def num_made() -> int:
        return len(list(cache.glob("*/report.json")))

    assert num_made() == 1
    encode(source="other", rewards=["math_answer"])  # changes no row
    assert num_made() == 1
    encode(max_length=300)
    encode(limit=3)
    assert num_made() == 3
    # the same size, and the same time of modification
    stat = os.stat("a.jsonl")
    text = Path("a.jsonl").read_text().replace("Say 1", "Tell")
    Path("a.jsonl").write_text(text.replace("Tell", "SAY 1"))
    os.utime("a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = encode()
    assert num_made() == 4 and list(changed) != list(first)


def test_encoded_rows_of_a_killed_process_are_made_again(cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_files()
    rows = encode_mixture(B, tokenizer, 200, {}).rows
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    expected = list(rows)
    partial = folder.with_suffix(".partial")
    folder.rename(partial)
    (partial / "report.json").unlink()
    (partial / "rows.arrow").write_bytes(b"half")
    assert list(encode_mixture(B, tokenizer, 200, {}).rows) == expected
    assert not partial.exists()


def test_encoded_rows_report_the_first_bad_row(cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_files()
    with pytest.raises(InputError, match=r"dataset\.1: a\.jsonl:701: messages must be a list with at least one"):
        encode_mixture([B, {"path": "a.jsonl"}], tokenizer, 200, {})
    with pytest.raises(InputError, match="eval_dataset.streaming is true, but these rows are read before"):
        encode_mixture({**B, "streaming": True}, tokenizer, 200, {}, "eval_dataset")
    with pytest.raises(InputError, match="100 of 100 rows are longer than 4 tokens"):
        encode_mixture(B, tokenizer, 4, {})
    with pytest.raises(InputError, match=r"^b\.jsonl:1: order is by 'size', and the row has no such column"):
        encode_mixture({**B, "order": {"by": "size"}}, tokenizer, 200, {})
    assert len(list(cache.glob("*/report.json"))) == 1


def test_encode_source_names_its_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    write_files()
    for _ in range(2):
        source = encode_source(open_rows(**B), B, tokenizer, 200, {})
        assert source.origin.columns == {"level"}
        assert source.counts.tolist() == [2 if number % 3 == 0 else 1 for number in range(1000, 1100)]


def test_streamed_rows_equal_the_encoded_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    write_files()
    section = {"sources": [{**A, "streaming": True}, {**B, "streaming": True}], "order": "as_is"}
    stream, first, contents = stream_mixture(section, tokenizer, 200, {}, seed=0)
    plain = [A, B]
    expected = encode_rows(load_mixture(plain).rows, tokenizer, 200)
    assert [row["input_ids"] for row in stream] == [row.input_ids for row in expected]
    assert first == expected[:100] and json.dumps(contents)
    shuffled, _, _ = stream_mixture(section["sources"], tokenizer, 200, {}, seed=0)
    ids = [row["input_ids"] for row in shuffled]
    assert sorted(ids) == sorted(row.input_ids for row in expected) and ids != [row.input_ids for row in expected]
    weighted = [{**A, "streaming": True, "weight": 1}, {**B, "streaming": True, "weight": 9}]
    mixed = [row["input_ids"] for row in stream_mixture(weighted, tokenizer, 200, {}, seed=0)[0].take(500)]
    of_b = {tuple(row.input_ids) for row in encode_rows(load_mixture(B).rows, tokenizer, 200)}
    assert 0.85 < sum(tuple(row) in of_b for row in mixed) / 500 < 0.95
