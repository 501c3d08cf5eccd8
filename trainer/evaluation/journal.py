"""The answers of an evaluation that is not finished: files beside `--out`, from which the next start goes on.

Each process appends to its own file, so that the files of a killed start serve one with any number of processes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.run.records import RecordFile, read_json_lines


class Journal:
    """The unfinished answers of an evaluation; without `out` nothing is kept.

    settings: all that an answer depends on; files of other settings are rejected
    """

    def __init__(self, out: Path | None, settings: Mapping[str, Any], process: int) -> None:
        self._out, self._settings = out, json.loads(json.dumps(settings, default=str))
        self._file = None if out is None else RecordFile(_path(out, str(process)))

    def read(self) -> list[dict[str, Any]]:
        """Return the answers of earlier starts; every process reads them before any of them writes."""
        answers = []
        for path in self._files():
            lines = read_json_lines(path)
            if not lines:
                continue
            for key in dict.fromkeys([*lines[0].get("settings", {}), *self._settings]):
                old, new = lines[0].get("settings", {}).get(key), self._settings.get(key)
                if old != new:
                    raise InputError(
                        f"{str(path)!r} holds answers with {key} {old!r}, and this evaluation has {new!r}: delete it, "
                        "or name another file as --out"
                    )
            answers += [line["answer"] for line in lines[1:] if "answer" in line]
        return answers

    def begin(self) -> None:
        """Write the settings to this process's file, after a cut last line is dropped."""
        if self._file is None:
            return
        earlier = read_json_lines(self._file.path)
        self._file.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.path.write_bytes(b"")
        self._file.append(earlier or [{"settings": self._settings}])

    def add(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Append answers."""
        if self._file is not None:
            self._file.append({"answer": answer} for answer in answers)

    def finish(self) -> None:
        """Delete the files: their answers are in `out`."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        return [] if self._out is None else sorted(self._out.parent.glob(f"{_escape(self._out.name)}.answers-*.jsonl"))


def _path(out: Path, process: str) -> Path:
    return out.with_name(f"{out.name}.answers-{process}.jsonl")


def _escape(name: str) -> str:
    """Return a name as a pattern that matches itself alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
