"""The sandbox for generated code, from outside: run a program, or a solution with its tests, and end it at a limit.

`isolation="namespaces"`: the code sees the interpreter's files, read only, and a fresh folder in memory; it sees no
process but its own. `isolation="rlimits"`, where the kernel or a container forbids namespaces: Landlock hides all files
but the interpreter's, and the code can write none. In both, a filter of system calls leaves it no network, processes,
memory outside its address space, or way to signal others. SECURITY.md says what was tested.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from rekatrain.data.errors import InputError
from rekatrain.rewards.code.launcher import Isolation, Limits, start_sandbox
from rekatrain.rewards.code.pipes import memory_file, read, read_verdicts
from rekatrain.rewards.errors import RewardError

# Threads of the tests beside those that the code may have: they may call it from several at once.
TEST_THREADS = 16
# Written and run by a program that shows that this machine can make a sandbox.
TRIAL = "import threading\nt = threading.Thread(target=print, args=(6 * 7,))\nt.start()\nt.join()"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a run, and its standard output up to there.

    ending:  exited on its own, or ended at the limit of its time or its output
    code:    exit code if it exited; negative or above 128 for a signal
    seconds: from the start of the code, without that of its sandbox
    """

    ending: Literal["exited", "time", "output"]
    code: int
    output: bytes
    seconds: float


def run_program(
    source: str,
    *,
    stdin: bytes,
    limits: Limits,
    isolation: Isolation,
    paths: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a Python program on the input `stdin`; raise RewardError if the sandbox could not be made.

    paths: folders of packages that it can import beside the standard library
    files: texts that it can open by these names
    """
    input_file = memory_file("stdin", stdin)
    output_out, output_in = os.pipe()
    job = {"kind": "program", "source": source, "files": dict(files or {})}
    with (
        os.fdopen(output_out, "rb", buffering=0),
        start_sandbox(job, limits, isolation, stdio=(input_file, output_in), paths=paths) as sandbox,
    ):
        sandbox.wait_until_started()
        started = time.monotonic()
        output, ending = read(output_out, limits.output, limits.seconds)
        seconds = time.monotonic() - started
        code = sandbox.exit_code(limits.seconds - seconds) if ending == "closed" else None
        seconds = time.monotonic() - started
    if code is not None:
        return Outcome(ending="exited", code=code, output=output, seconds=seconds)
    ended: Literal["time", "output"] = "output" if ending == "output" else "time"
    return Outcome(ending=ended, code=-signal.SIGKILL, output=output, seconds=seconds)


def run_tests(
    solutions: list[str],
    tests: Mapping[str, Any],
    *,
    limits: Limits,
    isolation: Isolation,
    paths: Sequence[str] = (),
) -> list[bool]:
    """Return for each of `tests["asserts"]` whether the first of `solutions` that is valid Python passes it.

    tests: `asserts`, Python statements; `setup`, run before them; `prefix` and `entry_point`, if not empty: code that
    the tests may use, and the only name that they then take from the solution. Each side has a separate sandbox.
    Raises RewardError if the tests cannot run, whatever the solution is.
    """
    calls_out, calls_in = os.pipe()
    answers_out, answers_in = os.pipe()
    verdicts_out, verdicts_in = os.pipe()
    num_tests = len(tests["asserts"])
    with (
        os.fdopen(verdicts_out, "rb", buffering=0),
        start_sandbox(
            {"kind": "solution", "sources": solutions},
            limits,
            isolation,
            channels=(calls_out, answers_in),
            paths=paths,
        ) as solution,
        start_sandbox(
            {"kind": "tests", "sources": solutions, **tests},
            replace(limits, processes=limits.processes + TEST_THREADS),
            isolation,
            channels=(answers_out, calls_in, verdicts_in),
            paths=paths,
        ) as tester,
    ):
        solution.wait_until_started()
        tester.wait_until_started()
        verdicts = read_verdicts(verdicts_out, num_tests, seconds=limits.seconds, total=limits.total or limits.seconds)
        if len(verdicts.passed) < num_tests:
            solution.exit_code(0)
            tester.exit_code(0)
    if verdicts.fault:
        raise RewardError(f"the tests cannot run: {verdicts.fault}")
    return [*verdicts.passed, *[False] * (num_tests - len(verdicts.passed))]


def check_isolation(isolation: Isolation) -> None:
    """Raise InputError if this machine cannot provide that isolation."""
    problem = _problem(isolation)
    if problem:
        advice = {
            "namespaces": "run as root or allow user namespaces (in a container: --security-opt seccomp=unconfined), "
            "or set isolation: rlimits, which needs Landlock instead",
            "rlimits": "it needs Landlock (Linux 5.13, in the kernel's list of security modules) and seccomp; "
            "run on a machine that has them, or where isolation: namespaces works",
        }
        raise InputError(f"this machine cannot isolate generated code by {isolation}: {problem}; {advice[isolation]}")


def check_memory(megabytes: int, isolation: Isolation) -> None:
    """Raise InputError if Python cannot run in that memory, or if this process cannot give it to a sandbox."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY and megabytes << 20 > hard:
        raise InputError(
            f"memory_limit_mb is {megabytes}, but scoring.memory_limit_gb allows a worker {hard >> 20} MiB: raise it, "
            "or lower memory_limit_mb"
        )
    if not _runs_in(megabytes, isolation):
        raise InputError(f"memory_limit_mb is {megabytes}, in which Python hardly starts: raise it")


@cache
def _runs_in(megabytes: int, isolation: Isolation) -> bool:
    limits = Limits(seconds=30, memory=megabytes << 20)
    source = "import collections, decimal, re\nx = bytearray(4 << 20)\nprint(6 * 7)"
    try:
        return run_program(source, stdin=b"", limits=limits, isolation=isolation).output == b"42\n"
    except RewardError:
        return False


@cache
def _problem(isolation: Isolation) -> str:
    """Return why the sandbox cannot be made here; "" if it can."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, not {sys.platform}"
    limits = Limits(seconds=30, processes=2)
    try:
        outcome = run_program(TRIAL, stdin=b"", limits=limits, isolation=isolation)
    except RewardError as error:
        return str(error)
    return "" if outcome.output == b"42\n" else f"a trial run returned {outcome}"
