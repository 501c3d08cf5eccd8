"""A worker process and the thread that gives it tasks: one task at a time, over a pipe that no other worker shares.

So the death of a worker is always that of the task it had, a lock cannot be left held, and a reply cannot be mistaken
for that of another task. Pools of the libraries (pebble, loky, concurrent.futures) share a queue and its locks among
their workers: one that dies at the wrong moment breaks the pool.
"""

import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from rekatrain.rewards.outcome import Outcome
from rekatrain.rewards.workers.process import OUT_OF_MEMORY

# A task whose worker dies is given to a fresh one this often: the cause may be what an earlier task left behind.
NUM_TRIES = 2
# Starts that fail one after the other, before a task fails.
NUM_STARTS = 3
MAX_REPLY = 1 << 20  # bytes; a scorer may write into the pipe
DEATH_SECONDS = 1.0
RESTART_SECONDS = 0.5
# Two threads that look after the same process both read its exit code.
LOCK = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Task:
    """A completion for a worker: the arguments of `score_completion`, its time limit in seconds, and its outcome."""

    arguments: tuple[int, str, Mapping[str, Any]]  # Any: JSON values of the row
    timeout: float
    future: "Future[Outcome | str]" = field(default_factory=Future)


class Died(Exception):
    """The worker has ended, or its reply is none."""


class WorkerThread(threading.Thread):
    """Gives tasks of a queue to a worker that it starts, ends at a time limit, and replaces; None ends the thread.

    start_process: starts a process, and returns it with the connection to it
    """

    def __init__(
        self,
        tasks: "queue.SimpleQueue[Task | None]",
        start_process: Callable[[], tuple[BaseProcess, connection.Connection]],
    ) -> None:
        super().__init__(daemon=True, name="reward worker")
        self._tasks = tasks
        self._start_process = start_process
        self._process: BaseProcess | None = None
        self._pipe: connection.Connection | None = None
        self._is_closed = False

    def run(self) -> None:
        with suppress(Died):  # the first task tries again and reports it
            self._start_worker()
        while (task := self._tasks.get()) is not None and not self._is_closed:
            try:
                task.future.set_result(self._score(task))
            except BaseException as error:
                task.future.set_exception(error)
        self._end_worker()

    def close(self) -> None:
        """End the worker, whatever it is doing, and let the thread end."""
        self._is_closed = True
        self._kill()

    def _score(self, task: Task) -> Outcome | str:
        outcome = Outcome()
        for _ in range(NUM_TRIES):
            for number in range(NUM_STARTS):
                try:
                    pipe = self._start_worker()
                    pipe.send(task.arguments)
                    break
                except (Died, OSError) as error:
                    end = self._end_worker(wait=DEATH_SECONDS)
                    if number == NUM_STARTS - 1 or self._is_closed:
                        how = str(error) if end is None else describe_end(end)
                        return Outcome(error=f"the worker died before it scored, {number + 1} times ({how})")
            try:
                answer, is_fit = self._read(task.timeout)
            except TimeoutError:
                self._end_worker()
                return Outcome(error=f"no result after {task.timeout:g} seconds", seconds=task.timeout, is_late=True)
            except Died as error:
                code = self._end_worker(wait=DEATH_SECONDS)
                if code == OUT_OF_MEMORY:
                    return Outcome(error="out of memory")
                outcome = Outcome(error=str(error) if code is None else f"the worker died ({describe_end(code)})")
                if self._is_closed:
                    break
                continue
            if not is_fit:
                self._end_worker()
            return answer
        return outcome

    def _start_worker(self) -> connection.Connection:
        """Return the pipe to the worker, which is started if there is none; raise Died if that fails."""
        if self._pipe is None:
            try:
                with LOCK:
                    self._process, self._pipe = self._start_process()
            except (OSError, EOFError) as error:
                time.sleep(RESTART_SECONDS)  # a server that has been killed is replaced once it has ended
                raise Died(f"it cannot be started: {error}") from error
            if self._is_closed:  # `close` may have come too early to kill it
                self._kill()
            self._read(None)
        return self._pipe

    def _read(self, timeout: float | None) -> Any:
        """Return the worker's next message; raise Died or TimeoutError."""
        assert self._pipe is not None and self._process is not None
        # A child of the worker may hold the other end of the pipe, so its end is no sign of death.
        ready = connection.wait([self._pipe, self._process.sentinel], timeout)
        if not ready:
            raise TimeoutError
        if self._pipe not in ready and not self._pipe.poll(DEATH_SECONDS):
            raise Died("the worker died")
        try:
            message = pickle.loads(self._pipe.recv_bytes(MAX_REPLY))
            # If the server of the workers has died, this one lives, but nothing reports its end.
            return message if message is None else (message[0], message[1] and self._process.sentinel not in ready)
        except (EOFError, OSError) as error:
            raise Died("the worker died, or wrote something else than a result into its pipe") from error
        except Exception as error:  # of pickle: the scorer has written into the pipe
            raise Died("the worker wrote something else than a result into its pipe") from error

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):  # it has ended, or is no leader of a group yet
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)

    def _end_worker(self, wait: float = 0.0) -> int | None:
        """End the worker with its children. Return its exit code if it ends on its own within `wait` seconds."""
        process, pipe = self._process, self._pipe
        code = None
        if process is not None:
            connection.wait([process.sentinel], wait)
            with LOCK:
                code = process.exitcode
            self._kill()
            connection.wait([process.sentinel], DEATH_SECONDS)
            with LOCK:
                process.join(0)
        if pipe is not None:
            pipe.close()
        self._process = self._pipe = None
        return code


def describe_end(code: int) -> str:
    """Return the exit code of a process, with the name of the signal that killed it.

    >>> describe_end(-9)
    'exit code -9: killed by SIGKILL'
    """
    with suppress(ValueError):
        if code < 0:
            return f"exit code {code}: killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
