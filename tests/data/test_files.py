"""Local files: every type, packed or many at once, gives the rows that it holds, with their origin."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset

from rekatrain.data.errors import InputError
from rekatrain.data.sources import load_rows
from tests.conftest import write_jsonl

RECORDS = [{"prompt": "2+2?", "answer": "4", "level": "007"}, {"prompt": 'a, "b"\nc', "answer": "x" * 200_000}]


def as_jsonl(records: list[dict[str, str]]) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


def as_csv(delimiter: str) -> Callable[[list[dict[str, str]]], bytes]:
    def write(records: list[dict[str, str]]) -> bytes:
        quoted = [['"' + record.get(key, "").replace('"', '""') + '"' for key in records[0]] for record in records]
        return "\r\n".join(delimiter.join(cells) for cells in [list(records[0]), *quoted]).encode("utf-8-sig")

    return write


WRITERS = {
    "a.jsonl": as_jsonl,
    "a.ndjson": as_jsonl,
    "a.json": lambda records: json.dumps(records, indent=1).encode(),
    "lines.json": as_jsonl,
    "list.jsonl": lambda records: json.dumps(records, indent=1).encode(),
    "data.json": lambda records: json.dumps({"version": 1, "data": records}).encode(),
    "a.csv": as_csv(","),
    "a.tsv": as_csv("\t"),
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("name", "write"), WRITERS.items(), ids=WRITERS)
def test_file_types_give_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[list[dict[str, str]]], bytes], packed: str
) -> None:
    path, content = tmp_path / f"{name}{packed}", write(RECORDS)
    if packed == ".zst":
        with pyarrow.output_stream(path, compression="zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content) if packed else content)
    rows = load_rows(str(path), format="prompt_answer").rows
    assert [row.messages[0]["content"] for row in rows] == [record["prompt"] for record in RECORDS]
    assert rows[0].columns == {"answer": "4", "level": "007"}
    assert [row.columns.get("level") for row in rows] == ["007", None]
    starts = [2, 3] if name.endswith("sv") else [1, 2]
    assert [row.where for row in rows] == [f"{path}:{start}" for start in starts]


def test_csv_rows_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer\n"a\nb",1\n\nc\nd,2\n')
    loaded = load_rows(str(path), format="prompt_answer", bad_rows="skip")
    assert [row.where for row in loaded.rows] == [f"{path}:2", f"{path}:6"]
    assert loaded.skipped == [f"{path}:5: it has 1 cells, and the first line names 2 columns"]


def test_csv_of_pandas_has_its_index_as_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt\n0,a\n1,b\n")
    rows = load_rows(str(tmp_path / "a.csv"), format="prompt_answer").rows
    assert [(row.messages[0]["content"], row.columns) for row in rows] == [("a", {"index": "0"}), ("b", {"index": "1"})]


def test_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    Dataset.from_list([{"prompt": text, "answer": None} for text in "abc"]).save_to_disk(folder, num_shards=2)
    rows = load_rows(str(folder), format="prompt_answer").rows
    assert [row.messages[0]["content"] for row in rows] == ["a", "b", "c"]
    assert rows[2].where == f"{folder}/data-00001-of-00002.arrow:1"


def test_csv_with_two_columns_of_one_name_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(InputError, match="must name each column once, but it is"):
        load_rows(str(tmp_path / "a.csv"), format="prompt_answer")


def test_many_files_are_read_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("shards/train-2.jsonl", "shards/more/train-1.jsonl", "b.jsonl", "shards/.hidden.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(Path(name), {"prompt": name})
    Path("shards/README.md").write_text("not rows")

    def where(path: str | list[str]) -> list[str]:
        return [row.where for row in load_rows(path, format="prompt_answer").rows]

    shards = ["shards/more/train-1.jsonl:1", "shards/train-2.jsonl:1"]
    assert where("shards") == where("shards/") == where("shards/**/*.jsonl") == shards
    assert where("./shards/*.jsonl") == [shards[1]]
    assert where(["b.jsonl", "shards"]) == ["b.jsonl:1", *shards]
    with pytest.raises(InputError, match="no file matches shards/a"):
        where("shards/a*.jsonl")
    with pytest.raises(InputError, match="owner/set is no local file"):
        where(["b.jsonl", "owner/set"])
    with pytest.raises(InputError, match="local file: remove split"):
        load_rows("shards", split="train")


def test_folder_with_several_splits_is_rejected(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "test.jsonl"):
        write_jsonl(tmp_path / name, {"prompt": name})
    with pytest.raises(InputError, match=r"several splits \(test, train\): name the files of one"):
        load_rows(str(tmp_path), format="prompt_answer")
    assert len(load_rows(f"{tmp_path}/train*", format="prompt_answer").rows) == 1


def test_list_of_other_values_in_jsonl_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[1]\n{"prompt": "a"}\n')
    loaded = load_rows(str(tmp_path / "a.jsonl"), format="prompt_answer", bad_rows="skip")
    assert [row.where[-2:] for row in loaded.rows] == [":2"]
    assert loaded.skipped == [f"{tmp_path}/a.jsonl:1: a row must be a JSON object, not list"]
