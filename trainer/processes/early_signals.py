"""Signals that come before a run listens for them: the imports of a run take seconds."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rekatrain.data.errors import INTERRUPTED
from rekatrain.trainer.processes.launched import is_launched

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_pending: list[int] = []


@contextmanager
def interruptible_imports() -> Iterator[None]:
    """Context in which a signal ends this process with status 75; in a launch it waits for `deliver_early_signal`.

    A launcher sends SIGTERM to all ranks after one has failed, and that cannot be seen before the ranks are connected.
    A second signal ends the process at once.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if is_launched() and not _pending:
            _pending.append(number)
            return
        if not is_launched():
            name = signal.Signals(number).name
            line = f"rekatrain: interrupted by {name} before its first step: nothing is lost"
            print(line, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    old = {number: signal.getsignal(number) for number in SIGNALS} if is_main else {}
    changed = [number for number, handler in old.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is end:
                signal.signal(number, old[number])


def deliver_early_signal() -> None:
    """Send this process the signal that waits since its imports, if there is one."""
    if _pending:
        signal.raise_signal(_pending.pop())
