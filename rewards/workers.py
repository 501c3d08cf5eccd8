"""The pool: worker processes that score one completion at a time, each under a time and a memory limit.

pebble's process pool kills a worker at the time limit and replaces it. Workers are forked from a server process that
has no threads and no torch, only the modules that the recipe's rewards need; so a replacement costs milliseconds. A
worker dies with the training process, whatever ends that and whatever the worker is doing.
"""

import fcntl
import math
import multiprocessing
import os
import reprlib
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from data.chat import parse_completion
from data.errors import InputError
from rewards.errors import RewardError
from rewards.lookup import Spec
from rewards.table import REWARDS

# Over a pipe that workers share, a message of at most PIPE_BUF bytes arrives whole or not at all if one is killed.
MAX_TRACEBACK = 2_000
# Beyond the time limit: a worker that takes this long to be killed and replaced is not coming back.
GRACE_SECONDS = 60.0
OUT_OF_MEMORY = 77  # exit code of a worker


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker may use: seconds for a completion and a reward, bytes of address space."""

    timeout: float = 2.0
    memory: int = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Score:
    """What became of one completion and one reward.

    value:     the reward; None where it does not apply, or failed
    error:     one line, where the grader failed; else empty
    traceback: of that failure, where there is one
    seconds:   that it took, in the worker
    """

    value: float | None = None
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A completion with a reward, being scored."""

    scorer: int
    text: str
    columns: Mapping[str, Any]  # Any: JSON values of the row
    timeout: float
    future: ProcessFuture


class WorkerPool:
    """Scores completions by any of `specs`. Starts with the first completion, or with `warm_up`."""

    def __init__(self, specs: Sequence[Spec], *, num_workers: int, limits: Limits) -> None:
        self.specs = list(specs)
        self.num_workers = num_workers
        self.limits = limits
        self._pool: ProcessPool | None = None
        self._num_open = 0

    def warm_up(self) -> None:
        """Start the workers without waiting for them: their imports take seconds."""
        self._schedule(_nothing, (), None)

    def submit(self, scorer: int, text: str, columns: Mapping[str, Any], timeout: float | None = None) -> Job:
        """Have a completion scored by the reward of that number; never waits."""
        timeout = timeout or self.limits.timeout
        self._num_open += 1
        future = self._schedule(_score, (scorer, text, columns), timeout)
        return Job(scorer=scorer, text=text, columns=columns, timeout=timeout, future=future)

    def result(self, job: Job, *, is_last_try: bool = False) -> Score:
        """Wait for the score, not longer than the limits of all that is before it; InputError is the user's to mend."""
        wait = GRACE_SECONDS + self._num_open * job.timeout / self.num_workers
        try:
            score = job.future.result(timeout=wait)
        except TimeoutError as error:
            if not job.future.done():
                raise RewardError(f"the reward workers have not answered for {wait:.0f} seconds") from error
            score = Score(error=f"no result after {job.timeout:g} seconds", seconds=job.timeout)
        except ProcessExpired as error:
            is_memory = error.exitcode == OUT_OF_MEMORY
            score = Score(error="out of memory" if is_memory else f"the worker died (exit code {error.exitcode})")
        except BrokenProcessPool as error:
            # pebble gives a pool up where a worker dies at a moment that it cannot assign to a completion.
            if is_last_try:
                raise RewardError(f"the reward workers die before they score: {error}") from error
            return self.result(self.submit(job.scorer, job.text, job.columns, job.timeout), is_last_try=True)
        finally:
            self._num_open -= 1
        if isinstance(score, str):
            raise InputError(score)
        return score

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _schedule(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float | None
    ) -> ProcessFuture:
        if self._pool is None or not self._pool.active:
            self._pool = self._new_pool()
        return self._pool.schedule(function, args=arguments, timeout=timeout)

    def _new_pool(self) -> ProcessPool:
        context = multiprocessing.get_context("forkserver")
        ours = [REWARDS[spec.name].partition(":")[0] for spec in self.specs if spec.name in REWARDS]
        context.set_forkserver_preload(["rewards.workers", *ours])
        return ProcessPool(
            max_workers=self.num_workers,
            initializer=_start_worker,
            initargs=(self.specs, self.limits.memory, os.getcwd()),
            context=context,
        )


class LiftedScorer:
    """A scorer as a TRL reward function, for trainers that are not ours: each of its completions goes to a worker."""

    def __init__(self, spec: Spec, columns: Sequence[str], timeout: float | None) -> None:
        self.__name__ = spec.name  # TRL logs a reward by it
        self._columns = tuple(columns)
        self._timeout = timeout
        self._pool = WorkerPool([spec], num_workers=num_workers_here(), limits=Limits())

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        jobs = [
            self._pool.submit(0, text, {name: columns[name][at] for name in self._columns}, self._timeout)
            for at, text in enumerate(completions)
        ]
        scores = [self._pool.result(job) for job in jobs]
        for score in scores:
            if score.error:
                raise RewardError(f"reward {self.__name__} failed: {score.error}\n{score.traceback}".rstrip())
        return [score.value for score in scores]


def num_workers_here() -> int:
    """Workers of one training process: the cores that it may use, shared with the other processes of its node."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share, 1), 16)


_scorers: list[Callable[..., Any] | str | Score] = []  # of this worker; an error instead where one cannot be made


def _start_worker(specs: Sequence[Spec], memory: int, folder: str) -> None:
    """Set the limits and make the scorers. Its time does not count for any completion."""
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"  # each worker is one core's, and numpy's threads reserve memory by the core
    _die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for a C call that hangs
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _scorers[:] = [_make(spec) for spec in specs]


def _die_with_parent() -> None:
    """Have the kernel kill this worker when the training process ends, whose end of a pipe closes with it.

    A thread that waits for it would hear nothing during a call of C, and the server that forked this worker, which
    PR_SET_PDEATHSIG would watch, lives as long as its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it has ended already
        os._exit(1)


def _make(spec: Spec) -> Callable[..., Any] | str | Score:
    try:
        scorer = spec.make()
        setup = getattr(scorer, "setup", None)
        if setup is not None:
            setup()
        return scorer
    except InputError as error:
        return str(error)
    except Exception as error:  # whatever a grader raises is its failure, to be told with each completion
        return _failure(error, seconds=0.0)


def _nothing() -> None:
    pass


def _score(number: int, text: str, columns: Mapping[str, Any]) -> Score | str:
    """The score, or the message of an InputError: a plain value, whatever the scorer does."""
    scorer = _scorers[number]
    if not callable(scorer):
        return scorer
    started = time.perf_counter()
    try:
        value = check_number(scorer(parse_completion(text), **columns))
    except InputError as error:
        return str(error)[:MAX_TRACEBACK]
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # how much it still holds nobody knows: a fresh worker goes on
    except BaseException as error:  # whatever a grader raises is its failure, sys.exit() too
        return _failure(error, time.perf_counter() - started)
    return Score(value=value, seconds=time.perf_counter() - started)


def _failure(error: BaseException, seconds: float) -> Score:
    lines = traceback.format_exception(error)
    return Score(
        error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        traceback="".join(lines)[-MAX_TRACEBACK:],
        seconds=seconds,
    )


def check_number(value: Any) -> float | None:  # Any: whatever a user's function returns
    """The value as a float, None as it is; RewardError for anything else. numpy's and torch's scalars are numbers."""
    if value is None:
        return None
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise RewardError(f"returned the value {reprlib.repr(value)}; expected one finite number or None a completion")
    return float(number)
