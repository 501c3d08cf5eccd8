"""Files of JSON lines: the records of a run, each with its step."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rekatrain.trainer.run.checkpoints import write_whole

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**20


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file, without lines that are damaged or incomplete."""
    return [record for _, record in _parse_lines(path) if record is not None]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file up to the first line that is damaged or incomplete."""
    objects: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            break
        objects.append(record)
    return objects


class RecordFile:
    """A JSON-lines file that a run appends to.

    A checkpoint keeps the number, the size and the digest of its records (`seal`). A resume compares the file with
    them, and parses it only if it differs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_records, self._size, self._digest = 0, 0, hashlib.sha256()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records to the end of the file."""
        # A lone surrogate, as a row's JSON may hold one, has no UTF-8: it stays the escape that JSON has for it.
        lines = [json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n" for record in records]
        with self.path.open("ab") as file:
            file.writelines(lines)
        self._count(lines)

    def seal(self) -> dict[str, Any]:
        """Sync the file to disk, and return the number, the size and the SHA-256 of its records so far."""
        _sync(self.path)
        return {"records": self._num_records, "size": self._size, "sha256": self._digest.hexdigest()}

    def keep(self, step: int, seal: Mapping[str, Any] | None, *, every_step: bool) -> None:
        """Drop damaged lines and the records of the steps after `step`; log a loss that no step repeats.

        seal:       of the checkpoint from which the run goes on, if it has one
        every_step: the file has records of each step
        """
        self._num_records, self._size, self._digest = 0, 0, hashlib.sha256()
        if seal and self._begins_as(seal):
            os.truncate(self.path, seal["size"])
            _sync(self.path)
            self._num_records, self._size = seal["records"], seal["size"]
            return
        lines = _parse_lines(self.path)
        damaged = [number for number, (_, record) in enumerate(lines, start=1) if record is None]
        if damaged:
            logger.warning("%s: dropped damaged lines: %s", self.path, _first(damaged))
        records = [(line + b"\n", record["step"]) for line, record in lines if record and record["step"] <= step]
        missing = sorted(set(range(1, step + 1)) - {number for _, number in records})
        if every_step and missing:
            logger.warning("%s: the records of some steps are lost: %s", self.path, _first(missing))
        kept = [line for line, _ in records]
        self._digest = hashlib.sha256()
        self._count(kept)
        if seal and self._digest.hexdigest() != seal["sha256"]:
            logger.warning(
                "%s: it is not as the run left it at step %d: it has %d of %d records up to there",
                self.path,
                step,
                self._num_records,
                seal["records"],
            )
        if self.path.exists():
            write_whole(self.path, b"".join(kept))

    def _begins_as(self, seal: Mapping[str, Any]) -> bool:
        """Return True if the file begins with the sealed content, which is then in the digest."""
        left: int = seal["size"]
        if not self.path.is_file() or self.path.stat().st_size < left:
            return False
        with self.path.open("rb") as file:
            while left:
                block = file.read(min(left, BLOCK_BYTES))
                self._digest.update(block)
                left -= len(block)
        return self._digest.hexdigest() == seal["sha256"]

    def _count(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self._digest.update(line)
            self._num_records += 1
            self._size += len(line)


def _parse_lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Return the lines of a JSON-lines file with their records; None for a line that is no JSON object with a step."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [(line, _parse_line(line)) for line in lines if line]


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _first(numbers: list[int]) -> str:
    """Return the first numbers as text, and how many there are."""
    return ", ".join(map(str, numbers[:5])) + (f", ... ({len(numbers)} in all)" if len(numbers) > 5 else "")
