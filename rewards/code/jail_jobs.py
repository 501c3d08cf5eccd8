"""The jobs inside the sandbox: a program, a solution that answers calls, or the tests that call it.

A solution and its tests are in two sandboxes; jail_solution.py and jail_tests.py are the two sides.
"""

import builtins
import importlib
import io
import os
import sys
import threading
from typing import Any

# Beside this file, which is in no package inside the sandbox; imported while the file tree can still be seen.
jail_solution: Any = importlib.import_module("jail_solution")
jail_tests: Any = importlib.import_module("jail_tests")

STANDARD_FILES = {"/dev/stdin": 0, "/proc/self/fd/0": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def run(job: dict[str, Any], channels: list[int]) -> None:
    """Run the job of this sandbox; never return."""
    sys.setrecursionlimit(10_000 if job["kind"] == "program" else 3_000)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # Python without the module `site` has none
    if job.get("paths"):
        sys.path.extend(job["paths"])
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # each thread of numpy reserves memory
    if job["kind"] == "program":
        run_program(job["source"])
    elif job["kind"] == "solution":
        jail_solution.serve(job["sources"], os.fdopen(channels[0]), os.fdopen(channels[1], "w"))
    else:
        jail_tests.run_tests(job, os.fdopen(channels[0]), os.fdopen(channels[1], "w"), channels[2])
    sys.stdout.flush()
    os._exit(0)


def run_program(source: str) -> None:
    """Run a whole program, as `python program.py` would."""
    sys.argv = ["program.py"]
    open_file = io.open

    def open_standard(file: Any, *arguments: Any, **named: Any) -> Any:
        """Open a file; the standard ones by their descriptors, for there is no /proc."""
        name = os.fspath(file) if isinstance(file, os.PathLike) else file
        return open_file(os.dup(STANDARD_FILES[name]) if name in STANDARD_FILES else file, *arguments, **named)

    builtins.open = io.open = open_standard
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__dict__["__builtins__"] = builtins
    exec(compile(source, "program.py", "exec"), main.__dict__)
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
