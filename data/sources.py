"""Load checked rows from local files, Hugging Face datasets and procedural tasks.

The keys of a recipe's `dataset:` section are the arguments of `load_rows`; `data/README.md` describes them. Errors name
the file and line of a bad row. Nothing is unpickled, and code that comes with a dataset is never run.
"""

import dataclasses
import difflib
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from rekatrain.data.errors import InputError
from rekatrain.data.layouts import LAYOUTS, finish_messages, reasoning_gym_row
from rekatrain.data.preferences import PREFERENCE_LAYOUTS
from rekatrain.data.records import rename_keys
from rekatrain.data.rows import Row
from rekatrain.data.task_layouts import TASK_LAYOUTS

logger = logging.getLogger(__name__)

Format = Literal[
    "messages",
    "prompt_answer",
    "sharegpt",
    "alpaca",
    "gsm8k",
    "mbpp",
    "humaneval",
    "svamp",
    "multiple_choice",
    "fill_in",
    "preference",
    "alpaca_preference",
    "hh",
]
BadRows = Literal["refuse", "skip"]
ForgedTurns = Literal["refuse", "neutralize"]

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
PROCEDURAL_PREFIX = "reasoning_gym:"

# The origin of a record ("train.jsonl:17") and the record: a parsed value, or the unparsed bytes of a .jsonl line.
Located = tuple[str, Any]


@dataclass(frozen=True, kw_only=True)
class LoadedRows:
    """Result of `load_rows`.

    rows:    the good rows, in the order of the source
    skipped: one message per bad row, such as "train.jsonl:17: prompt is empty"
    """

    rows: list[Row]
    skipped: list[str]


def load_rows(
    path: str,
    *,
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    system: str | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "refuse",
    forged_turns: ForgedTurns = "refuse",
    size: int | None = None,
    seed: int | None = None,
    task: Mapping[str, Any] | None = None,  # Any: each reasoning_gym task has its own options
) -> LoadedRows:
    """Load and check the rows of a local file, a Hugging Face dataset or a reasoning_gym task.

    path:         a .jsonl, .jsonl.gz, .json or .parquet file; `reasoning_gym:<task>`; otherwise a dataset of the hub
    format:       layout of a file's or a dataset's records; None means messages
    columns:      mapping from our key to the key in the file or dataset
    name, split, revision: arguments of `datasets.load_dataset`, for a dataset; split None means train
    system:       text of a system message for rows that have none
    limit:        number of good rows to load; None loads all
    bad_rows:     "refuse" raises InputError for the first bad row; "skip" leaves bad rows out and logs a warning
    forged_turns: "refuse" makes a row with a literal `<sep>` a bad row; "neutralize" breaks the `<sep>` by a space
    size, seed, task: number of rows (None means 1000), seed (None means 0) and options of a reasoning_gym task

    Raises InputError where an option does not apply to the kind of path, where the source cannot be read, and where no
    good row is left.
    """
    _check_choice("format", format or "messages", get_args(Format))
    _check_choice("bad_rows", bad_rows, get_args(BadRows))
    _check_choice("forged_turns", forged_turns, get_args(ForgedTurns))
    _check_count("limit", limit)
    _check_count("size", size)
    _check_count("seed", seed, at_least=0)
    if system is not None and not system.strip():
        raise InputError("system is empty: write a text, or remove it")
    if columns is not None and not all(isinstance(key, str) for key in (*columns.keys(), *columns.values())):
        raise InputError(f"columns must map our keys to keys of the file, all of them text, but it is {dict(columns)}")

    for_dataset: dict[str, object] = {"name": name, "split": split, "revision": revision}
    for_layout: dict[str, object] = {"format": format, "columns": columns}
    for_task: dict[str, object] = {"size": size, "seed": seed, "task": task}
    if path.startswith(PROCEDURAL_PREFIX):
        _reject_options(path, "a procedural task", for_dataset | for_layout)
        records: Iterator[Located] = _generate_entries(path, size or 1000, seed or 0, task or {})
        to_row: Callable[[Any], Row] = partial(reasoning_gym_row, path.removeprefix(PROCEDURAL_PREFIX))
    else:
        if path.startswith((".", "/", "~")) or path.endswith(FILE_SUFFIXES) or Path(path).is_file():
            _reject_options(path, "a local file", for_dataset | for_task)
            records = _read_file(path)
        else:
            _reject_options(path, "a Hugging Face dataset", for_task)
            records = _read_dataset(path, name, split or "train", revision)
        to_row = partial(_lay_out, (LAYOUTS | TASK_LAYOUTS | PREFERENCE_LAYOUTS)[format or "messages"], columns or {})

    rows: list[Row] = []
    skipped: list[str] = []
    for where, record in records:
        try:
            row = to_row(record)
            finish = partial(finish_messages, system=system, neutralize=forged_turns == "neutralize")
            messages, rejected = finish(row.messages), row.rejected and finish(row.rejected)
        except InputError as error:
            message = f"{where}: {error}"
            if bad_rows == "refuse":
                raise InputError(message) from error
            skipped.append(message)
            continue
        rows.append(dataclasses.replace(row, messages=messages, rejected=rejected, where=where))
        if len(rows) == limit:
            break
    if skipped:
        logger.warning("%s: %d bad rows skipped; the first: %s", path, len(skipped), skipped[0])
    if not rows:
        raise InputError(f"{path} has no good row" + (f"; the first bad one: {skipped[0]}" if skipped else ""))
    return LoadedRows(rows=rows, skipped=skipped)


def _lay_out(layout: Callable[[Mapping[str, Any]], Row], columns: Mapping[str, str], record: object) -> Row:
    if isinstance(record, bytes):
        record = _parse_json(record)
    if not isinstance(record, dict):
        raise InputError(f"a row must be a JSON object, not {type(record).__name__}")
    return layout(rename_keys(record, columns))


def _read_file(path: str) -> Iterator[Located]:
    file = Path(path).expanduser()
    if not path.endswith(FILE_SUFFIXES):
        raise InputError(f"{path} is not a {', '.join(FILE_SUFFIXES)} file")
    if not file.is_file():
        raise InputError(f"{path} does not exist or is not a file; a relative path starts at {Path.cwd()}")
    read = _read_parquet if path.endswith(".parquet") else _read_json if path.endswith(".json") else _read_lines
    try:
        for number, record in read(file):
            yield f"{path}:{number}", record
    # gzip raises the last two for a damaged file; the errors of pyarrow and of decoders are ValueErrors.
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {_first_line(error)}") from error


def _read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    # Read as bytes: a badly encoded line is then one bad row, and only a line feed ends a line.
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _read_json(file: Path) -> Iterable[tuple[int, object]]:
    records = _parse_json(file.read_bytes())
    if not isinstance(records, list):
        raise InputError(
            f"it must hold a list of rows, not {type(records).__name__}; a file with one row per line is .jsonl"
        )
    return enumerate(records, start=1)


def _read_parquet(file: Path) -> Iterator[tuple[int, object]]:
    # Imported here, as are datasets and reasoning_gym below: importing `data` must stay fast and free of torch.
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        records = (record for batch in table.iter_batches() for record in batch.to_pylist())
        yield from enumerate(records, start=1)


def _parse_json(text: bytes) -> object:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        # The parser counts lines within its text, so its line 1 would contradict the line number in the file.
        raise InputError(f"it is not valid JSON: {str(error).replace('line 1 ', '')}") from error


def _read_dataset(path: str, name: str | None, split: str, revision: str | None) -> Iterator[Located]:
    import datasets

    try:
        dataset = datasets.load_dataset(path, name, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"the dataset {path!r} could not be loaded: {_first_line(error)}") from error
    for number, record in enumerate(dataset, start=1):
        yield f"{path}:{number}", record


def _generate_entries(path: str, size: int, seed: int, options: Mapping[str, Any]) -> Iterator[Located]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task = path.removeprefix(PROCEDURAL_PREFIX)
    _check_choice("reasoning_gym task", task, sorted(DATASETS))
    _, config = DATASETS[task]
    known = [field.name for field in dataclasses.fields(config) if field.name not in ("size", "seed")]
    for option in options:
        if option in ("size", "seed"):
            raise InputError(f"task: {option} is a key of the dataset section: write it beside task, not inside it")
        _check_choice(f"option of the reasoning_gym task {task}", option, known)
    try:
        entries = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:  # each task has its own checks
        raise InputError(f"{path} does not accept task: {dict(options)}: {_first_line(error)}") from error
    for index in range(size):
        yield f"{path}[{index}]", entries[index]


def _reject_options(path: str, kind: str, options: Mapping[str, object]) -> None:
    names = [key for key, value in options.items() if value is not None]
    if names:
        raise InputError(f"{path} is {kind}: remove {', '.join(names)}, which cannot apply to it")


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "there are none"
        raise InputError(f"{key} {value!r} is not known; {hint}")


def _check_count(key: str, value: object, at_least: int = 1) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < at_least):
        raise InputError(f"{key} must be a whole number of at least {at_least}, not {value!r}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
