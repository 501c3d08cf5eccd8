"""Fill the disk while a run saves: one line, the older checkpoints stay whole, and with room the first resume works.

    python -m tests.chaos.disk

The run folder is a small file system in memory, in several sizes: the run finds it full at its start, while it writes
weights, optimizer or records, or not at all. Then it is enlarged, and the resume must end as the undamaged run, bit by
bit. Where nothing can be mounted (that needs root), a limit of the size of a file stands for the full disk.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rekatrain.trainer.run.checkpoints import find_fault, numbered_checkpoints
from tests.chaos.processes import fork_run
from tests.chaos.runs import all_settings, differences, scratch_folder, write_model, write_workspace
from tests.helpers.forks import Process


def mount(folder: Path, size: int) -> bool:
    """Mount a file system of some bytes; return False if that is not allowed."""
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode
        == 0
    )


def run_in_room(folder: Path, size: int, check: Callable[[Process], str]) -> str:
    """Run in a file system of `size` bytes, check the run, enlarge it and resume; return what went wrong."""
    run = folder / "run"
    run.mkdir()
    is_mounted = mount(run, size)
    try:
        process = fork_run(folder, file_limit=0 if is_mounted else size // 4)
        fault = check(process)
        if not fault:
            if is_mounted:
                subprocess.run(["mount", "-o", f"remount,size={2**26}", run], check=True)
            process = fork_run(folder, "--resume")
            fault = "" if process.wait() == 0 else f"the first resume failed; see {process.log}"
        if not fault:
            shutil.copytree(run, folder / "result")
        return fault
    finally:
        if is_mounted:
            subprocess.run(["umount", run], check=True)


def find_full_disk_fault(process: Process, run: Path) -> str:
    """Return what is wrong with the end of a run on a full disk, or nothing."""
    status, output = process.wait(), process.output()
    last = output.strip().splitlines()[-1]
    if "Traceback" in output:
        return f"a traceback; see {process.log}"
    if status != 0 and (not last.startswith("rekatrain: error: ") or "space" not in last):
        return f"status {status}, and the last line is {last[:200]!r}"
    faults = [fault for path in numbered_checkpoints(run / "checkpoints") if (fault := find_fault(path))]
    return f"a checkpoint is damaged: {faults[0]}" if faults else ""


def main() -> None:
    """Try the sizes, and print each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=8, help="number of sizes per setting")
    options = parser.parse_args()
    folder = scratch_folder()
    model = write_model(folder / "model")
    started, faults = time.monotonic(), []
    for setting in all_settings(1):
        whole = write_workspace(folder / f"{setting}".replace(" ", "-"), model, setting)
        process = fork_run(whole)
        if process.wait() != 0:
            sys.exit(f"{setting}: the undamaged run failed:\n{process.output()[-3000:]}")
        checkpoint = sum(path.stat().st_size for path in (whole / "run" / "checkpoints" / "checkpoint-4").rglob("*"))
        # From less than the start writes to find out, to room for all: two checkpoints, a third, and the records.
        smallest, largest = 2**19, 2**20 + 4 * checkpoint
        for number in range(options.sizes):
            size = smallest + (largest - smallest) * number // max(1, options.sizes - 1)
            work = write_workspace(folder / f"{setting}-{number}".replace(" ", "-"), model, setting)
            statuses: list[int] = []

            def check(process: Process, run: Path = work / "run", statuses: list[int] = statuses) -> str:
                fault = find_full_disk_fault(process, run)
                statuses.append(process.wait())
                return fault

            fault = run_in_room(work, size, check) or "; ".join(differences(whole / "run", work / "result"))
            print(f"{setting!s:<10} {size / 2**20:5.2f} MB  status {statuses[0]}  {fault or 'equal'}", flush=True)
            faults += [fault] if fault else []
    print(f"{4 * options.sizes} runs, {len(faults)} faults; {time.monotonic() - started:,.0f} s")
    if faults:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
