"""Kill runs at random moments and at chosen file operations: the first resume must work, and end with the same bits.

    python -m tests.chaos.kills --kills 100

SFT and RLOO, full and LoRA, on one process (8 of 100 kills are of `python -m rekatrain`, the others of forks of a warm
process) and under ZeRO-3 on two (4 of 100 by the real launcher, 12 in forks). Every fifth kill is double: the resume is
killed too. The uninterrupted run of each setting is the expectation: every file of its run folder is compared byte by
byte, timings excepted. Exits with 1 if anything is different.
"""

import argparse
import random
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.kill_points import KillPoint, Scope
from tests.chaos.processes import fork_run, orphans, start_command
from tests.chaos.runs import (
    Setting,
    all_settings,
    differences,
    scratch_folder,
    take_own_files,
    write_model,
    write_own_files,
    write_workspace,
)
from tests.helpers.forks import Process, kill_tree

MAX_DELAY = 0.02  # seconds: a checkpoint of the tiny model is written in less
SHARES = {"launch": 0.04, "forked launch": 0.12, "command": 0.08}  # the other kills are of forks


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The uninterrupted run of a setting: its run folder, its seconds, and the number of file operations by rank."""

    run: Path
    seconds: float
    operations: list[int]


@dataclass(kw_only=True)
class Kill:
    """A kill and its outcome.

    way:      "fork", "command", "launch" or "forked launch"
    moments:  when the run died, and when its resume died
    problems: what went wrong
    """

    setting: Setting
    way: str
    moments: list[str] = field(default_factory=list)
    resumed: bool = False
    equal: bool = False
    problems: list[str] = field(default_factory=list)


class Campaign:
    """Kills runs in folders below `folder`; the seed decides when."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.model = write_model(folder / "model")
        self.references: dict[tuple[Setting, str], Reference] = {}
        self.number = 0

    def reference(self, setting: Setting, way: str) -> Reference:
        """Return the uninterrupted run of a setting, made when it is first needed."""
        key = (setting, way)
        if key not in self.references:
            folder = write_workspace(self.folder / f"whole-{len(self.references)}", self.model, setting)
            started = time.monotonic()
            counting = KillPoint(folder=str(folder / "run"), report=str(folder / "count"), rank=None)
            process = self.start(folder, setting, way, counting)
            if process.wait() != 0:
                raise RuntimeError(f"{setting}: the uninterrupted run failed:\n{process.output()[-3000:]}")
            seconds = time.monotonic() - started
            counts = [folder / f"count-{rank}" for rank in range(setting.processes)]
            operations = [int(path.read_text()) if path.exists() else 0 for path in counts]
            self.references[key] = Reference(run=folder / "run", seconds=seconds, operations=operations)
        return self.references[key]

    def start(self, folder: Path, setting: Setting, way: str, point: KillPoint | None, *arguments: str) -> Process:
        """Start a run in one of the ways."""
        if way in ("fork", "forked launch"):
            return fork_run(folder, *arguments, point=point, processes=setting.processes)
        return start_command(folder, *arguments, point=point, processes=setting.processes)

    def kill(self, setting: Setting, way: str, *, double: bool) -> Kill:
        """Kill a run, and its resume too if `double`; resume it to the end, and compare."""
        reference = self.reference(setting, way)
        self.number += 1
        kill = Kill(setting=setting, way=way)
        folder = write_workspace(self.folder / f"kill-{self.number}", self.model, setting)
        for arguments in ([], ["--resume"])[: 1 + double]:
            self._kill_once(kill, folder, reference, arguments)
            if kill.problems:
                return kill
        has_own = (folder / "run" / "recipe.yaml").exists()  # before, files of others are an error
        if has_own:
            write_own_files(folder)
        process = self.start(folder, setting, way, None, "--resume")
        status = process.wait()
        kill.resumed = status == 0 and "Traceback" not in process.output()
        if not kill.resumed:
            kill.problems.append(f"the first resume ended with {status}; see {process.log}")
            return kill
        lost = take_own_files(folder) if has_own else []
        kill.problems += [f"the user's {name} is gone" for name in lost]
        found = list(differences(reference.run, folder / "run"))
        kill.equal = not found
        kill.problems += found + [f"still runs: {name}" for name in orphans(folder)]
        if not kill.problems:
            shutil.rmtree(folder)
        return kill

    def _kill_once(self, kill: Kill, folder: Path, reference: Reference, arguments: list[str]) -> None:
        """Start a run and kill it at a random moment; draw an earlier moment if a first run ends before."""
        latest = 0.5 if arguments else 0.95  # a resume has less to do
        status = 0
        while status == 0:
            kind = self.random.choice(["before operation", "after operation", "after seconds"])
            fraction = latest * self.random.random()
            scope: Scope = self.random.choice(["tree", "process"])
            if kind == "after seconds":
                moment = f"after {fraction * reference.seconds:.2f} s"
                process = self.start(folder, kill.setting, kill.way, None, *arguments)
                time.sleep(fraction * reference.seconds)
                kill_tree(process.pid)
            else:
                rank = self.random.choice([rank for rank, number in enumerate(reference.operations) if number])
                number = 1 + int(fraction * reference.operations[rank])
                delay = self.random.uniform(0.001, MAX_DELAY) if kind == "after operation" else 0.0
                moment = f"{scope}, {delay * 1e3:.0f} ms {kind} {number} of rank {rank}"
                point = KillPoint(folder=str(folder / "run"), report="", at=number, delay=delay, scope=scope, rank=rank)
                process = self.start(folder, kill.setting, kill.way, point, *arguments)
            status = process.wait()
            if arguments and status == 0:
                moment = "ended before its kill"
                break
            if status == 0:
                shutil.rmtree(folder / "run")
                latest *= 0.7
        kill.moments.append(moment)
        if status not in (0, -9) and kill.setting.processes == 1:
            kill.problems.append(f"the run ended with {status} before its kill; see {process.log}")
        kill.problems += [f"still runs after a kill: {name}" for name in orphans(folder)]


def plan(number: int, settings: int = 4) -> list[tuple[Setting, str]]:
    """Return the setting and the way of each kill, in turn over the settings."""
    counts = {way: round(number * share / settings) * settings for way, share in SHARES.items()}
    ways = ["fork"] * (number - sum(counts.values())) + [way for way, count in counts.items() for _ in range(count)]
    return [(all_settings(2 if "launch" in way else 1)[index % settings], way) for index, way in enumerate(ways)]


def table(kills: list[Kill]) -> str:
    """Return the outcome by setting."""
    lines = [f"{'setting':<18}{'kills':>7}{'doubled':>9}{'first resumes that worked':>27}{'bitwise equal':>15}"]
    groups: dict[str, list[Kill]] = defaultdict(list)
    for kill in kills:
        groups[str(kill.setting)].append(kill)
    for name, group in (*groups.items(), ("all", kills)):
        doubled = sum(len(kill.moments) > 1 for kill in group)
        resumed, equal = sum(kill.resumed for kill in group), sum(kill.equal for kill in group)
        lines.append(f"{name:<18}{len(group):>7}{doubled:>9}{resumed:>27}{equal:>15}")
    return "\n".join(lines)


def main() -> None:
    """Make the kills, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = scratch_folder()
    campaign, kills, started = Campaign(folder, options.seed), [], time.monotonic()
    for number, (setting, way) in enumerate(plan(options.kills), start=1):
        kill = campaign.kill(setting, way, double=number % 5 == 0)
        kills.append(kill)
        moments = "; then ".join(kill.moments)
        print(
            f"{number:>4} {kill.setting!s:<18} {way:<14} {moments}: {'; '.join(kill.problems) or 'equal'}", flush=True
        )
    print(f"\n{table(kills)}\n{time.monotonic() - started:,.0f} s, seed {options.seed}")
    if any(kill.problems for kill in kills):
        sys.exit(f"see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
