"""Print the table of the corpus: `python -m tests.bad_input [GROUP ...]`."""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.bad_input.runner import run_group
from tests.bad_input.workspace import GROUPS, make_models

KINDS = ("rejected", "accepted")


def print_table(names: list[str]) -> int:
    """Run the groups, print a row for each and each faulty case; return the number of faulty cases."""
    num_faulty = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder / "models")
        print("| group | cases | rejected in one line | accepted as it should be | faulty | seconds |")
        print("|---|---|---|---|---|---|")
        for path in GROUPS:
            if names and path.stem not in names:
                continue
            start = time.monotonic()
            outcomes = run_group(path, folder / "work", folder / "models")
            counts = Counter(outcome.kind for _, outcome in outcomes)
            faulty = [(case, outcome) for case, outcome in outcomes if outcome.kind not in KINDS]
            num_faulty += len(faulty)
            print(
                f"| {path.stem.replace('_', ' ')} | {len(outcomes)} | {counts['rejected']} | {counts['accepted']} | "
                f"{len(faulty)} | {time.monotonic() - start:.1f} |",
                flush=True,
            )
            for case, outcome in faulty:
                print(f"    {outcome.kind}: {case}: {outcome.detail}", flush=True)
    return num_faulty


if __name__ == "__main__":
    sys.exit(1 if print_table(sys.argv[1:]) else 0)
