"""The sandbox for generated code, from outside: start it, feed it, and end it at a limit.

`isolation="namespaces"`: the code sees the interpreter's files, read only, and a fresh folder in memory; it has no
network, sees no process but its own and cannot signal another. `isolation="rlimits"`: limits only, for machines whose
kernel or container forbids namespaces; the code can read the files and use the network of its user. rewards/README.md
says against which attacks neither protects.
"""

import itertools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rekatrain.data.errors import InputError
from rekatrain.rewards.code.pipes import memory_file, read, read_verdicts
from rekatrain.rewards.errors import RewardError

Isolation = Literal["namespaces", "rlimits"]

JAIL = Path(__file__).with_name("jail.py")
_numbers = itertools.count(os.getpid() * 1_000)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one run, in bytes and seconds.

    seconds:   wall-clock time of a program, or of one of the tests
    total:     seconds of all the tests together; None: as `seconds`
    memory:    address space of each process
    processes: processes and threads of a sandbox at the same time
    output:    standard output; a program that writes more is ended
    files:     all files in its folder together
    """

    seconds: float = 5.0
    total: float | None = None
    memory: int = 1 << 30
    processes: int = 1
    output: int = 16 << 20
    files: int = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a run, and its standard output up to there.

    ending: exited on its own, or ended at the limit of its time or its output
    code:   exit code if it exited; negative or above 128 for a signal
    """

    ending: Literal["exited", "time", "output"]
    code: int
    output: bytes


def run_program(
    source: str, *, stdin: bytes, limits: Limits, isolation: Isolation, visible: Sequence[str] = ()
) -> Outcome:
    """Run a Python program on the input `stdin`; raise RewardError if the sandbox could not be made.

    visible: folders of packages that it can import beside the standard library
    """
    input_file = memory_file("stdin", stdin)
    output_out, output_in = os.pipe()
    with (
        os.fdopen(output_out, "rb", buffering=0),
        start_sandbox(
            {"kind": "program", "source": source, "paths": list(visible)},
            limits,
            isolation,
            stdio=(input_file, output_in),
            visible=visible,
        ) as sandbox,
    ):
        output, ending = read(output_out, limits.output, limits.seconds)
        if ending == "time" or ending == "output":
            return Outcome(ending=ending, code=-signal.SIGKILL, output=output)
        return Outcome(ending="exited", code=sandbox.exit_code(), output=output)


def run_tests(
    solutions: list[str],
    tests: Mapping[str, Any],
    *,
    limits: Limits,
    isolation: Isolation,
    visible: Sequence[str] = (),
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
    paths = {"paths": list(visible)}
    solution_job = {"kind": "solution", "sources": solutions, **paths}
    tests_job = {"kind": "tests", **tests, **paths}
    with (
        os.fdopen(verdicts_out, "rb", buffering=0),
        start_sandbox(solution_job, limits, isolation, channels=(calls_out, answers_in), visible=visible) as solution,
        start_sandbox(
            tests_job, limits, isolation, channels=(answers_out, calls_in, verdicts_in), visible=visible
        ) as tester,
    ):
        verdicts = read_verdicts(verdicts_out, num_tests, seconds=limits.seconds, total=limits.total or limits.seconds)
        if len(verdicts) < num_tests:
            solution.check_made()
            tester.check_made()
    verdicts, fault, reason = verdicts.partition(b"!")
    if fault:
        raise RewardError(f"the tests cannot run: {reason.decode(errors='replace')}")
    passed = [verdict == ord("1") for verdict in verdicts]
    return passed + [False] * (num_tests - len(passed))


def check_isolation(isolation: Isolation) -> None:
    """Raise InputError if this machine cannot provide that isolation."""
    problem = _problem(isolation)
    if problem:
        raise InputError(
            f"this machine cannot isolate generated code by {isolation}: {problem}; run as root or allow user "
            "namespaces (in a container: --security-opt seccomp=unconfined), or set isolation: rlimits, which "
            "limits time and memory but leaves files and network open to the code"
        )


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
    try:
        outcome = run_program("print(6 * 7)", stdin=b"", limits=Limits(seconds=30), isolation=isolation)
    except RewardError as error:
        return str(error)
    return "" if outcome.output == b"42\n" else f"a trial run returned {outcome}"


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A running sandbox; `status` is a pipe that holds the reason if it could not be made."""

    process: subprocess.Popen[bytes]
    status: int

    def check_made(self) -> None:
        """Raise RewardError if the sandbox could not be made, so that its code never ran."""
        problem = os.read(self.status, 1_000) if select.select([self.status], [], [], 0)[0] else b""
        if problem:
            raise RewardError(f"the sandbox could not be made: {problem.decode()}")

    def exit_code(self) -> int:
        """Return the exit code of a sandbox that has closed its output and so is about to end."""
        code = self.process.wait()
        self.check_made()
        return code


@contextmanager
def start_sandbox(
    job: dict[str, Any],
    limits: Limits,
    isolation: Isolation,
    *,
    channels: tuple[int, ...] = (),
    stdio: tuple[int, int] = (subprocess.DEVNULL, subprocess.DEVNULL),
    visible: Sequence[str] = (),
) -> Iterator[Sandbox]:
    """Yield a sandbox that runs `job` and owns `channels` and `stdio`; end it with all its processes on exit.

    visible: absolute paths that the sandbox can read beside the interpreter's
    """
    status_out, status_in = os.pipe()
    with _make_folder(job, isolation) as folder, os.fdopen(status_out, "rb", buffering=0):
        settings = {
            "isolation": isolation,
            "folder": folder,
            "folder_bytes": limits.files,
            "visible": [*_visible(), *visible],
            "number": next(_numbers),
            "cpu_seconds": int(limits.total or limits.seconds) + 1,
            "memory": limits.memory,
            "processes": limits.processes,
            "file_bytes": limits.files,
        }
        job_file = memory_file("job", json.dumps({**job, **settings}).encode())
        inherited = (job_file, status_in, *channels)
        try:
            process = subprocess.Popen(
                [os.path.realpath(sys.executable), "-I", "-S", "-B", str(JAIL), *map(str, inherited)],
                stdin=stdio[0],
                stdout=stdio[1],
                stderr=subprocess.DEVNULL,
                pass_fds=inherited,
                env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
            )
        finally:
            for descriptor in (*inherited, *stdio):
                if descriptor >= 0:  # DEVNULL is not
                    os.close(descriptor)
        with process:
            try:
                yield Sandbox(process=process, status=status_out)
            finally:
                with suppress(ProcessLookupError):  # it has ended on its own
                    os.killpg(process.pid, signal.SIGKILL)


def _make_folder(job: Mapping[str, Any], isolation: Isolation) -> AbstractContextManager[str]:
    """Return a context with a fresh folder on disk for a job that needs one, else with "".

    In namespaces the folder is in memory. A verifier writes nothing, and would leave its folder behind when its worker
    is killed.
    """
    if isolation == "namespaces" or job["kind"] == "verifier":
        return nullcontext("")
    return tempfile.TemporaryDirectory(prefix="sandbox-")


@cache
def _visible() -> list[str]:
    """Return the paths of this machine that Python needs."""
    paths = ["/usr", sys.base_prefix, "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path) and not os.path.islink(path)]
