"""The recipe's `time_limit`: whether a further step and its checkpoint still fit."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class TimeLimit:
    """Time that is left, and the longest step and checkpoint so far."""

    def __init__(self, seconds: float | None) -> None:
        """Begin the time at the start of this process, or of the launcher that started it and may start it again."""
        self._deadline = None if seconds is None else time.monotonic() + seconds - (time.time() - _started())
        self._longest = {"step": 0.0, "save": 0.0}

    @property
    def allows_a_step(self) -> bool:
        """Return True if a step and a checkpoint, each as long as the longest so far, end before the limit."""
        return self._deadline is None or time.monotonic() + sum(self._longest.values()) <= self._deadline

    @property
    def allows_waiting(self) -> bool:
        """Return True if a checkpoint that began now would end before the limit."""
        return self._deadline is None or time.monotonic() + self._longest["save"] <= self._deadline

    def took(self, part: str, seconds: float) -> None:
        """Record how long a `step` or a `save` took."""
        self._longest[part] = max(self._longest[part], seconds)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Context that records how long a `step` or a `save` takes."""
        started = time.monotonic()
        yield
        self.took(part, time.monotonic() - started)


def _started() -> float:
    own = psutil.Process()
    return (own.parent() or own if "TORCHELASTIC_RUN_ID" in os.environ else own).create_time()
