"""Data sets of several sources: shares, columns, orders, held-out rows, and the errors of their sections."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekatrain.data.chat import EncodedRow
from rekatrain.data.errors import InputError
from rekatrain.data.mixture import (
    check_dataset,
    default_name,
    held_out_section,
    is_shuffled,
    load_mixture,
    source_paths,
)
from rekatrain.data.rows import Row
from rekatrain.data.sources import load_rows
from rekatrain.data.splits import Split, read_split
from tests.conftest import write_jsonl


def source(path: Path, count: int, **options: Any) -> dict[str, Any]:
    records = [{"prompt": f"{path.stem} {number}", "answer": number, path.stem: number} for number in range(count)]
    return {"path": write_jsonl(path, *records), "format": "prompt_answer", **options}


def texts(section: Any) -> list[str]:
    return [row.messages[0]["content"] for row in load_mixture(section).rows]


def test_mixture_without_weights_uses_each_row_once(tmp_path: Path) -> None:
    first, second = source(tmp_path / "a.jsonl", 3), source(tmp_path / "b.jsonl", 2, source="other")
    mixture = load_mixture([first, second])
    assert [row.messages[0]["content"] for row in mixture.rows] == ["a 0", "a 1", "a 2", "b 0", "b 1"]
    assert [row.source.name for row in mixture.rows] == ["a"] * 3 + ["other"] * 2
    assert texts({"sources": [first, second]}) == texts([first, second]) and mixture.is_shuffled
    assert texts(first) == ["a 0", "a 1", "a 2"] and load_mixture(first).rows[0].source.name == ""


def test_columns_of_one_source_are_none_in_the_others(tmp_path: Path) -> None:
    rows = load_mixture([source(tmp_path / "a.jsonl", 1), source(tmp_path / "b.jsonl", 1)]).rows
    assert [row.columns for row in rows] == [{"a": 0, "answer": "0", "b": None}, {"a": None, "answer": "0", "b": 0}]
    assert [row.source.columns for row in rows] == [{"a", "answer"}, {"b", "answer"}]
    path = write_jsonl(tmp_path / "c.jsonl", {"prompt": "a"}, {"prompt": "b", "gold": 1})
    one = load_mixture({"path": path, "format": "prompt_answer"}).rows
    assert [row.columns for row in one] == [{"gold": None}, {"gold": 1}]


@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), data=st.data())
def test_weights_are_shares_of_the_rows(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    section = [
        source(folder / f"s{number}.jsonl", size, weight=weight)
        for number, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    drawn = texts(section)
    assert drawn == texts(section)
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        counts = [drawn.count(f"s{number} {index}") for index in range(size)]
        assert abs(sum(counts) - sum(sizes) * weight / sum(weights)) <= 1
        assert max(counts) - min(counts) <= 1  # no row is repeated before each of its source is used


def test_order_by_a_column_sorts_all_sources(tmp_path: Path) -> None:
    first, second = source(tmp_path / "a.jsonl", 3), source(tmp_path / "b.jsonl", 2)
    section = {"sources": [second, first], "order": {"by": "answer"}}
    assert texts(section) == ["b 0", "a 0", "b 1", "a 1", "a 2"] and not load_mixture(section).is_shuffled
    assert texts({**first, "order": "as_is"}) == ["a 0", "a 1", "a 2"] and not is_shuffled({**first, "order": "as_is"})
    with pytest.raises(InputError, match=r"b.jsonl:1: order is by 'a', and the row has no such column"):
        texts({"sources": [first, second], "order": {"by": "a"}})


FAULTS = [
    ([], "dataset is an empty list"),
    ({"sources": []}, "dataset.sources is empty"),
    ({"sources": [{"path": "a"}], "path": "b"}, "unknown key dataset.path"),
    ([{"path": "a"}, {"pathh": "b"}], "unknown key dataset.1.pathh: did you mean dataset.1.path"),
    ([{"path": "a", "order": "as_is"}], "unknown key dataset.0.order"),
    ([{"path": "a", "weight": 0}], "dataset.0.weight is 0"),
    ({"path": "a", "order": "sorted"}, "dataset.order is 'sorted'"),
    ({"path": "a", "order": {"of": "b"}}, "dataset.order"),
    ([{"path": "a", "rewards": []}], "dataset.0.rewards is empty"),
    ([{"path": "a", "rewards": ["math"]}], "names 'math', which is no reward of the recipe"),
]


@pytest.mark.parametrize(("section", "problem"), FAULTS)
def test_check_dataset_names_the_wrong_key(section: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check_dataset("dataset", section, ["math_answer"])


def test_load_mixture_rejects_sources_that_cannot_be_mixed(tmp_path: Path) -> None:
    first = source(tmp_path / "a.jsonl", 1)
    with pytest.raises(InputError, match="two sources with the name 'a': give one another name by the key source"):
        texts([first, first])
    with pytest.raises(InputError, match="source a has no weight, and another one has"):
        texts([first, source(tmp_path / "b.jsonl", 1, weight=2.0)])
    with pytest.raises(InputError, match="dataset.weight is for one source of several"):
        texts({**first, "weight": 2.0})
    with pytest.raises(InputError, match=r"dataset.1: .*b.jsonl does not exist"):
        texts([first, {"path": str(tmp_path / "missing" / "b.jsonl")}])


def test_names_and_paths_of_sources() -> None:
    names = ("rows/a.jsonl.gz", "chats/*.jsonl", "reasoning_gym:chain_sum", "openai/gsm8k", "shards/")
    assert [default_name(name) for name in names] == ["a", "chats", "chain_sum", "gsm8k", "shards"]
    assert source_paths([{"path": "a"}, {"path": ["b", "c"]}]) == ["a", "b", "c"]


def test_split_cuts_rows_by_a_hash_of_the_prompt(tmp_path: Path) -> None:
    records = [{"prompt": f"question {number % 500}", "answer": number} for number in range(1000)]
    section = {"path": write_jsonl(tmp_path / "a.jsonl", *records), "format": "prompt_answer"}
    section["split"] = {"eval": 0.1}
    trained = load_mixture(section).rows
    (held_out_part,) = held_out_section({**section, "order": "as_is"}) or []
    assert held_out_part == {**section, "split": {"eval": 0.1, "part": "eval"}}
    held_out = load_mixture([held_out_part]).rows
    assert len(trained) + len(held_out) == 1000 and 60 <= len(held_out) <= 140
    prompts = [{row.messages[0]["content"] for row in rows} for rows in (trained, held_out)]
    assert not prompts[0] & prompts[1] and len(prompts[0]) + len(prompts[1]) == 500
    # Other rows and another order leave a prompt where it is.
    write_jsonl(tmp_path / "a.jsonl", *records[::-2])
    assert {row.messages[0]["content"] for row in load_mixture([held_out_part]).rows} <= prompts[1]
    assert held_out_section({"path": "a", "split": "train"}) is None


def test_split_reads_names_and_rejects_wrong_fractions(tmp_path: Path) -> None:
    assert read_split("test") == Split(of="test") and read_split(None) == Split()
    assert read_split({"of": "test", "eval": 0.5}) == Split(of="test", fraction=0.5)
    for wrong in ({"eval": 0}, {"eval": 1}, {"eval": "a"}, {"evl": 0.1}, {"eval": 0.1, "part": "test"}, {}):
        with pytest.raises(InputError, match=r"split(\.\w+)? (has|must)"):
            read_split(wrong)
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "a"})
    with pytest.raises(InputError, match="no good row in the eval part of its split"):
        load_rows(path, format="prompt_answer", split={"eval": 1e-9, "part": "eval"})
    with pytest.raises(InputError, match="local file: remove split"):
        load_rows(path, format="prompt_answer", split={"of": "train", "eval": 0.1})


def test_split_hashes_the_untrained_ids_of_tokenized_rows() -> None:
    half = Split(fraction=0.5)
    rows = [
        Row(messages=[], tokens=EncodedRow(input_ids=[n, 1, m], labels=[-100, -100, m]))
        for n in range(20)
        for m in (3, 4)
    ]
    parts = [half.holds(row) for row in rows]
    assert parts[::2] == parts[1::2] and len(set(parts)) == 2
