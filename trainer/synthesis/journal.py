"""The files of a synthesis: all answers, and their scores, each written as soon as it is known.

A killed run loses no answer that has come. A line that a kill has cut in two is dropped at the next start.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rekatrain.data.chat import FinishReason
from rekatrain.data.errors import InputError

ANSWERS, SCORES, SETTINGS, ROWS, LOCK = "answers.jsonl", "scores.jsonl", "settings.json", "rows.jsonl", ".lock"

# A prompt's name and the index of one of its completions.
Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion.

    text:          as the Reka format renders it: from the space after `assistant:` to `<sep>`
    finish_reason: LENGTH for one that was cut off, or that cannot be read; it is never kept
    ids:           the sampled ids; None where a server sent text
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    ids: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Rewards of one completion by name, None where one does not apply or has failed, and their weighted sum."""

    total: float | None
    rewards: dict[str, float | None] = field(default_factory=dict)


class Lines:
    """A JSON-lines file with one record per key; only the positions of the records are held in memory."""

    def __init__(self, path: Path) -> None:
        """Read the positions; cut off an incomplete last line."""
        self.path = path
        self._positions: dict[Key, int] = {}
        self._end = 0
        for position, line in _complete_lines(path):
            record = json.loads(line)
            self._positions[record["prompt"], record["index"]] = position
            self._end = position + len(line)
        if path.exists():
            os.truncate(path, self._end)
        self._file = path.open("r+b" if path.exists() else "w+b")

    def __contains__(self, key: Key) -> bool:
        return key in self._positions

    def __len__(self) -> int:
        return len(self._positions)

    def append(self, key: Key, record: Mapping[str, Any]) -> None:
        """Write a record to the end, where it outlives the process."""
        line = json.dumps({"prompt": key[0], "index": key[1], **record}, ensure_ascii=False).encode() + b"\n"
        os.pwrite(self._file.fileno(), line, self._end)
        self._positions[key] = self._end
        self._end += len(line)

    def read(self, key: Key) -> dict[str, Any]:
        """Return the record of a key without the key."""
        with self.path.open("rb") as file:
            file.seek(self._positions[key])
            record: dict[str, Any] = json.loads(file.readline())
        return {name: value for name, value in record.items() if name not in ("prompt", "index")}

    def clear(self) -> None:
        """Remove all records."""
        os.truncate(self.path, 0)
        self._positions, self._end = {}, 0

    def close(self) -> None:
        self._file.close()


class Journal:
    """The folder of a synthesis, locked while it is open."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], scoring: Mapping[str, Any]) -> None:
        """Open or make the folder.

        settings: all that an answer depends on; a folder with answers of other settings is rejected
        scoring:  all that a score depends on; scores of others are dropped, and the answers are scored again
        """
        self.folder = Path(folder)
        self._settings, self._scoring = json.loads(json.dumps(settings)), json.loads(json.dumps(scoring))

    def __enter__(self) -> "Journal":
        earlier = self._read_settings()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another process writes to {str(self.folder)!r}: wait for its end") from None
        self.answers, self.scores = Lines(self.folder / ANSWERS), Lines(self.folder / SCORES)
        self.num_dropped = 0
        if earlier and earlier["scoring"] != self._scoring:
            self.num_dropped = len(self.scores)
            self.scores.clear()
        text = json.dumps({"settings": self._settings, "scoring": self._scoring}, indent=1)
        write_file(self.folder / SETTINGS, text + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.answers.close()
        self.scores.close()
        self._lock.release()

    def add_answer(self, key: Key, answer: Answer) -> None:
        """Write an answer."""
        record = asdict(answer)
        self.answers.append(key, {name: value for name, value in record.items() if value is not None})

    def answer(self, key: Key) -> Answer:
        """Return an answer."""
        record = self.answers.read(key)
        return Answer(**{**record, "finish_reason": FinishReason(record["finish_reason"])})

    def add_score(self, key: Key, score: Score) -> None:
        """Write a score."""
        self.scores.append(key, asdict(score))

    def score(self, key: Key) -> Score:
        """Return a score; one without a total where nothing was scored."""
        return Score(**self.scores.read(key)) if key in self.scores else Score(total=None)

    def _read_settings(self) -> dict[str, Any] | None:
        path = self.folder / SETTINGS
        if not path.exists():
            ours = (ANSWERS, SCORES, LOCK, f"{SETTINGS}.partial")  # of a run that was killed before its settings
            if self.folder.is_dir() and any(file.name not in ours for file in self.folder.iterdir()):
                raise InputError(f"{str(self.folder)!r} holds other files: name a new folder as out")
            return None
        try:
            earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            settings = earlier["settings"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{str(path)!r} cannot be read: name a new folder as out") from None
        for key in dict.fromkeys([*settings, *self._settings]):
            old, new = settings.get(key), self._settings.get(key)
            if old != new:
                raise InputError(
                    f"{str(self.folder)!r} holds answers with {key} {old!r}, and the recipe has {new!r}: name another "
                    "folder as out"
                )
        return earlier


def write_file(path: Path, text: str) -> None:
    """Write a whole file in one move, so that a kill leaves the old one or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _complete_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the position and the bytes of each line up to the first that is incomplete or damaged."""
    if not path.exists():
        return
    position = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                is_whole = isinstance(record["prompt"], str) and isinstance(record["index"], int)
            except (ValueError, KeyError, TypeError):
                return
            if not is_whole:
                return
            yield position, line
            position += len(line)
