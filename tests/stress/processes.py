"""Take RLOO steps on 2 to 4 processes with uneven work, and compare them with one process.

    python tests/stress/processes.py           # four cases on two processes
    python tests/stress/processes.py --long    # random cases under data parallelism and ZeRO 1 to 3; prints a table

Processes differ in the lengths of their completions, so in micro-batches and in chunks of the LM head; they have split
groups, groups without a signal, or none with one; one process is slow. `cases.py` draws such runs. All runs on so many
processes share a launch, because its start costs more than a run; after a failure the others go on in a new launch.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402  # after the environment
from tabulate import tabulate  # noqa: E402

from tests.end_to_end.small_runs import records, weights  # noqa: E402
from tests.helpers.forks import Launch, start_forked  # noqa: E402
from tests.stress.cases import (  # noqa: E402
    COMBINED,
    Case,
    combined_case,
    draw_case,
    long_case,
    total_tokens,
    write_case,
    write_files,
)

ENGINES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
TOLERANCE = 1e-5
LAUNCH_SECONDS = 1800
# Parts of the names of metrics that depend on the clock.
CLOCKS = ("time/", "tokens_per_second", "/seconds", "memory/")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A case on several processes under one engine.

    sequence_parallel: number of processes that split each sequence
    is_resumed:        True where one process takes the first step, and the others go on from its checkpoint
    """

    case: Case
    engine: str
    num_processes: int
    sequence_parallel: int = 1
    is_resumed: bool = False

    @property
    def name(self) -> str:
        """Name of the run folder."""
        resumed = "-resumed" if self.is_resumed else ""
        return f"{self.case.name}-{self.engine}-{self.sequence_parallel}-of-{self.num_processes}{resumed}"


def run_alone(folder: Path, runs: Sequence[Run]) -> None:
    """Run each case on this one process, and the first step of runs that are resumed."""
    from rekatrain.trainer.cli import main

    for case in {run.case.name: run.case for run in runs}.values():
        main(["train", str(write_case(folder, case, case.name))])
    for run in runs:
        if run.is_resumed:
            main(["train", str(write_case(folder, run.case, run.name)), "rloo.max_steps=1"])


def launch(folder: Path, runs: Sequence[Run]) -> dict[str, str]:
    """Run all on their number of processes, data parallelism first -> the error of each run that failed, by name.

    Accelerate keeps DeepSpeed once a process has run under it: so data parallelism comes first.
    """
    errors: dict[str, str] = {}
    left = sorted(runs, key=lambda run: ENGINES[run.engine])
    while left:
        done, stderr = _launch_once(folder, left)
        if done < len(left):
            errors[left[done].name] = _cause(stderr)
        left = left[done + 1 :]
    return errors


def _launch_once(folder: Path, runs: Sequence[Run]) -> tuple[int, str]:
    """Run one after the other until one fails -> the number of those that ended well, and the output."""
    listed = [
        {
            "environment": {
                "ACCELERATE_USE_DEEPSPEED": str(run.engine != "ddp").lower(),
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(ENGINES[run.engine]),
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(run.engine == "zero3").lower(),
                "ACCELERATE_USE_PARALLELISM_CONFIG": str(run.sequence_parallel > 1).lower(),
                "PARALLELISM_CONFIG_SP_SIZE": str(run.sequence_parallel),
            },
            "arguments": [
                "train",
                str(write_case(folder, run.case, run.name)),
                *(["--resume"] if run.is_resumed else []),
            ],
            "tokens_per_chunk": run.case.tokens_per_chunk,
        }
        for run in runs
    ]
    (folder / "cases.json").write_text(json.dumps(listed))
    report = folder / "done"
    report.write_text("")
    worker = str(Path(__file__).with_name("worker.py"))
    launch = Launch(num_processes=runs[0].num_processes)
    process = start_forked(folder, worker, "cases.json", "done", launch=launch)
    try:
        status, late = process.wait(LAUNCH_SECONDS), ""
    except TimeoutError as error:
        status, late = -9, f"\n{error}"
    done = len(report.read_text().splitlines())
    return (len(runs) if status == 0 else done), process.output() + late


def _cause(stderr: str) -> str:
    """Return the first line that names an error, or the end of the output."""
    lines = [line for line in stderr.splitlines() if "Error" in line or line.startswith("rekatrain: error")]
    return lines[0] if lines else stderr[-500:]


def compare(one: Path, many: Path) -> str:
    """Compare the run folder of one process with that of several -> the first difference, or nothing."""
    ours, theirs = (records(path, "rollouts.jsonl") for path in (one, many))
    if len(ours) != len(theirs):
        return f"{len(ours)} records, and {len(theirs)} of several processes"
    for mine, its in zip(ours, theirs, strict=True):
        if mine["completion_ids"] != its["completion_ids"]:
            return f"step {mine['step']}, prompt {mine['prompt_index']}: another completion"
    for mine, its in zip(ours, theirs, strict=True):
        for key, value in mine.items():
            if not _is_close(value, its[key], key):
                place = f"step {mine['step']}, prompt {mine['prompt_index']}"
                return f"{place}: {key} is {value}, and {its[key]} on several processes"[:200]
    for mine, its in zip(records(one), records(many), strict=True):
        for key, value in mine.items():
            if not any(clock in key for clock in CLOCKS) and not _is_close(value, its[key], key):
                return f"step {mine['step']}: {key} is {value}, and {its[key]} on several processes"
    return _compare_weights(one, many, mine["step"])


def _is_close(mine: Any, its: Any, key: str) -> bool:
    """Compare numbers of JSON; sums over a sequence and norms are compared relatively.

    A KL, and the mismatch of sampler and trainer, are differences of such sums, and may be nothing but rounding.
    """
    if not isinstance(mine, float) or not isinstance(its, float):
        return bool(mine == its)
    is_difference = "kl" in key or "mismatch" in key
    return math.isclose(mine, its, rel_tol=1e-4, abs_tol=TOLERANCE * 10 if is_difference else TOLERANCE)


def _compare_weights(one: Path, many: Path, step: int) -> str:
    ours, theirs = weights(one, step), weights(many, step)
    assert ours.keys() == theirs.keys()
    distance = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    return "" if distance <= TOLERANCE else f"weights differ by {distance:.1e}"


def run_matrix(folder: Path, runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Run all, alone and launched, in the working folder -> the problem of each, or nothing."""
    write_files(folder)
    run_alone(folder, runs)
    errors: dict[str, str] = {}
    for num_processes in sorted({run.num_processes for run in runs}):
        errors |= launch(folder, [run for run in runs if run.num_processes == num_processes])
    return [
        (run, errors[run.name] if run.name in errors else compare(folder / run.case.name, folder / run.name))
        for run in runs
    ]


def long_runs(seeds: range, numbers: Sequence[int]) -> list[Run]:
    """All engines on each number of processes, for each seed and for the case with the engine's own chunks.

    Sequences are whole, and split among 2 and 4 processes where those divide the number of processes. Of `COMBINED`
    they are split, also in runs that one process has begun.
    """
    whole_or_split = [
        Run(case=case, engine=engine, num_processes=number, sequence_parallel=size)
        for number in numbers
        for case in [long_case(number), *(draw_case(seed) for seed in seeds)]
        for engine in ENGINES
        for size in (1, 2, 4)
        if number % size == 0
    ]
    return whole_or_split + [
        Run(case=case, engine=engine, num_processes=number, sequence_parallel=size, is_resumed=is_resumed)
        for number in numbers
        for is_lora in (False, True)
        for case in (combined_case(name, is_lora=is_lora) for name in COMBINED)
        for engine in ENGINES
        for size in (2, 4)
        for is_resumed in (False, True)
        if number % size == 0
        and not (engine == "zero3" and case.rloo.get("fused_lm_head"))
        and case.rloo["max_steps"] > is_resumed
    ]


def short_runs() -> list[Run]:
    """Runs on two processes: the engine's own chunks and no micro-batch on one; chunks of 7 tokens and ZeRO-3.

    The second also with sequences that the two processes split, as are those with other losses, heads and engines.
    """
    drawn = draw_case(0, prompts_per_step=6)
    return [
        Run(case=long_case(2), engine="ddp", num_processes=2),
        Run(case=drawn, engine="zero3", num_processes=2),
        Run(case=drawn, engine="zero3", num_processes=2, sequence_parallel=2),
        Run(case=combined_case("k2-cutoffs"), engine="zero1", num_processes=2, sequence_parallel=2),
        Run(
            case=combined_case("weights-fused", is_lora=True),
            engine="zero2",
            num_processes=2,
            sequence_parallel=2,
            is_resumed=True,
        ),
    ]


def print_table(folder: Path, results: Sequence[tuple[Run, str]]) -> None:
    """Print a line per run."""
    rows = []
    for run, problem in results:
        tokens = total_tokens(records(folder / run.case.name, "rollouts.jsonl"))
        cells = [run.case.name, run.num_processes, run.sequence_parallel, run.engine, tokens, problem or "equal"]
        rows.append(cells)
    print(tabulate(rows, headers=["case", "processes", "per sequence", "engine", "tokens", "against one process"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="all engines, random cases")
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 8], help="first and last + 1, of the long form")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3, 4], help="of the long form")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="of the long form")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        runs = long_runs(range(*options.seeds), options.processes) if options.long else short_runs()
        runs = [run for run in runs if not options.long or run.engine in options.engines]
        os.chdir(name)
        sys.path.append(name)  # the reward
        results = run_matrix(Path(name), runs)
        print_table(Path(name), results)
    problems = [(run, problem) for run, problem in results if problem]
    for run, problem in problems:
        print(f"\n{run.name}\n{run.case}\n{problem}")
    print(
        f"\n{len(results) - len(problems)} of {len(results)} runs equal one process; {time.monotonic() - began:.0f} s"
    )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
