"""Damage the newest checkpoint, the records and the recipe of a run in every way: each is repaired or reported.

    python -m tests.chaos.damage

The run is killed after its third checkpoint of four. Each file of the checkpoint is truncated, emptied, deleted, and so
on. A resume must do one of these:

    falls back   it names the damaged file, goes on from the checkpoint before, and ends as the undamaged run
    goes on      nothing that is read is damaged: it ends as the undamaged run
    reports      records are gone: it says so, and ends as the undamaged run but for the records
    one line     it cannot go on, and says in one line with exit status 2 what is wrong

Runs are compared bit by bit. Exits with 1 after a traceback, or if a result differs without a word.
"""

import argparse
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from tests.chaos.damages import NEWEST, RESULTS, Case, cases
from tests.chaos.processes import fork_run
from tests.chaos.runs import Setting, all_settings, differences, scratch_folder, write_model, write_workspace


class Workshop:
    """The run of a setting, complete and killed, and copies of it that are damaged."""

    def __init__(self, folder: Path, model: Path, setting: Setting) -> None:
        self.folder = folder / str(setting).replace(" ", "-")
        workspace = write_workspace(self.folder / "whole", model, setting, save_total_limit=None)
        process = fork_run(workspace)
        if process.wait() != 0:
            raise RuntimeError(f"{setting}: the undamaged run failed:\n{process.output()[-3000:]}")
        self.whole = workspace / "run"
        self.killed = shutil.copytree(workspace, self.folder / "killed")
        shutil.rmtree(self.killed / "run" / "checkpoints" / "checkpoint-4")
        self.number = 0

    def outcome(self, case: Case) -> str:
        """Return the outcome of a resume after a damage, or what is wrong with it."""
        self.number += 1
        folder = shutil.copytree(self.killed, self.folder / f"case-{self.number}", symlinks=True)
        run = folder / "run"
        case.damage(run)
        process = fork_run(folder, "--resume")
        status, output = process.wait(), process.output()
        if "Traceback" in output:
            return f"TRACEBACK: {output.strip().splitlines()[-1][:200]}"
        errors = [line for line in output.splitlines() if line.startswith("rekatrain: error: ")]
        if status != 0:
            result = "one line" if status == 2 and len(errors) == 1 and output.endswith(f"{errors[0]}\n") else "UNCLEAR"
            shown = errors[0] if errors else output[-300:]
        else:
            shown = " / ".join(line for line in output.splitlines() if line.startswith(("skipped", "run/")))
            result = self._compare(run, shown)
        if not re.search(case.message, shown):
            return f"{result}, but the line does not say it: {shown[:300]}"
        return result

    def _compare(self, run: Path, shown: str) -> str:
        found = list(differences(self.whole, run))
        left = [
            name for name in found if name.endswith("is left over") and "checkpoint-3" in name
        ]  # the user's, or moved
        others = [name for name in found if name not in left]
        if "skipped" in shown:
            return "falls back" if not others else f"SILENTLY DIFFERENT: {others[:3]}"
        if others and all("jsonl" in name for name in others) and "jsonl" in shown:
            return "reports"
        if others:
            return f"SILENTLY DIFFERENT: {others[:3]}"
        return "reports" if "jsonl" in shown else "goes on"


def main() -> None:
    """Try the cases, and print each and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=4, help="damage each file in each n-th way; above 7, fewer others")
    options = parser.parse_args()
    folder = scratch_folder()
    model = write_model(folder / "model")
    started, counts, num_bad = time.monotonic(), Counter[tuple[str, str]](), 0
    for number, setting in enumerate(all_settings(1)):
        workshop = Workshop(folder, model, setting)
        newest = workshop.killed / "run" / "checkpoints" / NEWEST
        for case in cases(setting, newest, options.every, number):
            outcome = workshop.outcome(case)
            is_good = outcome == case.outcome
            num_bad += not is_good
            counts[str(setting), outcome if outcome in RESULTS else "WRONG"] += 1
            wanted = "" if is_good else f"   <-- expected: {case.outcome}; see {workshop.folder}/case-{workshop.number}"
            print(f"{setting!s:<10} {case.name:<55} {outcome}{wanted}", flush=True)
    columns = [*RESULTS, "WRONG"]
    print(f"\n{'setting':<12}" + "".join(f"{name:>12}" for name in columns))
    for setting in all_settings(1):
        print(f"{setting!s:<12}" + "".join(f"{counts[str(setting), name]:>12}" for name in columns))
    total = sum(counts.values())
    print(f"{total} cases, {num_bad} other than expected; {time.monotonic() - started:,.0f} s")
    if num_bad:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
