"""Files of JSON lines: the records of a run, each with its step."""

import json
import logging
from pathlib import Path
from typing import Any

from rekatrain.trainer.checkpoints import write_whole

logger = logging.getLogger(__name__)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file, without lines that are damaged or incomplete."""
    return [record for _, record in _parse_lines(path) if record is not None]


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


def keep_records(path: Path, step: int, *, every_step: bool) -> None:
    """Drop a file's damaged lines and its records of the steps after `step`, and log a loss that no step repeats.

    every_step: the file has records of each step
    """
    lines = _parse_lines(path)
    damaged = [number for number, (_, record) in enumerate(lines, start=1) if record is None]
    if damaged:
        logger.warning("%s: dropped damaged lines: %s", path, _first(damaged))
    kept = [(line, record["step"]) for line, record in lines if record is not None and record["step"] <= step]
    missing = sorted(set(range(1, step + 1)) - {number for _, number in kept})
    if every_step and missing:
        logger.warning("%s: the records of some steps are lost: %s", path, _first(missing))
    if path.exists():
        write_whole(path, b"".join(line + b"\n" for line, _ in kept))


def _first(numbers: list[int]) -> str:
    """Return the first numbers as text, and how many there are."""
    return ", ".join(map(str, numbers[:5])) + (f", ... ({len(numbers)} in all)" if len(numbers) > 5 else "")
