"""Start sandboxes through a server process that has imported what code needs, so that each start takes milliseconds.

There is one server for each isolation and set of packages that this process has used. It ends with this process: the
kernel then closes the other end of its socket.
"""

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rekatrain.rewards.code.pipes import memory_file
from rekatrain.rewards.errors import RewardError

Isolation = Literal["namespaces", "rlimits"]

JAIL = Path(__file__).with_name("jail.py")
# Seconds in which a server, and then a sandbox, must have started. They count against no time limit of the code.
START_SECONDS = 60.0
# The newest version of Landlock that is used; None: the kernel's.
LANDLOCK: int | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one run, in bytes and seconds.

    seconds:   wall-clock time of a program, or of one of the tests
    total:     seconds of all the tests together; None: as `seconds`
    memory:    address space of the code; it can have no memory elsewhere but its files and pipes
    processes: threads of the code at the same time; it can start no processes
    output:    standard output; a program that writes more is ended
    files:     all files in its folder together; with rlimits it can write none
    """

    seconds: float = 5.0
    total: float | None = None
    memory: int = 1 << 30
    processes: int = 1
    output: int = 16 << 20
    files: int = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A sandbox that starts or runs; `link` is the socket to the process that watches it."""

    link: socket.socket

    def wait_until_started(self) -> None:
        """Return when its code begins to run; raise RewardError if the sandbox could not be made."""
        message = self._read(START_SECONDS)
        if message != b".":
            reason = "it did not start in time" if message is None else message[1:].decode() or "its server has died"
            raise RewardError(f"the sandbox could not be made: {reason}")

    def exit_code(self, seconds: float) -> int | None:
        """Return the exit code of its code; None if it has not ended in that time.

        Raises RewardError if the process that watches it was killed: nothing is known then.
        """
        message = self._read(seconds)
        if message == b"":
            raise RewardError("the sandbox was killed from outside")
        return None if message is None else int(message)

    def end(self) -> None:
        """End its code, and wait until it has ended."""
        with suppress(OSError):  # it has ended already
            self.link.shutdown(socket.SHUT_WR)
        while self._read(START_SECONDS):
            pass
        self.link.close()

    def _read(self, seconds: float) -> bytes | None:
        if not select.select([self.link], [], [], max(seconds, 0))[0]:
            return None
        with suppress(ConnectionResetError):
            return self.link.recv(2_000)
        return b""


class Server:
    """A server of sandboxes. Raises RewardError if this machine cannot provide the isolation."""

    def __init__(self, isolation: Isolation, paths: Sequence[str]) -> None:
        self.control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "isolation": isolation,
            "visible": [*_visible(), *paths],
            "paths": list(paths),
            "preload": ["numpy"] if any(os.path.exists(os.path.join(path, "numpy")) for path in paths) else [],
            "landlock": LANDLOCK,
        }
        with inside:
            # Where it does not end by itself, the kernel reaps it after this process.
            self.process = subprocess.Popen(
                [
                    os.path.realpath(sys.executable),
                    "-I",
                    "-S",
                    "-B",
                    str(JAIL),
                    str(inside.fileno()),
                    json.dumps(settings),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(inside.fileno(),),
                env={
                    **{"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                    # Threads of numpy each reserve memory.
                    **({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} if paths else {}),
                },
                cwd="/",
                start_new_session=True,
            )
        reply = Sandbox(link=self.control)._read(START_SECONDS)
        if reply != b".":
            self.close()
            reason = (
                "its server did not start in time" if reply is None else reply[1:].decode() or "its server has died"
            )
            raise RewardError(f"the sandbox could not be made: {reason}")

    def request(self, settings: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Request a sandbox; raise OSError if the server has died."""
        socket.send_fds(self.control, [json.dumps(settings).encode()], descriptors)

    def close(self) -> None:
        """End the server. Its sandboxes end with it."""
        self.control.close()
        self.process.kill()
        self.process.wait()


_servers: dict[tuple[int, Isolation, tuple[str, ...]], Server] = {}
_lock = threading.Lock()


@contextmanager
def start_sandbox(
    job: Mapping[str, Any],
    limits: Limits,
    isolation: Isolation,
    *,
    channels: tuple[int, ...] = (),
    stdio: tuple[int, int] | None = None,
    paths: Sequence[str] = (),
) -> Iterator[Sandbox]:
    """Yield a sandbox that runs `job` and owns `channels` and `stdio`; end it with all that it has started on exit.

    paths: folders of packages that it can import beside the standard library
    """
    settings = {
        "kind": job["kind"],
        "cpu_seconds": int(limits.total or limits.seconds) + 1,
        "memory": limits.memory,
        "processes": limits.processes,
        "file_bytes": limits.files,
        "num_channels": len(channels),
    }
    stdin, stdout = stdio or (os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY))
    link, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    given = [stdin, stdout, memory_file("job", json.dumps(job).encode()), inside.detach(), *channels]
    sandbox = Sandbox(link=link)
    try:
        try:
            _send(isolation, tuple(paths), settings, given)
        finally:
            for descriptor in given:
                os.close(descriptor)
        yield sandbox
    finally:
        sandbox.end()


def _send(
    isolation: Isolation, paths: tuple[str, ...], settings: Mapping[str, Any], descriptors: Sequence[int]
) -> None:
    """Have the server of that kind start a sandbox; start it first if there is none or if it has died."""
    key = (os.getpid(), isolation, paths)
    for is_last in (False, True):
        with _lock:
            server = _servers.get(key)
            if server is None:
                server = _servers[key] = Server(isolation, paths)
        try:
            server.request(settings, descriptors)
        except OSError:
            with _lock:
                if _servers.get(key) is server:
                    del _servers[key]
                    server.close()
            if is_last:
                raise
        else:
            return


@cache
def _visible() -> list[str]:
    """Return the paths of this machine that Python needs."""
    paths = ["/usr", sys.base_prefix, "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path) and not os.path.islink(path)]
