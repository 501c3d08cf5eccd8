"""Shield the process that calls a reward from what the reward does.

A reward that calls `sys.exit`, `os._exit`, `os.killpg(0, ...)` or `os.close` on a descriptor that it did not open, or
that changes the current folder, has a mistake. It costs the reward's value, never the run. The shield is no sandbox:
calls of C are not shielded, and neither are the processes that a reward starts.
"""

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from rekatrain.rewards.errors import RewardError

# Functions that the shield replaces.
ENDING = ("os._exit", "os.abort", "os.execv", "os.execve", "os.kill", "os.killpg")
RAISING = ("signal.raise_signal", "signal.pthread_kill")
CLOSING = ("os.close", "os.closerange")
MODULES: dict[str, ModuleType] = {"os": os, "signal": signal}
LOCK = threading.RLock()
# A reward may replace these functions in their modules.
_getpid, _fchdir, _close, _exit_at_once = os.getpid, os.fchdir, os.close, os._exit
# Signals that do nothing by default.
HARMLESS = (0, signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT)


def open_descriptors() -> set[int]:
    """Return the descriptors of this process that are open."""
    return {number for number in map(int, os.listdir("/proc/self/fd")) if _is_open(number)}


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:  # it was that of the listing
        return False
    return True


@contextmanager
def shielded(
    names: Collection[str] = ENDING + RAISING + CLOSING, kept: Collection[int] | None = None
) -> Iterator[None]:
    """Make a context in which functions raise RewardError where they would harm this process.

    The context also restores the current folder, and a process that is forked within ends with the context. It holds
    for the thread that enters it and, if that is the main thread, for those that start within; other threads, and
    processes forked within, are not affected.

    names: of the functions
    kept:  descriptors that may not be closed; None: all that are open now, whose listing takes 50 microseconds
    """
    is_active = [True]  # emptied first of all, as a signal's handler may raise while functions are restored
    process, thread = _getpid(), threading.get_ident()
    is_main = threading.current_thread() is threading.main_thread()
    others = {other.ident for other in threading.enumerate()} - {thread}
    folder = os.open(".", os.O_PATH | os.O_CLOEXEC)
    ours = open_descriptors() if kept is None else kept

    def guard(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            here = threading.get_ident()
            is_own = here == thread or (is_main and here not in others)
            if (
                is_active
                and is_own
                and _getpid() == process
                and _is_harmful(name, (*arguments, *keywords.values()), ours)
            ):
                shown = ", ".join(map(str, arguments))[:100]
                raise RewardError(f"the reward called {name}({shown}), which would harm the process that runs it")
            return original(*arguments, **keywords)

        return guarded

    with LOCK:  # functions are restored in the order opposite to that in which they were replaced
        places = [(MODULES[name.partition(".")[0]], name.partition(".")[2]) for name in names]
        originals = [getattr(module, function) for module, function in places]
        for name, (module, function), original in zip(names, places, originals, strict=True):
            setattr(module, function, guard(name, original))
        try:
            yield
        finally:
            is_active.clear()
            if _getpid() != process:  # a child that the reward forked: it must not go on as a second run
                _exit_at_once(0)
            for (module, function), original in zip(places, originals, strict=True):
                setattr(module, function, original)
            _fchdir(folder)
            _close(folder)


def _is_harmful(name: str, arguments: tuple[Any, ...], ours: Collection[int]) -> bool:
    """Return True if a call would end this process or its group, or close a descriptor of `ours`."""
    if name == "os.kill":
        if arguments[:1] == (os.getpid(),):
            return _ends_process(arguments[1:])
        return arguments[:1] in ((0,), (-1,), (-os.getpgrp(),), (os.getppid(),)) and arguments[1:] != (0,)
    if name == "os.killpg":
        return arguments[:1] in ((0,), (os.getpgrp(),)) and arguments[1:] != (0,)
    if name == "signal.raise_signal":
        return _ends_process(arguments)
    if name == "signal.pthread_kill":
        return _ends_process(arguments[1:])
    if name == "os.close":
        return bool(arguments) and arguments[0] in ours
    if name == "os.closerange":
        return len(arguments) == 2 and any(int(arguments[0]) <= number < int(arguments[1]) for number in ours)
    return True


def _ends_process(signals: tuple[Any, ...]) -> bool:
    """Return True if this process ends or stops by a signal; the run listens for some."""
    if len(signals) != 1 or signals[0] in HARMLESS or signals[0] not in signal.valid_signals():
        return False
    return signal.getsignal(signals[0]) in (signal.SIG_DFL, None)
