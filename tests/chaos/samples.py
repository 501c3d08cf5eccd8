"""Samples of the memory and the open files of a run, and their growth."""

import json
import statistics
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

WARM_UP = 60  # steps


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A look at a running process.

    step:      last step in metrics.jsonl
    own:     resident memory of the trainer in MB
    workers: resident memory of its other processes in MB
    files, threads: of the trainer
    processes: number of all its processes
    """

    step: int
    own: float
    workers: float
    files: int
    threads: int
    processes: int


@dataclass(kw_only=True)
class Part:
    """One process of the run, from its start to its end."""

    first_step: int
    ending: str
    last_step: int = 0
    samples: list[Sample] = field(default_factory=list)

    def row(self) -> list[str]:
        """Return the columns of the table."""
        late = self.late()
        if not late:
            return [f"{self.first_step}-{self.last_step}", self.ending, "too short"]
        own, workers = (f"{s.own:.0f}" for s in (late[0], late[-1])), (s.workers for s in late)
        counts = [f"{min(values)}-{max(values)}" for values in (self.values("files"), self.values("threads"))]
        return [
            f"{self.first_step}-{self.last_step}",
            self.ending,
            " to ".join(own),
            f"{self.slope('own'):+.1f}",
            f"{statistics.mean(workers):.0f}",
            f"{self.slope('workers'):+.1f}",
            *counts,
            f"{max(self.values('processes'))}",
        ]

    def late(self) -> list[Sample]:
        """Return the samples after the warm-up, or all if the part is too short."""
        late = [sample for sample in self.samples if sample.step >= self.first_step + WARM_UP]
        return late if len(late) >= 20 else self.samples

    def faults(self, max_slope: float) -> list[str]:
        """Return what grows: files, threads and processes at all, memory faster than `max_slope` MB per 1,000 steps.

        Parts of less than 300 steps are too short for a trend.
        """
        if self.last_step - self.first_step < 300:
            return []
        where = f"steps {self.first_step} to {self.last_step}"
        counts = [name for name in ("files", "threads", "processes") if self.growth(name) > 1]
        memory = [name for name in ("own", "workers") if self.slope(name) > max_slope]
        return [f"{where}: {name} grow by {self.growth(name):.0f}" for name in counts] + [
            f"{where}: memory ({name}) grows by {self.slope(name):.1f} MB per 1,000 steps" for name in memory
        ]

    def values(self, name: str) -> list[float]:
        """Return one value of each late sample."""
        return [getattr(sample, name) for sample in self.late()]

    def growth(self, name: str) -> float:
        """Return the median of the second half of a value's samples, minus that of the first."""
        values = self.values(name)
        half = len(values) // 2
        return statistics.median(values[half:]) - statistics.median(values[:half]) if half else 0.0

    def slope(self, name: str) -> float:
        """Return the growth of a value per 1,000 steps."""
        steps, values = self.values("step"), self.values(name)
        return 1000 * statistics.linear_regression(steps, values).slope if len({*steps}) > 1 else 0.0


def look(process: psutil.Process, metrics: Path) -> Sample:
    """Return a sample of a running process."""
    children = []
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            children.append(child.memory_info().rss / 2**20)
    return Sample(
        step=last_step(metrics),
        own=process.memory_info().rss / 2**20,
        workers=sum(children),
        files=process.num_fds(),
        threads=process.num_threads(),
        processes=1 + len(children),
    )


def last_step(metrics: Path) -> int:
    """Return the step of the last whole record."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2**15))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0
