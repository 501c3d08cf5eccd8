"""Load checked rows from local files, Hugging Face datasets and procedural tasks.

The keys of a recipe's `dataset:` section are the arguments of `load_rows`; `data/README.md` describes them. Errors name
the file and line of a bad row. Nothing is unpickled, and code that comes with a dataset is never run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from importlib.metadata import version
from typing import Any, ParamSpec, get_args

from rekatrain.data.errors import InputError, first_line
from rekatrain.data.files import Located, find_files, is_local, read_file, sample_files, stat_files
from rekatrain.data.filters import check_only
from rekatrain.data.finish import FinishOptions, ForgedTurns
from rekatrain.data.formats import TURN_FORMATS, Format, lay_out
from rekatrain.data.json_values import table_value
from rekatrain.data.layouts import reasoning_gym_row
from rekatrain.data.oasst import read_threads
from rekatrain.data.overlap import make_overlap
from rekatrain.data.procedural import PROCEDURAL_PREFIX, check_choice, generate_entries
from rekatrain.data.ranges import PositiveWeight
from rekatrain.data.rewardbench import read_preferences
from rekatrain.data.rows import BadRows, LongRows, Row, Source
from rekatrain.data.splits import read_split
from rekatrain.data.stream import RowStream, log_report
from rekatrain.data.tool_text import ToolTurns
from rekatrain.data.turns import OUR_ROLES, OUR_TURN_KEYS, TurnOptions

Options = ParamSpec("Options")


@dataclass(frozen=True, kw_only=True)
class LoadedRows:
    """Result of `load_rows`.

    rows:    the good rows, in the order of the source
    skipped: one message per bad row, such as "train.jsonl:17: prompt is empty"
    """

    rows: list[Row]
    skipped: list[str]


def open_rows(
    path: str | list[str],
    *,
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    turn_keys: Mapping[str, str | None] | None = None,
    tool_turns: ToolTurns | None = None,
    reasoning_tags: list[str] | None = None,
    name: str | None = None,
    split: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    system: str | None = None,
    only: Mapping[str, Any] | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "refuse",
    long_rows: LongRows | None = None,
    forged_turns: ForgedTurns = "refuse",
    size: int | None = None,
    seed: int | None = None,
    source: str | None = None,
    weight: PositiveWeight | None = None,
    rewards: list[str] | None = None,
    task: Mapping[str, Any] | None = None,  # Any: each reasoning_gym task has its own options
    streaming: bool = False,
    overlap: dict[str, Any] | None = None,  # Any: `with` holds sections of data sets
) -> RowStream:
    """Open the rows of local files, a Hugging Face dataset or a reasoning_gym task.

    path:         a file, a folder, a pattern such as `data/*.jsonl.zst`, or a list of those (`files.FILE_SUFFIXES`);
                  `reasoning_gym:<task>`; otherwise a dataset of the hub
    format:       layout of a file's or a dataset's records; None means messages
    columns:      mapping from our key to the key in the file or dataset
    roles:        mapping from a role in the file to ours: system, user, assistant, tool, tool_call
    turn_keys:    mapping from a key of the file's turns to ours, or to None, which leaves the key out
    tool_turns:   "refuse" (None means this) makes a row with tool turns a bad row; "literal" writes them as text
    reasoning_tags: opening and closing tag of the reasoning in an answer, and optionally those of the answer after it
    name, split, revision: arguments of `datasets.load_dataset`, for a dataset; split None means train. A mapping as
                  split, `{eval: 0.02}`, leaves out that fraction of the prompts (`data/splits.py`)
    system:       text of a system message for rows that have none
    only:         mapping from a column to the value, the values or the range of the rows to keep (`data/filters.py`)
    limit:        number of good rows to load; None loads all
    bad_rows:     "refuse" raises InputError for the first bad row; "skip" leaves bad rows out and logs a warning
    long_rows:    what the stage does with a row that is too long: "refuse", "skip" or "truncate" at a turn's end; None
                  means as bad_rows
    forged_turns: "refuse" makes a row with a literal `<sep>` a bad row; "neutralize" breaks the `<sep>` by a space
    source:       name of the source in metrics, which have none without it
    weight, rewards: share of the rows in a mixture, and the rewards that judge its rows (`data/mixture.py`)
    overlap:      finds prompts that other data sets hold too, and leaves them out or reports them (`data/overlap.py`)
    streaming:    rows are read while stage sft trains, and not before; the other commands reject it
    size, seed, task: number of rows (None means 1000), seed (None means 0) and options of a reasoning_gym task

    The rows are read and checked as the stream is iterated. Raises InputError where an option does not apply to the
    kind of path; the stream raises it where the source cannot be read, and where no good row is left.
    """
    check_choice("format", format or "messages", get_args(Format))
    check_choice("bad_rows", bad_rows, get_args(BadRows))
    check_choice("long_rows", long_rows or "refuse", get_args(LongRows))
    check_choice("forged_turns", forged_turns, get_args(ForgedTurns))
    check_choice("tool_turns", tool_turns or "refuse", get_args(ToolTurns))
    _check_count("limit", limit)
    _check_count("size", size)
    _check_count("seed", seed, at_least=0)
    _check_texts(system, columns, roles, reasoning_tags)
    check_only(only or {})
    for key, ours in (turn_keys or {}).items():
        if ours is not None:
            check_choice(f"turn_keys: {key}:", ours, OUR_TURN_KEYS)

    title = path if isinstance(path, str) else ", ".join(path)
    cut = read_split(split)
    for_dataset: dict[str, object] = {"name": name, "split": cut.of, "revision": revision}
    for_turns: dict[str, object] = {"roles": roles, "turn_keys": turn_keys, "tool_turns": tool_turns}
    for_layout: dict[str, object] = {"format": format, "columns": columns, **for_turns}
    for_task: dict[str, object] = {"size": size, "seed": seed, "task": task}
    if not path:
        raise InputError("path is empty: name a file, a folder, a dataset or a reasoning_gym task")
    if isinstance(path, str) and path.startswith(PROCEDURAL_PREFIX):
        _reject_options(title, "a procedural task", for_dataset | for_layout)
        records: Iterator[Located] = generate_entries(path, size or 1000, seed or 0, task or {})
        contents: Callable[[], object] = partial(version, "reasoning-gym")
        to_row: Callable[[Any], Row] = partial(reasoning_gym_row, path.removeprefix(PROCEDURAL_PREFIX))
    else:
        if isinstance(path, str) and not is_local(path):
            _reject_options(title, "a Hugging Face dataset", for_task)
            dataset = _open_dataset(path, name, cut.of or "train", revision, streaming=streaming)
            records = ((f"{path}:{number}", table_value(record)) for number, record in enumerate(dataset, start=1))
            contents = partial(getattr, dataset, "_fingerprint", None)
        else:
            _reject_options(title, "a local file", for_dataset | for_task)
            files = _find_files([path] if isinstance(path, str) else path)
            records = (located for file in files for located in read_file(file))
            contents = partial(sample_files if streaming else stat_files, files)
        layout = format or "messages"
        if layout not in TURN_FORMATS:
            _reject_options(f"format {layout}", "a format without turns", for_turns)
        if layout == "oasst":
            records = read_threads(records)
        if layout == "rewardbench":
            records = read_preferences(records)
        turns = TurnOptions(roles=roles or {}, turn_keys=turn_keys or {}, tool_turns=tool_turns or "refuse")
        to_row = partial(lay_out, layout, columns or {}, turns)

    origin = Source(
        name=source or "",
        bad_rows=bad_rows,
        long_rows=long_rows or bad_rows,
        weight=weight,
        rewards=None if rewards is None else tuple(rewards),
    )
    compared = None if overlap is None else make_overlap(overlap, open_rows)
    return RowStream(
        title=title,
        records=records,
        to_row=to_row,
        origin=origin,
        finishing=FinishOptions(system=system, forged_turns=forged_turns, reasoning_tags=reasoning_tags),
        only=only or {},
        cut=cut,
        limit=limit,
        contents=contents,
        overlap=compared,
    )


def _loaded(opened: Callable[Options, RowStream]) -> Callable[Options, LoadedRows]:
    @wraps(opened)
    def load(*arguments: Options.args, **keywords: Options.kwargs) -> LoadedRows:
        if keywords.get("streaming"):
            raise InputError("streaming is for the dataset of stage sft: remove it")
        stream = opened(*arguments, **keywords)
        rows = list(stream)
        log_report(stream.report())
        return LoadedRows(rows=rows, skipped=stream.skipped)

    return load


# Loads all rows of `open_rows` into memory.
load_rows = _loaded(open_rows)


def _find_files(paths: Sequence[str]) -> list[str]:
    for path in paths:
        if not is_local(path):
            raise InputError(f"{path} is no local file: a list under path holds files, folders and patterns alone")
    return [file for path in paths for file in find_files(path)]


def _check_texts(
    system: str | None,
    columns: Mapping[str, str] | None,
    roles: Mapping[str, str] | None,
    reasoning_tags: Sequence[str] | None,
) -> None:
    if system is not None and not system.strip():
        raise InputError("system is empty: write a text, or remove it")
    if columns is not None and not all(isinstance(key, str) for key in (*columns.keys(), *columns.values())):
        raise InputError(f"columns must map our keys to keys of the file, all of them text, but it is {dict(columns)}")
    for role, ours in (roles or {}).items():
        if ours not in OUR_ROLES:
            raise InputError(
                f"roles maps {role!r} to {ours!r}, which is not one of {', '.join(OUR_ROLES)}: write the role of the "
                "file first, such as roles: {bing: assistant}"
            )
    if reasoning_tags is not None and (
        len(reasoning_tags) not in (2, 4)
        or len(set(reasoning_tags)) != len(reasoning_tags)
        or not all(isinstance(tag, str) and tag.strip() for tag in reasoning_tags)
    ):
        raise InputError(
            f"reasoning_tags must be an opening and a closing tag, and may add those of the answer, but it is "
            f"{list(reasoning_tags)}"
        )


def _open_dataset(
    path: str, name: str | None, split: str, revision: str | None, *, streaming: bool
) -> Iterable[object]:
    import datasets

    options = {"streaming": True} if streaming else {}
    try:
        dataset: Iterable[object] = datasets.load_dataset(path, name, split=split, revision=revision, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"the dataset {path!r} could not be loaded: {first_line(error)}") from error
    return dataset


def _reject_options(path: str, kind: str, options: Mapping[str, object]) -> None:
    names = [key for key, value in options.items() if value is not None]
    if names:
        hint = "; the name of a source in metrics is the key source" if "name" in names else ""
        raise InputError(f"{path} is {kind}: remove {', '.join(names)}, which cannot apply to it{hint}")


def _check_count(key: str, value: object, at_least: int = 1) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < at_least):
        raise InputError(f"{key} must be a whole number of at least {at_least}, not {value!r}")
