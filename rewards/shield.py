"""A shield around the code of rewards, which runs in a process that must outlive it.

A reward that calls `sys.exit`, `os._exit`, `os.killpg(0, ...)` or `os.close` on a descriptor that it did not open, or
that changes the current folder, has a mistake. It costs the reward's value, never the run. This is no sandbox: calls of
C are not shielded, and neither are the processes that a reward starts.
"""

import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from rekatrain.rewards.errors import RewardError

ENDING = ("_exit", "abort", "execv", "execve", "kill", "killpg")
CLOSING = ("close", "closerange")
LOCK = threading.RLock()


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
def shielded(names: Collection[str] = ENDING + CLOSING, kept: Collection[int] | None = None) -> Iterator[None]:
    """Make a context in which functions of `os` raise RewardError where they would harm this process.

    The context also restores the current folder. It holds for the thread that enters it and, if that is the main
    thread, for those that start within; other threads, and processes forked within, are not affected.

    names: of the functions
    kept:  descriptors that may not be closed; None: all that are open now, whose listing takes 50 microseconds
    """
    is_active = [True]  # emptied first of all, as a signal's handler may raise while functions are restored
    process, thread = os.getpid(), threading.get_ident()
    is_main = threading.current_thread() is threading.main_thread()
    others = {other.ident for other in threading.enumerate()} - {thread}
    folder = os.open(".", os.O_PATH | os.O_CLOEXEC)
    ours = open_descriptors() if kept is None else kept

    def is_harmful(name: str, arguments: tuple[Any, ...]) -> bool:
        here = threading.get_ident()
        is_own = here == thread or (is_main and here not in others)
        if not is_active or not is_own or os.getpid() != process:
            return False
        if name == "kill":
            # A signal to this process alone is delivered: the run listens for some.
            is_ours = arguments[:1] in ((0,), (-1,), (-os.getpgrp(),))
            return is_ours and arguments[1:] != (0,)
        if name == "killpg":
            return arguments[:1] in ((0,), (os.getpgrp(),)) and arguments[1:] != (0,)
        if name == "close":
            return bool(arguments) and arguments[0] in ours
        if name == "closerange":
            return len(arguments) == 2 and any(int(arguments[0]) <= number < int(arguments[1]) for number in ours)
        return True

    def guard(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            if is_harmful(name, (*arguments, *keywords.values())):
                shown = ", ".join(map(str, arguments))[:100]
                raise RewardError(f"the reward called os.{name}({shown}), which would harm the process that runs it")
            return original(*arguments, **keywords)

        return guarded

    with LOCK:  # functions are restored in the order opposite to that in which they were replaced
        originals = {name: getattr(os, name) for name in names}
        for name, original in originals.items():
            setattr(os, name, guard(name, original))
        try:
            yield
        finally:
            is_active.clear()
            for name, original in originals.items():
                setattr(os, name, original)
            os.fchdir(folder)
            os.close(folder)
