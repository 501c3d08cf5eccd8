"""Train RLOO for long with failing graders, kills and resumes: memory and open files stay flat, no record is lost.

    python -m tests.chaos.soak --steps 2000

The recipe is an adapter with eight completions per step and a scorer that fails at random: it raises, returns nan, ends
its process, aborts, or hangs. The run is ended at random steps by SIGKILL (of the run, or of its main process alone) or
SIGTERM, and resumed. Memory and open files are sampled twice per second; each part's slope is that of the least-squares
line after its first 60 steps. Exits with 1 if a record is missing, doubled or out of order, if a process is left over,
if open files grow, or if memory grows by more than --max-slope.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos.processes import orphans, start_command
from tests.chaos.runs import Setting, scratch_folder, write_model, write_workspace
from tests.chaos.samples import Part, last_step, look
from tests.helpers.forks import Process, kill_tree

ENDINGS = ("SIGKILL of all", "SIGKILL of one", "SIGTERM")
STATUSES = {"finished": 0, "SIGTERM": 75}  # SIGTERM ends a run after a checkpoint
SIZES = {"prompts_per_step": 2, "num_generations": 4, "dynamic_sampling_rounds": 0, "num_iterations": 1}
COMPLETIONS = 8
SAMPLE_SECONDS = 0.5
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


def watch(folder: Path, process: Process, part: Part, until: int | None) -> None:
    """Sample a run until it ends or has taken the step `until`."""
    metrics = folder / "run" / "metrics.jsonl"
    watched = psutil.Process(process.pid)
    sampled = 0.0
    while process.poll() is None:
        if until is not None and last_step(metrics) >= until:
            return
        if time.monotonic() - sampled > SAMPLE_SECONDS:
            sampled = time.monotonic()
            with suppress(psutil.Error):
                sample = look(watched, metrics)
                if sample.step > part.first_step and process.poll() is None:
                    part.samples.append(sample)
        time.sleep(0.02)


def end(process: Process, ending: str) -> None:
    """End a run in the way that its name says."""
    if ending == "SIGKILL of all":
        kill_tree(process.pid)
    else:
        os.kill(process.pid, signal.SIGTERM if ending == "SIGTERM" else signal.SIGKILL)
    process.wait(60)


def find_faults(run: Path, steps: int) -> list[str]:
    """Return what is wrong with the records of a whole run."""
    faults = []
    metrics = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    if metrics != [*range(1, steps + 1)]:
        faults.append(f"metrics.jsonl has {len(metrics)} records, {len({*metrics})} steps")
    rollouts = [json.loads(line)["step"] for line in (run / "rollouts.jsonl").open()]
    if rollouts != sorted(rollouts) or Counter(rollouts) != {step: COMPLETIONS for step in range(1, steps + 1)}:
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


def write_soak(folder: Path, steps: int, failures: float) -> Path:
    """Write the workspace of the soak.

    failures: fraction of completions whose grader fails
    """
    setting = Setting(stage="rloo", form="lora")
    save_steps = max(1, min(50, steps // 10))
    model = write_model(folder / "model")
    workspace = write_workspace(folder / "soak", model, setting, max_steps=steps, save_steps=save_steps, **SIZES)
    with (workspace / "my_rewards.py").open("a") as file:
        file.write(SCORER.replace("{rate}", str(failures)))
    recipe = json.loads((workspace / "recipe.yaml").read_text())
    recipe["rewards"] = {"my_rewards:letters": {"weight": 1.0}, "my_rewards:shaky": {"weight": 0.5}}
    # A short soak has too few completions for the usual limit of errors.
    recipe["scoring"] = {"num_workers": 2, "timeout": 1.0, "max_error_share": 0.9}
    (workspace / "recipe.yaml").write_text(json.dumps(recipe))
    return workspace


def run_part(workspace: Path, number: int, stop: int | None) -> tuple[Part, list[str]]:
    """Start or resume the run, end it at a step, or let it finish; return its samples, and what went wrong."""
    metrics = workspace / "run" / "metrics.jsonl"
    ending = "finished" if stop is None else ENDINGS[number % len(ENDINGS)]
    part = Part(first_step=last_step(metrics), ending=ending)
    process = start_command(workspace, *(["--resume"] if number else []))
    watch(workspace, process, part, stop)
    if stop is not None and process.poll() is None:
        end(process, ending)
    status, output = process.wait(), process.output()
    part.last_step = last_step(metrics)
    faults = [f"still runs after {ending}: {name}" for name in orphans(workspace)]
    if status != STATUSES.get(ending, -signal.SIGKILL):
        faults.append(f"{ending}: status {status}; see {process.log}")
    if ending == "SIGTERM" and not (workspace / "run" / "checkpoints" / f"checkpoint-{part.last_step}").exists():
        faults.append(f"SIGTERM at step {part.last_step}: no checkpoint")
    # The first failure of a reward is logged with its traceback.
    if "Traceback (most" in output.replace("first failure:\nTraceback (most", ""):
        faults.append(f"a traceback in {process.log}")
    return part, faults


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
    workspace = write_soak(folder, options.steps, options.failures)
    parts: list[Part] = []
    faults: list[str] = []
    # Steps are left after each: a fast run goes on for a few of them while it is ended.
    stops = sorted(rng.sample(range(1, max(options.ends, options.steps * 3 // 4) + 1), options.ends))
    started = time.monotonic()
    for number, stop in enumerate([*stops, None]):
        part, found = run_part(workspace, number, stop)
        parts.append(part)
        faults += found
        print(f"{part.ending} at step {part.last_step}, after {time.monotonic() - started:,.0f} s", flush=True)

    faults += find_faults(workspace / "run", options.steps)
    for part in parts:
        faults += part.faults(options.max_slope)
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
