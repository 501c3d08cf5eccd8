"""Interruptions: a signal or the recipe's `time_limit` ends a run early, with a checkpoint and exit status 75.

SIGTERM, SIGUSR1 and the first Ctrl-C let a step that trains finish; while a step samples or waits for rewards, its work
is abandoned. A second signal ends the process at once. All ranks of a launch end after the same step, whichever of them
is interrupted: they exchange one number per step, in `is_agreed` or after the rollouts (rloo/rollouts.py).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from types import FrameType

import torch
from accelerate import Accelerator

from rekatrain.data.errors import INTERRUPTED, RunInterrupted
from rekatrain.trainer.processes.early_signals import SIGNALS, deliver_early_signal
from rekatrain.trainer.processes.failure import RESUME, end_if_a_rank_failed
from rekatrain.trainer.processes.ranks import ranks
from rekatrain.trainer.processes.time_limit import TimeLimit

# Wakes a main thread that waits. Nothing else sends it, and it is ignored by default.
WAKE = signal.SIGURG
POLL_SECONDS = 0.5
# A scheduler and a launcher may both deliver a signal: within this time they count once. Ctrl-C counts each time.
REPEAT_SECONDS = 1.0
RAISE_SECONDS = 3.0
JOIN_SECONDS = 10.0
# Time for the start of a run to leave a call of C, such as the connection of the processes.
START_SECONDS = 10.0


class Abandoned(KeyboardInterrupt):
    """Raised in the main thread to leave work that an interruption abandons; no grader catches it."""


class Phase(Enum):
    """The work of the main thread, by the effect of an interruption on it."""

    STARTING = auto()  # nothing is lost: end now
    SAMPLING = auto()  # abandon
    TRAINING = auto()  # finish
    ENDING = auto()  # the run ends already, or none has begun


ABANDONED = (Phase.STARTING, Phase.SAMPLING)


class Interruption:
    """The interruption of this process's run, if any. `cause` names it: a signal, or time_limit."""

    def __init__(self) -> None:
        self.phase, self._is_unbroken = Phase.ENDING, False
        self._forget()

    def _forget(self) -> None:
        self.cause: str | None = None
        self.time = TimeLimit(None)
        self._raised_at = -RAISE_SECONDS

    @contextmanager
    def listen(self, time_limit: float | None) -> Iterator[None]:
        """Listen for signals and for the end of the time while a run lasts.

        time_limit: seconds from the start of this process, or of the launcher that started it
        """
        self._forget()
        self.time = TimeLimit(time_limit)
        self.phase = Phase.STARTING
        stopped = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stopped,), daemon=True)
        watcher.start()
        try:
            with self._signal_handlers():
                deliver_early_signal()
                yield
        except Abandoned:
            raise self.end("before its first step: nothing is lost. Start it again with --resume") from None
        finally:
            stopped.set()
            self.phase = Phase.ENDING
            watcher.join(JOIN_SECONDS)  # a thread that is in a call of the store when Python ends aborts the process

    def begin_steps(self, accelerator: Accelerator) -> None:
        """Declare that the run is set up, and that a step which has begun is finished; every rank must call this."""
        self.phase = Phase.TRAINING
        if self.is_agreed(accelerator):
            raise Abandoned

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Context within abandoned work that is not left halfway: it changes what other threads read too."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._is_unbroken = True
        try:
            yield
        finally:
            self._is_unbroken = False
        self._abandon()

    def is_agreed(self, accelerator: Accelerator) -> bool:
        """Return True on every rank if one is interrupted, or has no time for a further step; all must call this."""
        self.check_time()
        return _any_rank(accelerator, self.cause is not None)

    def check_time(self) -> None:
        """Interrupt the run if the time limit allows no further step."""
        if not self.time.allows_a_step:
            self.cause = self.cause or "time_limit"

    def end(self, what: str) -> RunInterrupted:
        """Return the error that ends an interrupted run; further signals are ignored.

        what: after which step, and what is saved, as text
        """
        self.phase = Phase.ENDING
        here, cause = ranks(), self.cause
        if here is not None:
            with suppress(RuntimeError):  # the launcher has ended
                if here.status() not in (None, INTERRUPTED):  # the signal only follows the failure of another rank
                    sys.exit(here.let_others_speak())
                if cause is not None:
                    here.interrupt(cause)
                here.leave()
                cause = here.interruption()
        return RunInterrupted(f"interrupted by {cause or 'a signal to another rank'} {what}")

    @contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only it receives signals
            yield
            return
        # Python runs a handler after the call of C that the signal interrupts, and a collective that waits for a dead
        # process never returns. So a thread reads the signal's number from a pipe.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        old_pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A shell's background job ignores Ctrl-C.
        numbers = [
            number for number in (*SIGNALS, WAKE) if number == WAKE or signal.getsignal(number) != signal.SIG_IGN
        ]
        handlers = {number: signal.signal(number, self._handle) for number in numbers}
        listener = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        listener.start()
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            # A launcher sends SIGTERM to all ranks after the first has ended: this one may still have to print why.
            is_over = not is_whole and ranks() is not None
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_IGN if is_over else handler or signal.SIG_DFL)
            signal.set_wakeup_fd(old_pipe)
            os.close(writer)
            listener.join()
            os.close(reader)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Leave what the main thread does, once, if it is to be abandoned."""
        if number in SIGNALS:
            self.cause = self.cause or signal.Signals(number).name
        self._abandon()

    def _abandon(self) -> None:
        """Raise Abandoned where work is abandoned; again after a while, as a callback may have swallowed the first."""
        here, now = ranks(), time.monotonic()
        is_left = self.phase in ABANDONED and not self._is_unbroken
        if self.cause is None or not is_left or (here is not None and here.is_ending):
            return
        if now - self._raised_at > RAISE_SECONDS:
            self._raised_at = now
            raise Abandoned

    def _listen(self, reader: int) -> None:
        """Read the numbers of signals as they come."""
        first = None
        while number := os.read(reader, 1):
            if number[0] not in SIGNALS or self.phase is Phase.ENDING:
                continue
            received, here = signal.Signals(number[0]), ranks()
            if received == signal.SIGTERM and here is not None:
                with suppress(RuntimeError):  # the launcher has ended
                    if here.status() != INTERRUPTED:
                        end_if_a_rank_failed(here)
            now = time.monotonic()
            if first is None:
                first, self.cause = now, self.cause or received.name
            elif received == signal.SIGINT or now - first > REPEAT_SECONDS:
                _end_at_once(f"a second signal ({received.name}) ended the run. {RESUME}", 128 + received)

    def _watch(self, stopped: threading.Event) -> None:
        """Exchange interruptions with the other ranks, and interrupt the run when the time limit allows no more."""
        here = ranks()
        with suppress(RuntimeError):  # the launcher has ended
            while self.cause is None and not stopped.wait(POLL_SECONDS):
                if not self.time.allows_waiting:
                    self.cause = "time_limit"
                elif here is not None and (reported := here.interruption()) is not None:
                    self.cause = self.cause or reported
            if here is not None and self.cause is not None:
                here.interrupt(self.cause)
        known = time.monotonic()
        while self.phase is not Phase.ENDING and not stopped.is_set():
            if self.phase in ABANDONED:  # not while files are written
                signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
            if self.phase is Phase.STARTING and time.monotonic() - known > START_SECONDS:
                _end_at_once(f"interrupted by {self.cause} before its first step. {RESUME}", INTERRUPTED)
            stopped.wait(POLL_SECONDS)


INTERRUPTION = Interruption()


def describe_end(step: int) -> str:
    """Return the text on where an interrupted run has ended, with a checkpoint unless `step` is 0."""
    if step == 0:
        return "in its first step, before there was anything to save. Start it again with --resume"
    return f"after step {step}: checkpoint-{step} is saved. {RESUME}"


def _any_rank(accelerator: Accelerator, is_here: bool) -> bool:
    if accelerator.num_processes == 1:
        return is_here
    count = torch.tensor([int(is_here)], device=accelerator.device)
    return bool(accelerator.reduce(count, "sum").item())


def _end_at_once(message: str, status: int) -> None:
    here, is_mine = ranks(), True
    with suppress(RuntimeError):  # the launcher has ended
        if here is not None:
            here.leave()
            is_mine = here.claim("end at once")
    if is_mine:
        print(f"rekatrain: {message}", file=sys.stderr, flush=True)
    os._exit(status)
