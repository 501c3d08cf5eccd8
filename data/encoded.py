"""Encoded rows in memory-mapped Arrow files: made once, shared by all processes of a node and by later runs.

The files lie in the cache of `datasets` (`HF_DATASETS_CACHE`), in the folder `rekatrain/FINGERPRINT`. The fingerprint
is of all that the rows follow from: the recipe's section, the files with their sizes and times, the tokenizer, the
options of encoding and the code of this package. A folder may be deleted: the next run makes it again.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import EncodedRow
from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row, Source
from rekatrain.data.stream import RowStream, log_report
from rekatrain.data.training_rows import RowEncoder

if TYPE_CHECKING:  # importing it takes a second
    import datasets

logger = logging.getLogger(__name__)

ROWS, REPORT = "rows.arrow", "report.json"
# Rows that are in memory while a file is written.
WRITTEN_AT_ONCE = 512


class EncodedRows(Sequence[EncodedRow]):
    """Rows of an Arrow file; one that is read is the only one in memory."""

    def __init__(self, dataset: "datasets.Dataset") -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> "EncodedRows": ...
    def __getitem__(self, index: int | slice) -> "EncodedRow | EncodedRows":
        if isinstance(index, slice):
            return EncodedRows(self.dataset.select(range(*index.indices(len(self)))))
        row = self.dataset[index]
        return EncodedRow(input_ids=row["input_ids"], labels=row["labels"])

    def __iter__(self) -> Iterator[EncodedRow]:
        for row in self.dataset:
            yield EncodedRow(input_ids=row["input_ids"], labels=row["labels"])

    def arrays(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the ids and the labels of each row, [L] each, int32."""
        for batch in self.dataset.with_format("arrow").iter(WRITTEN_AT_ONCE):
            parts = [_split(batch.column(name).combine_chunks()) for name in ("input_ids", "labels")]
            yield from zip(*parts, strict=True)

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row, [N]."""
        batches = self.dataset.select_columns("input_ids").with_format("arrow").iter(WRITTEN_AT_ONCE)
        lengths = [batch.column(0).combine_chunks().value_lengths().to_numpy() for batch in batches]
        return np.concatenate(lengths).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class EncodedSource:
    """The encoded rows of a source.

    rows:    of all its conversations
    counts:  number of rows of each conversation, [C]; 0 for one that was left out
    keys:    value of the column by which the data set is ordered, of each conversation; empty without such an order
    origin:  the source
    """

    rows: EncodedRows
    counts: np.ndarray
    keys: list[Any]
    origin: Source


def encode_source(
    stream: RowStream,
    section: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: Mapping[str, Any],
    *,
    by: str | None = None,
) -> EncodedSource:
    """Return the encoded rows of a source; one process makes their files, and the others wait for them.

    section: keywords of `open_rows`, of which `stream` is made
    by:      column by which the data set is ordered
    Raises InputError as the stream and `RowEncoder` do.
    """
    from datasets import config

    # What a source gives to a mixture changes no row.
    kept = {key: value for key, value in section.items() if key not in ("weight", "rewards", "source")}
    parts = [kept, _contents(stream), _tokenizer_print(tokenizer), max_length, dict(chat), by, _code_print()]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]
    folder = Path(config.HF_DATASETS_CACHE) / "rekatrain" / fingerprint
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        is_new = not (folder / REPORT).exists()
        if is_new:
            started = time.monotonic()
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            shutil.rmtree(folder, ignore_errors=True)
            partial.mkdir()
            _write(partial, stream, RowEncoder(tokenizer, max_length, **chat), by)
            partial.replace(folder)
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    stream.origin.columns.update(report["columns"])
    log_report((level, message) for level, message in report["messages"])
    rows = _open(folder / ROWS, fingerprint)
    seconds = f"encoded in {time.monotonic() - started:.1f} s" if is_new else "encoded before"
    logger.info("%s: %d rows, %s (%s)", stream.title, len(rows), seconds, folder)
    return EncodedSource(
        rows=EncodedRows(rows),
        counts=np.load(folder / "counts.npy"),
        keys=json.loads((folder / "keys.json").read_text(encoding="utf-8")),
        origin=stream.origin,
    )


def _contents(stream: RowStream) -> list[object]:
    return [stream.contents(), stream.overlap.contents() if stream.overlap else None]


def _write(folder: Path, stream: RowStream, encoder: RowEncoder, by: str | None) -> None:
    """Write the files of a source, and at last the report."""
    import pyarrow as pa
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    keys: list[Any] = []

    def with_keys() -> Iterator[Row]:
        for row in stream:
            if by is not None:
                if row.columns.get(by) is None:
                    raise InputError(f"{row.where}: order is by {by!r}, and the row has no such column")
                keys.append(row.columns[by])
            yield row

    counts: list[int] = []

    def rows() -> Iterator[EncodedRow]:
        for made in encoder.encode(with_keys()):
            counts.append(len(made))
            yield from made

    ids_of = pa.list_(pa.int32())
    features = Features({name: List(Value("int32")) for name in ("input_ids", "labels")})
    with ArrowWriter(path=str(folder / ROWS), features=features) as writer:
        remaining = rows()
        while batch := list(islice(remaining, WRITTEN_AT_ONCE)):
            columns = ([row.input_ids for row in batch], [row.labels for row in batch])
            writer.write_table(pa.table([pa.array(one, ids_of) for one in columns], ["input_ids", "labels"]))
        writer.finalize()
    np.save(folder / "counts.npy", np.array(counts, dtype=np.int32))
    (folder / "keys.json").write_text(json.dumps(keys), encoding="utf-8")
    messages = [*stream.report(), *encoder.report()]
    report = {"columns": sorted(stream.origin.columns), "messages": messages}
    (folder / REPORT).write_text(json.dumps(report), encoding="utf-8")


def _open(path: Path, fingerprint: str) -> "datasets.Dataset":
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=fingerprint)


def _split(lists: Any) -> list[np.ndarray]:  # Any: a pyarrow.ListArray
    values = lists.flatten().to_numpy()
    lengths = lists.value_lengths().to_numpy()
    return np.split(values, np.cumsum(lengths)[:-1])


def _tokenizer_print(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of all that decides the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{text} {tokenizer.eos_token_id}".encode()).hexdigest()


def _code_print() -> str:
    """Return the hash of the code that reads and encodes rows."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def expand(counts: np.ndarray, conversations: Iterable[int]) -> np.ndarray:
    """Return the indices of the rows of some conversations, in their order.

    >>> expand(np.array([2, 0, 1]), [2, 0]).tolist()
    [2, 0, 1]
    """
    chosen = np.fromiter(conversations, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])[chosen]
    lengths = counts[chosen]
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + offsets
