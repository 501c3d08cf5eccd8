"""The completions of a report: chosen, in columns to filter and sort by, and their texts in compressed chunks.

Up to MAX_COMPLETIONS and MAX_TEXT the page has all completions; beyond, whole groups are chosen evenly over the run,
and the page says so.
"""

import base64
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rekatrain.trainer.report.inputs import ReportInput

MAX_COMPLETIONS = 100_000
MAX_TEXT = 192 * 2**20
# Characters of text that are decompressed at a time.
CHUNK_CHARACTERS = 2**18

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A group in a file: its records by offset and size, and the number of characters of its texts."""

    run: int
    lines: list[tuple[int, int]]
    num_characters: int


@dataclass(kw_only=True)
class Rollouts:
    """JSON-ready columns of groups and completions, and the chunks of their texts.

    groups:      run, step, prompt_index, row, source, chunk and slot of each group, and its first completion
    completions: group, reward, advantage, kl, tokens, finish reason and whether a reward failed, of each completion
    rewards:     reward name -> value of each completion, None where it has none
    chunks:      base64 of gzipped JSON: a list of groups with prompt, gold and texts
    total:       number of completions of the files
    """

    groups: dict[str, list[Any]]
    completions: dict[str, list[Any]]
    rewards: dict[str, list[float | None]]
    chunks: list[str] = field(default_factory=list)
    total: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return all but the chunks."""
        return {
            "groups": self.groups,
            "completions": self.completions,
            "rewards": self.rewards,
            "total": self.total,
            "num_chunks": len(self.chunks),
        }


def collect_rollouts(
    inputs: Sequence[ReportInput], *, max_completions: int = MAX_COMPLETIONS, max_text: int = MAX_TEXT
) -> Rollouts:
    """Read the completions of all inputs, or an even sample of their groups."""
    files = {index: run.rollouts for index, run in enumerate(inputs) if run.rollouts is not None}
    places = [place for index, file in files.items() for place in _find_groups(index, file)]
    answers = [
        (index, list(group))
        for index, run in enumerate(inputs)
        if run.evaluation is not None
        for _, group in groupby(_answers(run.evaluation), key=_group_key)
    ]
    total = sum(len(place.lines) for place in places) + sum(len(group) for _, group in answers)
    characters = sum(place.num_characters for place in places) + sum(
        _num_characters(record) for _, group in answers for record in group
    )
    fraction = min(1.0, max_completions / max(total, 1), max_text / max(characters, 1))
    columns = _Columns()
    for place in _evenly(places, fraction):
        columns.add(place.run, _read_lines(files[place.run], place.lines))
    for run, group in _evenly(answers, fraction):
        columns.add(run, group)
    return columns.finish(total)


def _evenly(items: Sequence[Any], fraction: float) -> Iterator[Any]:
    """Yield that fraction of the items, at equal distances.

    >>> list(_evenly("abcdef", 0.5))
    ['b', 'd', 'f']
    """
    for index, item in enumerate(items):
        if int((index + 1) * fraction) > int(index * fraction):
            yield item


def _find_groups(run: int, file: Path) -> Iterator[_Place]:
    """Yield the groups of a rollouts file; lines that are cut or damaged are left out."""
    offset, known = 0, []
    with file.open("rb") as lines:
        for line in lines:
            record = _parse(line)
            if record is not None:
                known.append((_group_key(record), offset, len(line), _num_characters(record)))
            offset += len(line)
    for _, group in groupby(known, key=lambda entry: entry[0]):
        members = list(group)
        yield _Place(
            run=run,
            lines=[(start, size) for _, start, size, _ in members],
            num_characters=sum(count for *_, count in members),
        )


def _read_lines(file: Path, lines: Iterable[tuple[int, int]]) -> list[Record]:
    with file.open("rb") as source:
        records = []
        for offset, size in lines:
            source.seek(offset)
            record = _parse(source.read(size))
            assert record is not None, "the run only appends to the file"
            records.append(record)
    return records


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("completion"), str) else None


def _answers(evaluation: Mapping[str, Any]) -> list[Record]:
    return [a for a in evaluation["answers"] if isinstance(a, dict) and isinstance(a.get("completion"), str)]


def _group_key(record: Record) -> tuple[Any, ...]:
    index = record.get("prompt_index")
    where = index if index is not None else (record.get("row"), record.get("prompt"))
    return record.get("step"), record.get("reasoning_budget"), where


def _num_characters(record: Record) -> int:
    return len(record["completion"]) + len(str(record.get("prompt", "")))


class _Columns:
    """Collects groups into columns and chunks."""

    def __init__(self) -> None:
        group_keys = ("run", "step", "budget", "index", "row", "source", "chunk", "slot", "first")
        self._groups: dict[str, list[Any]] = {key: [] for key in group_keys}
        keys = ("group", "reward", "advantage", "kl", "tokens", "finish", "failed")
        self._completions: dict[str, list[Any]] = {key: [] for key in keys}
        self._rewards: dict[str, list[float | None]] = {}
        self._chunks: list[str] = []
        self._open: list[dict[str, Any]] = []
        self._size = 0

    def add(self, run: int, records: Sequence[Record]) -> None:
        """Add the completions of one prompt."""
        first, number = records[0], len(self._groups["run"])
        before = len(self._completions["group"])
        values = {
            "run": run,
            "step": first.get("step"),
            "budget": first.get("reasoning_budget"),
            "index": first.get("prompt_index"),
            "row": first.get("row"),
            "source": first.get("source") or "",
            "chunk": len(self._chunks),
            "slot": len(self._open),
            "first": before,
        }
        for key, value in values.items():
            self._groups[key].append(value)
        for record in records:
            self._add_completion(number, record)
        texts = [record["completion"] for record in records]
        errors = [record.get("reward_errors") or {} for record in records]
        self._open.append(
            {"prompt": first.get("prompt") or "", "gold": first.get("gold"), "texts": texts, "errors": errors}
        )
        self._size += sum(map(_num_characters, records))
        if self._size >= CHUNK_CHARACTERS:
            self._close_chunk()

    def finish(self, total: int) -> Rollouts:
        """Return everything."""
        if self._open:
            self._close_chunk()
        return Rollouts(
            groups=self._groups,
            completions=self._completions,
            rewards=self._rewards,
            chunks=self._chunks,
            total=total,
        )

    def _add_completion(self, group: int, record: Record) -> None:
        number = len(self._completions["group"])
        ids = record.get("completion_ids")
        values = {
            "group": group,
            "reward": _short(record.get("reward")),
            "advantage": _short(record.get("advantage")),
            "kl": _short(record.get("kl")),
            "tokens": len(ids) if isinstance(ids, list) else record.get("num_tokens"),
            "finish": record.get("finish_reason") or "",
            "failed": 1 if record.get("reward_errors") else 0,
        }
        for key, value in values.items():
            self._completions[key].append(value)
        for name, value in (record.get("rewards") or {}).items():
            column = self._rewards.setdefault(name, [None] * number)
            column.extend([None] * (number - len(column)))
            column.append(_short(value))
        for column in self._rewards.values():
            column.extend([None] * (number + 1 - len(column)))

    def _close_chunk(self) -> None:
        self._chunks.append(pack(self._open))
        self._open, self._size = [], 0


def pack(value: object) -> str:
    """Return JSON, gzipped, in base64: no text in it can end a script element or be read as HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    # Half of a character, a lone surrogate, becomes U+FFFD, as it has no UTF-8.
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return base64.b64encode(gzip.compress(whole.encode(), compresslevel=6, mtime=0)).decode("ascii")


def _short(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(f"{value:.6g}") if is_number and abs(value) < float("inf") else None  # type: ignore[arg-type]
