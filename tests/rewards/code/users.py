"""Run programs in sandboxes from a separate process, as another user than root, or without some system calls.

    python users.py USER [DENIED ...]

It reads a request on each line and answers with the outcomes. Where the interpreter is in a folder of root's, this
process alone sees that folder as one that all can enter. DENIED are numbers of system calls that it cannot make.
"""

import concurrent.futures
import contextlib
import ctypes
import errno
import json
import os
import platform
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).parents[3]
OTHER_USER = 54_321
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18


class Runner:
    """A process that runs programs as `user`; 0: the user of the tests. Its environment has SECRET_OF_THE_TEST."""

    def __init__(self, user: int = 0, denied: Sequence[int] = ()) -> None:
        self.user = user
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(user), *map(str, denied)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
            start_new_session=True,
            env={**os.environ, "SECRET_OF_THE_TEST": "hf_secret"},
        )
        # A process of that user, like the trainer.
        self.victim = int(self.read())

    def send(self, kind: str, isolation: str, items: list[Any], **limits: Any) -> None:
        """Send a request."""
        assert self.process.stdin is not None
        request = {"kind": kind, "isolation": isolation, "items": items, "limits": limits}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def read(self) -> Any:
        """Return the answer to the oldest request without one."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def programs(self, isolation: str, sources: list[str], **limits: Any) -> list[tuple[str, int, str]]:
        """Return the ending, the exit code and the output of each program; they run four at a time."""
        self.send("programs", isolation, sources, **limits)
        return [(ending, code, output) for ending, code, output in self.read()]

    def tests(self, isolation: str, solutions: list[str], tests: Any, **limits: Any) -> list[Any]:
        """Return the verdicts of each solution."""
        self.send("tests", isolation, [[solution, tests] for solution in solutions], **limits)
        return list(self.read())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@contextlib.contextmanager
def running(user: int = 0, denied: Sequence[int] = ()) -> Iterator[Runner]:
    """Yield a runner, which ends with the context."""
    runner = Runner(user, denied)
    try:
        yield runner
    finally:
        runner.close()


def sandbox_processes() -> set[str]:
    """Return the ids of all processes of sandboxes and of programs that they have become.

    Those that descend from another worker of pytest are not counted.
    """
    found = set()
    parent = psutil.Process().parent()
    others = {worker.pid for worker in parent.children()} - {os.getpid()} if parent else set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, psutil.Error):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            is_sandbox = b"jail.py" in line or line == b"sleep\x00600\x00"
            if is_sandbox and not others & {above.pid for above in psutil.Process(int(pid)).parents()}:
                found.add(pid)
    return found


def wait_until_gone(before: set[str]) -> None:
    """Return when no other processes of sandboxes are left than before."""
    deadline = time.monotonic() + 10
    while left := sandbox_processes() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def become(user: int) -> None:
    """Become a user that can read the files of Python; seen by this process and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.path.expanduser("~")
    prefix = os.path.realpath(sys.base_prefix)
    if prefix.startswith(home + "/") and not os.stat(home).st_mode & 0o001:
        top = os.path.join(home, os.path.relpath(prefix, home).split("/")[0])
        assert libc.unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())
        assert libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
        source = os.open(top, os.O_PATH)
        assert libc.mount(b"tmpfs", home.encode(), b"tmpfs", 0, b"mode=755") == 0
        os.mkdir(top)
        assert libc.mount(f"/proc/self/fd/{source}".encode(), top.encode(), None, MS_BIND | MS_REC, None) == 0
        os.close(source)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    os.environ["HOME"] = "/tmp"


def deny(numbers: Sequence[int]) -> None:
    """Forbid system calls to this process and its children, as the filter of a container does."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps = [(0x20, 0, 0, 0)]
    for number in numbers:
        steps += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | errno.EPERM)]
    program = b"".join(struct.pack("=HBBI", *step) for step in [*steps, (0x06, 0, 0, 0x7FFF0000)])
    buffer = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, pointer, 0, 0) == 0


def hold_key() -> None:
    """Have a key in the session keyring, as a login or a trainer may."""
    libc = ctypes.CDLL(None, use_errno=True)
    keyctl, add_key = (250, 248) if platform.machine() == "x86_64" else (219, 217)
    assert libc.syscall(keyctl, 1, None) > 0 or ctypes.get_errno() == errno.EPERM  # in a container
    libc.syscall(add_key, b"user", b"secret-of-the-test", b"secret", 6, -3)


def main() -> None:
    """Answer requests until the input is closed."""
    user, *denied = map(int, sys.argv[1:])
    if user and os.geteuid() == 0:
        become(user)
    if denied:
        deny(denied)
    else:
        hold_key()
    sys.path.insert(0, str(PROJECT))
    from rekatrain.rewards.code.launcher import Limits
    from rekatrain.rewards.code.sandbox import run_program, run_tests

    # A process that was started, not forked, by the user, so that the user can look into it.
    victim = subprocess.Popen(
        ["/usr/bin/env", "python3", "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    print(victim.pid, flush=True)

    def answer(request: dict[str, Any], item: Any) -> Any:
        limits, isolation = Limits(**request["limits"]), request["isolation"]
        try:
            if request["kind"] == "programs":
                outcome = run_program(item, stdin=b"", limits=limits, isolation=isolation)
                return [outcome.ending, outcome.code, outcome.output.decode(errors="replace")]
            return run_tests([item[0]], item[1], limits=limits, isolation=isolation)
        except Exception as error:
            return ["error", 0, f"{type(error).__name__}: {error}"]

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for line in sys.stdin:
            request = json.loads(line)
            answers = [threads.submit(answer, request, item) for item in request["items"]]
            print(json.dumps([one.result() for one in answers]), flush=True)
    victim.kill()
    victim.wait()


if __name__ == "__main__":
    main()
