"""Read the records of local files: JSON, JSON Lines, CSV and Parquet, plain or compressed, alone or many.

Each reader keeps what the file says: a missing key stays missing, and the cells of a CSV file stay text. (The builders
of `datasets` would unify the types of a column, and write a null for each missing key.)
"""

import csv
import glob
import gzip
import hashlib
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from rekatrain.data.errors import InputError, first_line
from rekatrain.data.json_values import parse_json, table_value

PLAIN_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".zst")
TABLE_SUFFIXES = (".parquet", ".arrow")
FILE_SUFFIXES = (
    *PLAIN_SUFFIXES,
    *TABLE_SUFFIXES,
    *(kind + packed for kind in PLAIN_SUFFIXES for packed in COMPRESSIONS),
)
# A folder with such a file would be read in part.
UNREAD_SUFFIXES = tuple(
    kind + packed for kind in PLAIN_SUFFIXES for packed in (".bz2", ".xz", ".lz4", ".lzma", ".zip", ".br", ".7z")
)
KINDS = f"{', '.join(PLAIN_SUFFIXES)} (also with .gz or .zst), {' or '.join(TABLE_SUFFIXES)} file"
PATH_STARTS = (".", "/", "~")
# Of the start and of the end of a file.
SAMPLE_BYTES = 2**20
# Keys under which a JSON object holds its rows.
LIST_KEYS = ("data", "rows", "examples", "instances", "items")
_GLOB = re.compile(r"[*?\[]")
_SPLITS = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")

# The origin of a record ("train.jsonl:17"), and the record: a parsed value, or the error of a bad one.
Located = tuple[str, Any]


def is_local(path: str) -> bool:
    """Return True if a path names local files: it has their suffix, begins as a path does, exists, or has wildcards."""
    return (
        path.startswith(PATH_STARTS)
        or path.lower().endswith(FILE_SUFFIXES)
        or _GLOB.search(path) is not None
        or Path(path).exists()
    )


def find_files(path: str) -> list[str]:
    """Return the files that a path names: a file, all files of a folder, or the matches of a pattern, sorted.

    Raises InputError for a path without a file that can be read, and for a folder with files of several splits.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if (place / "state.json").is_file():  # of `save_to_disk`; the order of its shards is that of their names
            return sorted(str(file) for file in place.glob("*.arrow"))
        files = sorted(str(file) for file in place.rglob("*") if _is_rows(file, place))
        packed = [str(file) for file in place.rglob("*") if file.name.lower().endswith(UNREAD_SUFFIXES)]
        if packed:
            raise InputError(
                f"{path} has files that cannot be read, such as {packed[0]}: unpack them, or move them away"
            )
        if not files:
            raise InputError(f"{path} is a folder without files of rows: no {KINDS}")
        splits = {match[1] for file in files if (match := _SPLITS.search(str(Path(file).relative_to(place)).lower()))}
        if len(splits) > 1:
            raise InputError(
                f"{path} is a folder with files of several splits ({', '.join(sorted(splits))}): name the files of "
                f"one, such as {path.rstrip('/')}/*{sorted(splits)[0]}*"
            )
        return files
    if not place.exists() and _GLOB.search(path):
        matches = sorted(glob.glob(str(place), recursive=True))
        if not matches:
            raise InputError(f"no file matches {path}; a relative path starts at {Path.cwd()}")
        return [file for match in matches for file in find_files(match)]
    if not path.lower().endswith(FILE_SUFFIXES):
        raise InputError(f"{path} is not a {KINDS}")
    if not place.is_file():
        raise InputError(f"{path} does not exist or is not a file; a relative path starts at {Path.cwd()}")
    return [path]


def read_file(path: str) -> Iterator[Located]:
    """Yield the records of one file, each with its origin. Raise InputError for a file that cannot be read."""
    plain = path.lower().removesuffix(".gz").removesuffix(".zst")
    kind = Path(plain).suffix
    read = READERS.get(kind, _read_lines)
    try:
        for number, record in read(Path(path).expanduser()):
            yield f"{path}:{number}", record
    # gzip raises the last two for a damaged file; the errors of pyarrow and of decoders are ValueErrors.
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def stat_files(files: Sequence[str]) -> list[list[object]]:
    """Return what changes with a file's content: its size, its place on the disk and its times, in nanoseconds."""
    stats = [(Path(file).expanduser().resolve(), Path(file).expanduser().stat()) for file in files]
    return [[str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]


def sample_files(files: Sequence[str]) -> list[list[object]]:
    """Return the name, the size and a hash of the start and the end of each file, which a copy has too."""
    samples: list[list[object]] = []
    for path in (Path(file).expanduser() for file in files):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read())
        samples.append([path.name, size, digest.hexdigest()])
    return samples


def _is_rows(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.name.lower().endswith(FILE_SUFFIXES) and not is_hidden and file.is_file()


def _open(file: Path) -> BinaryIO:
    if file.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(file))
    if file.suffix.lower() == ".zst":
        # Imported here, as below: importing `data` must stay fast.
        from pyarrow import input_stream

        return io.BufferedReader(input_stream(file, compression="zstd"))
    return file.open("rb")


def _read_lines(file: Path) -> Iterator[tuple[int, object]]:
    if (records := _whole_list(file)) is not None:
        yield from enumerate(records, start=1)
        return
    # Read as bytes: a badly encoded line is then one bad row, and only a line feed ends a line.
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, parse_json(line)


def _whole_list(file: Path) -> list[object] | None:
    """Return the rows of a file that is one JSON list in spite of its name, or None."""
    with _open(file) as lines:
        first = next((line for line in lines if line.strip()), b"")
        if not first.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"["):
            return None
        records = parse_json(first + lines.read())
    return records if _holds_rows(records) else None  # type: ignore[return-value]  # a list


def _holds_rows(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(record, dict) for record in value)


def _read_json(file: Path) -> Iterator[tuple[int, object]]:
    with _open(file) as opened:
        text = opened.read()
    records = parse_json(text)
    if isinstance(records, InputError):
        first = parse_json(text.lstrip().partition(b"\n")[0])
        if isinstance(first, dict):  # JSON Lines in a file with the name of JSON
            yield from _read_lines(file)
            return
        raise records
    if isinstance(records, dict):
        rows = [key for key, value in records.items() if _holds_rows(value)]
        if len(rows) > 1:
            raise InputError(f"it holds lists of rows under {' and '.join(rows)}: write each as a separate file")
        lists = [records[key] for key in LIST_KEYS if isinstance(records.get(key), list)]
        records = lists[0] if len(lists) == 1 else records
    if not isinstance(records, list):
        raise InputError(
            f"it must hold a list of rows, not {type(records).__name__}; a file with one row per line is .jsonl"
        )
    yield from enumerate(records, start=1)


def _read_csv(file: Path) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is shorter than some conversations
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(lines, [])]
        if header and not header[0]:  # of the index that pandas writes
            header[0] = "index"
        if len(set(header)) < len(header) or not all(header):
            raise InputError(f"its first line must name each column once, but it is {header}")
        number = lines.line_num + 1
        for cells in lines:
            if cells and len(cells) != len(header):
                yield number, InputError(f"it has {len(cells)} cells, and the first line names {len(header)} columns")
            elif cells:
                yield number, {key: cell if cell else None for key, cell in zip(header, cells, strict=True)}
            number = lines.line_num + 1


def _read_parquet(file: Path) -> Iterator[tuple[int, object]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        records = (table_value(record) for batch in table.iter_batches() for record in batch.to_pylist())
        yield from enumerate(records, start=1)


def _read_arrow(file: Path) -> Iterator[tuple[int, object]]:
    from pyarrow import ipc, memory_map

    with memory_map(str(file)) as mapped, ipc.open_stream(mapped) as batches:
        records = (table_value(record) for batch in batches for record in batch.to_pylist())
        yield from enumerate(records, start=1)


READERS: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
