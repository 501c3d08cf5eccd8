"""Measure how fast generated code is run in the sandbox.

    python tests/benchmarks/sandbox.py [--help]

programs/s: a program that adds the numbers of its input. asserts/s: rows of three statements that call a function; each
row has two sandboxes. `numpy`: the code imports it. The threads stand for reward workers, which have one server of
sandboxes each; here they share one.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).parents[2]
PROGRAM = "print(sum(map(int, input().split())))"
FUNCTION = "def add(a, b):\n    return a + b"
STATEMENTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add('a', 'b') == 'ab'"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=400, help="programs, and rows, of each measurement (400)")
    parser.add_argument("--threads", type=int, default=2, help="sandboxes at the same time (2)")
    parser.add_argument("--json", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    sys.path.insert(0, str(PROJECT))
    figures = measure(options.programs, options.threads)
    for name, value in figures.items():
        print(f"{name:45} {value:10,.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))


def measure(num_runs: int, num_threads: int) -> dict[str, float]:
    """Return programs and asserts per second at both levels of isolation."""
    from rekatrain.rewards.code.launcher import Isolation, Limits
    from rekatrain.rewards.code.packages import package_folders
    from rekatrain.rewards.code.sandbox import run_program, run_tests

    limits = Limits(seconds=30.0, total=60.0, processes=4)
    tests = {"asserts": STATEMENTS, "setup": "", "prefix": "", "entry_point": ""}
    levels: tuple[Isolation, ...] = ("namespaces", "rlimits")
    figures: dict[str, float] = {}

    def time_of(run: Callable[[int], None]) -> float:
        run(0)  # starts the server
        started = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(run, range(num_runs)))
        return time.perf_counter() - started

    for level in levels:
        for kind, imports in (("", ""), (", numpy", "import numpy\n")):
            paths = package_folders() if imports else []

            def program(_: int, level: Isolation = level, imports: str = imports, paths: list[str] = paths) -> None:
                outcome = run_program(imports + PROGRAM, stdin=b"1 2", limits=limits, isolation=level, paths=paths)
                assert outcome.output == b"3\n", outcome

            def row(_: int, level: Isolation = level, imports: str = imports, paths: list[str] = paths) -> None:
                passed = run_tests([imports + FUNCTION], tests, limits=limits, isolation=level, paths=paths)
                assert passed == [True] * len(STATEMENTS), passed

            figures[f"{level}{kind}, programs/s"] = num_runs / time_of(program)
            figures[f"{level}{kind}, asserts/s"] = num_runs * len(STATEMENTS) / time_of(row)
    figures["load of the machine before, processes"] = os.getloadavg()[0]
    return figures


if __name__ == "__main__":
    main()
