"""Train RLOO for long with failing graders, kills and resumes: memory and open files stay flat, no record is lost.

    python tests/chaos/soak.py --steps 2000

The recipe is an adapter with eight completions per step and a scorer that fails at random: it raises, returns nan, ends
its process, aborts, or hangs. The run is ended at random steps by SIGKILL (of the run, or of its main process alone) or
SIGTERM, and resumed. Memory and open files are sampled twice per second; each part's slope is that of the least-squares
line after its first 60 steps. Exits with 1 if a record is missing, doubled or out of order, if a process is left over,
if open files grow, or if memory grows by more than --max-slope.
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from kill_points import kill_tree
from processes import Process, orphans, start_command
from runs import Setting, scratch_folder, write_model, write_workspace

WARM_UP = 60  # steps
SCORER = '''

import os
import random


def shaky(completion):
    """Return 1 for an answer without text, or fail."""
    kind = random.SystemRandom().choices(
        ["none", "raise", "nan", "exit", "abort", "hang"], [1 - {rate}, *[{rate} / 5] * 5]
    )[0]
    if kind == "raise":
        raise ValueError("a grader that raises")
    if kind == "nan":
        return float("nan")
    if kind == "exit":
        os._exit(7)
    if kind == "abort":
        os.abort()
    while kind == "hang":
        pass
    return 1 / (1 + len(completion.answer))
'''
ERRORS = {
    "raise": "a grader that raises",
    "nan": "nan",
    "exit": "exit code 7",
    "abort": "exit code -6",
    "hang": "no result after",
}


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
    samples: list[Sample] = field(default_factory=list)

    def row(self) -> list[str]:
        """Return the columns of the table."""
        late = self.late()
        own, workers = (f"{s.own:.0f}" for s in (late[0], late[-1])), (s.workers for s in late)
        counts = [f"{min(values)}-{max(values)}" for values in (self.values("files"), self.values("threads"))]
        return [
            f"{self.first_step}-{self.samples[-1].step}",
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
        return late if len(late) >= 2 else self.samples

    def values(self, name: str) -> list[float]:
        """Return one value of each late sample."""
        return [getattr(sample, name) for sample in self.late()]

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


def watch(folder: Path, process: Process, part: Part, until: int) -> None:
    """Sample a run until it ends or has taken the step `until`."""
    metrics = folder / "run" / "metrics.jsonl"
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.Error):
            sample = look(watched, metrics)
            if sample.step > part.first_step:
                part.samples.append(sample)
            if sample.step >= until:
                return
        time.sleep(0.5)


def end(process: Process, ending: str) -> None:
    """End a run in the way that its name says."""
    if ending == "SIGKILL of all":
        kill_tree(process.pid)
    else:
        psutil.Process(process.pid).send_signal(signal.SIGTERM if ending == "SIGTERM" else signal.SIGKILL)
    process.wait(60)


def find_faults(run: Path, steps: int, completions: int) -> list[str]:
    """Return what is wrong with the records of a whole run."""
    faults = []
    metrics = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    if metrics != [*range(1, steps + 1)]:
        faults.append(f"metrics.jsonl has {len(metrics)} records, {len({*metrics})} steps")
    rollouts = [json.loads(line)["step"] for line in (run / "rollouts.jsonl").open()]
    if rollouts != sorted(rollouts) or Counter(rollouts) != {step: completions for step in range(1, steps + 1)}:
        faults.append(f"rollouts.jsonl has {len(rollouts)} records, {len({*rollouts})} steps")
    left = {path.name for path in (run / "checkpoints").iterdir()}
    if len(left) != 2 or f"checkpoint-{steps}" not in left:
        faults.append(f"checkpoints holds {sorted(left)}")
    return faults


def count_errors(rollouts: Path) -> Counter[str]:
    """Return the number of failures of each kind in the rollouts."""
    counts: Counter[str] = Counter()
    for line in rollouts.open():
        for text in json.loads(line)["reward_errors"].values():
            counts[next((kind for kind, part in ERRORS.items() if part in text), text)] += 1
    return counts


def main() -> None:
    """Run the soak, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ends", type=int, default=5, help="number of kills and signals")
    parser.add_argument("--failures", type=float, default=0.03, help="fraction of completions whose grader fails")
    parser.add_argument(
        "--max-slope", type=float, default=30.0, help="MB per 1,000 steps, of parts of 300 steps or more"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)

    folder = scratch_folder()
    sizes = {"prompts_per_step": 2, "num_generations": 4, "dynamic_sampling_rounds": 0, "num_iterations": 1}
    save_steps = max(1, min(50, options.steps // 10))
    setting = Setting(stage="rloo", form="lora")
    workspace = write_workspace(
        folder / "soak", write_model(folder / "model"), setting, max_steps=options.steps, save_steps=save_steps, **sizes
    )
    with (workspace / "my_rewards.py").open("a") as file:
        file.write(SCORER.replace("{rate}", str(options.failures)))
    recipe = json.loads((workspace / "recipe.yaml").read_text())
    recipe["rewards"] = {"my_rewards:letters": {"weight": 1.0}, "my_rewards:shaky": {"weight": 0.5}}
    recipe["scoring"] = {"num_workers": 2, "timeout": 1.0}
    (workspace / "recipe.yaml").write_text(json.dumps(recipe))

    parts: list[Part] = []
    faults: list[str] = []
    stops = sorted(rng.sample(range(1, options.steps), options.ends))
    started = time.monotonic()
    for number, stop in enumerate([*stops, options.steps]):
        ending = ("SIGKILL of all", "SIGKILL of one", "SIGTERM")[number % 3] if stop < options.steps else "finished"
        part = Part(first_step=last_step(workspace / "run" / "metrics.jsonl"), ending=ending)
        process = start_command(workspace, *(["--resume"] if number else []))
        watch(workspace, process, part, stop if ending != "finished" else options.steps + 1)
        if ending != "finished":
            if process.poll() is None:
                end(process, ending)
        elif process.wait() != 0:
            sys.exit(f"the run ended with {process.wait()}:\n{process.output()[-3000:]}")
        if "Traceback (most" in process.output().replace("first failure:\nTraceback (most", ""):
            faults.append(f"a traceback in {process.log}")
        faults += [f"still runs after {ending}: {name}" for name in orphans(workspace)]
        parts.append(part)
        print(f"{ending} at step {part.samples[-1].step}, after {time.monotonic() - started:,.0f} s", flush=True)

    faults += find_faults(workspace / "run", options.steps, sizes["prompts_per_step"] * sizes["num_generations"])
    for part in parts:
        files = part.values("files")
        if max(files) - min(files) > 4:
            faults.append(
                f"open files of steps {part.first_step} to {part.samples[-1].step}: {min(files)}-{max(files)}"
            )
        if part.samples[-1].step - part.first_step >= 300:
            for name in ("own", "workers"):
                if part.slope(name) > options.max_slope:
                    faults.append(
                        f"memory ({name}) from step {part.first_step}: {part.slope(name):+.1f} MB / 1,000 steps"
                    )
    names = ["steps", "ending", "trainer MB", "MB/1,000", "workers MB", "MB/1,000", "files", "threads", "processes"]
    for row in (names, *(part.row() for part in parts)):
        print("".join(f"{cell:>{16 if index == 1 else 13}}" for index, cell in enumerate(row)))
    errors = count_errors(workspace / "run" / "rollouts.jsonl")
    print(
        f"{options.steps} steps, {errors.total()} grader failures: {dict(errors)}; {time.monotonic() - started:,.0f} s"
    )
    if faults:
        sys.exit("\n".join([*faults, f"see {workspace}"]))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
