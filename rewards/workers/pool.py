"""A pool of worker processes that score one completion at a time, each under a time and a memory limit.

Workers are forked from a server process that has no threads and no torch, only the modules of the recipe's built-in
rewards; so a replacement costs milliseconds. Each has its own thread and pipe here (worker.py).
"""

import os
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection, util
from multiprocessing.process import BaseProcess
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.outcome import Outcome
from rekatrain.rewards.registry import REWARDS, Spec
from rekatrain.rewards.workers.context import WorkerContext, read_environment
from rekatrain.rewards.workers.environment import read_passed
from rekatrain.rewards.workers.process import serve
from rekatrain.rewards.workers.worker import NUM_TRIES, Task, WorkerThread

# A worker that is not killed and replaced this long after its time limit never will be.
GRACE_SECONDS = 60.0
JOIN_SECONDS = 5.0
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
    task: Task


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
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads: list[WorkerThread] = []
        self._num_open = 0
        self._have_answered: set[int] = set()

    def warm_up(self) -> None:
        """Start the workers without waiting for them: their imports take seconds."""
        if self._threads:
            return
        context = WorkerContext()
        ours = [REWARDS[spec.name].partition(":")[0] for spec in self.specs if spec.name in REWARDS]
        context.preload(["rekatrain.rewards.workers.process", *ours])
        arguments = (self.specs, self.limits.memory, os.getcwd(), {**read_environment(), **self.environment})

        def start_process() -> tuple[BaseProcess, connection.Connection]:
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, *arguments), name="reward worker")
            process.start()
            there.close()
            return process, here

        self._threads = [WorkerThread(self._tasks, start_process) for _ in range(self.num_workers)]
        for thread in self._threads:
            thread.start()
        # Before multiprocessing waits for its processes when Python ends.
        self._finalizer = util.Finalize(self, _close, (self._threads, self._tasks), exitpriority=10)

    def submit(self, scorer: int, text: str, columns: Mapping[str, Any], timeout: float | None = None) -> Job:
        """Start scoring a completion by the reward with the index `scorer`; never waits."""
        self.warm_up()
        self._num_open += 1
        task = Task(arguments=(scorer, text, columns), timeout=timeout or self.limits.timeout)
        self._tasks.put(task)
        return Job(scorer=scorer, task=task)

    def result(self, job: Job) -> Outcome:
        """Wait for the score, not longer than the time limits of all open jobs."""
        timeout = job.task.timeout
        wait = GRACE_SECONDS + NUM_TRIES * self._num_open * timeout / self.num_workers
        try:
            score = job.task.future.result(timeout=wait)
        except TimeoutError as error:
            raise RewardError(f"the reward workers have not answered for {wait:.0f} seconds") from error
        finally:
            self._num_open -= 1
        if isinstance(score, str):
            return Outcome(error=score, is_input=True)
        if not score.is_late:
            self._have_answered.add(job.scorer)
        elif job.scorer not in self._have_answered:
            return replace(score, error=f"{score.error}{SLOW_START}")
        return score

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        if self._threads:
            self._finalizer()
            self._threads, self._tasks = [], queue.SimpleQueue()


def _close(threads: Sequence[WorkerThread], tasks: "queue.SimpleQueue[Task | None]") -> None:
    for thread in threads:
        thread.close()
        tasks.put(None)
    for thread in threads:
        thread.join(JOIN_SECONDS)


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
