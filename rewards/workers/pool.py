"""A pool of worker processes that score one completion at a time, each under a time and a memory limit.

pebble's process pool kills a worker at the time limit and replaces it. Workers are forked from a server process that
has no threads and no torch, only the modules of the recipe's built-in rewards; so a replacement costs milliseconds.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.outcome import Outcome
from rekatrain.rewards.registry import REWARDS, Spec
from rekatrain.rewards.workers.context import WorkerContext, read_environment
from rekatrain.rewards.workers.environment import read_passed
from rekatrain.rewards.workers.process import OUT_OF_MEMORY, do_nothing, score_completion, start_worker

# A worker that is not killed and replaced this long after its time limit never will be.
GRACE_SECONDS = 60.0
SLOW_START = (
    ": its first call may load something. Do that in setup() of a class, whose time does not count, or raise timeout"
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a worker: seconds per completion and reward, bytes of address space."""

    timeout: float = 2.0
    memory: int = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Job:
    """A completion that is being scored by one reward; `scorer` is the index of the reward in the pool."""

    scorer: int
    text: str
    columns: Mapping[str, Any]  # Any: JSON values of the row
    timeout: float
    future: ProcessFuture


class WorkerPool:
    """Scores completions by any of `specs`. Starts with the first completion, or with `warm_up`.

    environment: names of variables that the workers have beside the allowed ones (environment.py)
    """

    def __init__(
        self, specs: Sequence[Spec], *, num_workers: int, limits: Limits, environment: Sequence[str] = ()
    ) -> None:
        self.specs = list(specs)
        self.environment = read_passed(environment)
        self.num_workers = num_workers
        self.limits = limits
        self._pool: ProcessPool | None = None
        self._num_open = 0
        self._have_answered: set[int] = set()

    def warm_up(self) -> None:
        """Start the workers without waiting for them: their imports take seconds."""
        self._schedule(do_nothing, (), None)

    def submit(self, scorer: int, text: str, columns: Mapping[str, Any], timeout: float | None = None) -> Job:
        """Start scoring a completion by the reward with the index `scorer`; never waits."""
        timeout = timeout or self.limits.timeout
        self._num_open += 1
        future = self._schedule(score_completion, (scorer, text, columns), timeout)
        return Job(scorer=scorer, text=text, columns=columns, timeout=timeout, future=future)

    def result(self, job: Job, *, is_last_try: bool = False) -> Outcome:
        """Wait for the score, not longer than the time limits of all open jobs."""
        wait = GRACE_SECONDS + self._num_open * job.timeout / self.num_workers
        try:
            score = job.future.result(timeout=wait)
        except TimeoutError as error:
            if not job.future.done():
                raise RewardError(f"the reward workers have not answered for {wait:.0f} seconds") from error
            hint = "" if job.scorer in self._have_answered else SLOW_START
            message = f"no result after {job.timeout:g} seconds{hint}"
            score = Outcome(error=message, seconds=job.timeout, is_late=True)
        except ProcessExpired as error:
            is_memory = error.exitcode == OUT_OF_MEMORY
            score = Outcome(error="out of memory" if is_memory else f"the worker died (exit code {error.exitcode})")
        except BrokenProcessPool as error:
            # pebble closes a pool if a worker dies at a moment that cannot be assigned to a completion.
            if is_last_try:
                raise RewardError(f"the reward workers die before they score: {error}") from error
            return self.result(self.submit(job.scorer, job.text, job.columns, job.timeout), is_last_try=True)
        finally:
            self._num_open -= 1
        if not isinstance(score, str) and not score.is_late:
            self._have_answered.add(job.scorer)
        return Outcome(error=score, is_input=True) if isinstance(score, str) else score

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
        context = WorkerContext()
        ours = [REWARDS[spec.name].partition(":")[0] for spec in self.specs if spec.name in REWARDS]
        context.preload(["rekatrain.rewards.workers.process", *ours])
        return ProcessPool(
            max_workers=self.num_workers,
            initializer=start_worker,
            initargs=(self.specs, self.limits.memory, os.getcwd(), {**read_environment(), **self.environment}),
            context=context,
        )


class LiftedScorer:
    """A scorer as a TRL reward function, for TRL's trainers: it sends each completion to a worker."""

    def __init__(self, spec: Spec, columns: Sequence[str], timeout: float | None) -> None:
        self.__name__ = spec.name  # TRL logs a reward by it
        self._columns = tuple(columns)
        self._timeout = timeout
        self._pool = WorkerPool([spec], num_workers=num_workers_here(), limits=Limits())

    def __call__(
        self, completions: Sequence[str | list[dict[str, str]]], **columns: Sequence[Any]
    ) -> list[float | None]:
        texts = [one if isinstance(one, str) else "".join(turn["content"] for turn in one) for one in completions]
        jobs = [
            self._pool.submit(0, text, {name: columns[name][index] for name in self._columns}, self._timeout)
            for index, text in enumerate(texts)
        ]
        scores = [self._pool.result(job) for job in jobs]
        for score in scores:
            if score.is_input:
                raise InputError(score.error)
            if score.error:
                raise RewardError(f"reward {self.__name__} failed: {score.error}\n{score.traceback}".rstrip())
        return [score.value for score in scores]


def num_workers_here() -> int:
    """Return the number of workers of one training process: its part of the node's cores, at most 16."""
    num_cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(num_cores, 1), 16)
