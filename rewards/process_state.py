"""The state of a process that a reward may change by mistake, and its restoration after the call.

It is the state on which the run or another reward depends: standard streams, timers, signal handlers, environment,
locale, umask, recursion limit, tracing, and PyTorch's switches. Random numbers are those of the run, whose state is in
its checkpoints: a resumed reward draws on.
"""

import locale
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rekatrain.rewards.errors import RewardError

STREAMS = {"stdin": (0, "r"), "stdout": (1, "w"), "stderr": (2, "w")}
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
TIMER_SIGNALS = (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF)
HANDLED = (
    *TIMER_SIGNALS,
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG, signal.SIGCHLD),
)
# A reward may replace these functions in their modules.
_fstat, _dup2, _umask = os.fstat, os.dup2, os.umask
_setitimer, _signal, _getsignal = signal.setitimer, signal.signal, signal.getsignal
_setlocale, _settrace, _setprofile, _setrecursionlimit = (
    locale.setlocale,
    sys.settrace,
    sys.setprofile,
    sys.setrecursionlimit,
)


class ProcessState:
    """The state at the time when it was made. It holds three descriptors, until `close`."""

    def __init__(self) -> None:
        self._streams = {name: getattr(sys, name) for name in STREAMS}
        self._copies = {number: os.dup(number) for number in range(3) if _identity(number) is not None}
        self._identities = {number: _identity(number) for number in self._copies}
        self._environment = dict(os.environ)
        self._locale = _setlocale(locale.LC_ALL)
        self._umask = _read_umask()
        self._recursion_limit = sys.getrecursionlimit()
        self._traces = (sys.gettrace(), sys.getprofile())
        self._timers = [timer for timer in TIMERS if signal.getitimer(timer) == (0.0, 0.0)]
        self._handlers = {number: _getsignal(number) for number in HANDLED}
        self._torch = _read_torch()

    def restore(self) -> None:
        """Set the state again. Variables of the environment that a reward has added stay."""
        _settrace(self._traces[0])
        _setprofile(self._traces[1])
        _setrecursionlimit(self._recursion_limit)
        _umask(self._umask)
        self._restore_streams()
        for name, value in self._environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        if _setlocale(locale.LC_ALL) != self._locale:
            _setlocale(locale.LC_ALL, self._locale)
        if self._torch is not None:
            torch = sys.modules["torch"]
            torch.set_grad_enabled(self._torch[0])
            torch.set_default_dtype(self._torch[1])
        if threading.current_thread() is threading.main_thread():
            for timer in self._timers:
                _setitimer(timer, 0.0)
            for number, handler in self._handlers.items():
                if handler is not None and _getsignal(number) is not handler:
                    _signal(number, handler)

    def close(self) -> None:
        for copy in self._copies.values():
            os.close(copy)

    def _restore_streams(self) -> None:
        for number, identity in self._identities.items():
            if _identity(number) != identity:
                _dup2(self._copies[number], number)
        for name, stream in self._streams.items():
            if stream is not None and getattr(stream, "closed", False):
                number, mode = STREAMS[name]
                if number in self._copies:
                    stream = self._streams[name] = open(number, mode, closefd=False)  # noqa: SIM115  # a standard stream
            if getattr(sys, name) is not stream:
                setattr(sys, name, stream)


@contextmanager
def kept_state() -> Iterator[list[BaseException]]:
    """Make a context that restores the state.

    Its value is the list of errors that signal handlers raise within: those interrupt the run, and all others are the
    reward's, even a KeyboardInterrupt.
    """
    raised: list[BaseException] = []
    state = ProcessState()
    try:
        if threading.current_thread() is threading.main_thread():
            _note_signals(raised)
        yield raised
    finally:
        state.restore()
        state.close()


def _note_signals(raised: list[BaseException]) -> None:
    """Have the handlers note what they raise, and timers without a handler raise an error; they would end the run."""

    def noting(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return handle

    def end_timer(number: int, frame: FrameType | None) -> None:
        raise RewardError(f"a timer that the reward has set ended ({signal.Signals(number).name})")

    for number in HANDLED:
        handler = _getsignal(number)
        if callable(handler):
            _signal(number, noting(handler))
        elif number in TIMER_SIGNALS and handler is signal.SIG_DFL:
            _signal(number, end_timer)


def _identity(number: int) -> tuple[int, int] | None:
    """Return the file of a descriptor; None if it is closed."""
    try:
        status = _fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read_umask() -> int:
    """Return the umask without changing it for a moment, in which another thread might make a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)


def _read_torch() -> tuple[bool, Any] | None:
    torch = sys.modules.get("torch")
    return None if torch is None else (torch.is_grad_enabled(), torch.get_default_dtype())
