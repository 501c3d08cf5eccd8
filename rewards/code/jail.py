"""The server of the sandboxes: it has imported what code needs, and forks for each program. launcher.py starts it.

    python -I -S -B jail.py CONTROL_FD SETTINGS

    server ── keeper ── [init process of the namespaces] ── the code

A keeper watches one sandbox. It ends the code when the other end of the link is closed: at a limit, or because the
reward worker has died. If the keeper dies, the kernel ends the code. No program shares anything with another one
but what the server had before it forked.
"""

import array
import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

STDIN, STDOUT, JOB, LINK = 0, 1, 3, 4
CHANNELS = 5
MODULES = [
    "asyncio",
    "bisect",
    "collections",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "queue",
    "random",
    "re",
    "statistics",
    "string",
    "threading",
    "traceback",
    "typing",
    "unittest",
]
MAX_REQUEST = 1 << 16
MAX_DESCRIPTORS = 16


def main() -> None:
    """Serve until the other end of the control socket is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    # While the file tree can still be seen.
    confinement, jobs = importlib.import_module("jail_confine"), importlib.import_module("jail_jobs")
    del sys.path[0]
    try:
        level = confinement.Level(settings["isolation"], settings["visible"], settings["landlock"])
    except (OSError, ValueError) as error:
        control.send(b"!" + describe(error))
        os._exit(1)
    sys.path.extend(settings["paths"])
    for name in (*MODULES, *settings["preload"]):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forked processes share the memory of objects that the collector does not touch
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave no zombies
    control.send(b".")
    while request := receive(control):
        if not os.fork():
            try:
                keep(level, confinement, jobs, *request)
            finally:
                os._exit(1)
        for descriptor in request[1]:
            os.close(descriptor)


def receive(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next request: its settings and descriptors; None if the other end is closed."""
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    message, ancillary, _, _ = control.recvmsg(MAX_REQUEST, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return (json.loads(message), list(descriptors)) if message else None


def keep(level: Any, confinement: Any, jobs: Any, settings: dict[str, Any], descriptors: list[int]) -> None:
    """Start the code of one sandbox and watch it; return in no process.

    descriptors: standard input and output, the job, the link, and the channels of the job
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    confinement.die_with_parent()
    level.proc, level.rules = arrange(descriptors, level.proc, level.rules)
    keeper = os.getpid()
    try:
        level.separate(settings["file_bytes"])
        code = os.fork()
    except OSError as error:
        os.write(LINK, b"!" + describe(error))
        os._exit(1)
    if not code:
        run(level, confinement, jobs, settings, keeper)
    drop(STDIN, STDOUT, JOB)
    os.closerange(CHANNELS, 64)
    ended = os.pidfd_open(code)
    watched = select.poll()
    watched.register(ended, select.POLLIN)
    watched.register(LINK, select.POLLIN)  # nothing is ever sent: it is closed
    watched.poll()
    os.kill(code, signal.SIGKILL)
    _, status = os.waitpid(code, 0)
    with contextlib.suppress(OSError):  # the other end has gone
        os.write(LINK, b"%d" % (os.waitstatus_to_exitcode(status) % 256))
    os._exit(0)


def run(level: Any, confinement: Any, jobs: Any, settings: dict[str, Any], keeper: int) -> None:
    """Confine this process, report that, and run the job."""
    try:
        if level.has_namespaces and settings["kind"] != "verifier":
            guard(confinement)
        level.confine(settings, keeper, num_keepers=2)
        if level.rules >= 0:
            os.close(level.rules)
        os.close(level.proc)
        with open(JOB, "rb") as file:
            job = json.load(file)
        num_channels = settings["num_channels"]
        os.write(LINK, b".")
        os.close(LINK)
    except Exception as error:
        os.write(LINK, b"!" + describe(error))
        os._exit(1)
    jobs.run(job, [CHANNELS + number for number in range(num_channels)])


def guard(confinement: Any) -> None:
    """Fork; wait in the first process, which is the init process of the namespace, and return in the second.

    With its init process the kernel ends all processes of a namespace. Code cannot signal it. Code that were the init
    process itself could not be ended by its own signals.
    """
    confinement.die_with_parent()
    pid = os.fork()
    if pid:
        drop(STDIN, STDOUT, JOB, LINK)
        os.closerange(CHANNELS, 64)
        _, status = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(status) % 256)


def arrange(descriptors: list[int], proc: int, rules: int) -> list[int]:
    """Give descriptors their numbers and close all others; return the new ones of /proc and the rules."""
    stdin, stdout, job, link, *channels = descriptors
    wanted = [stdin, stdout, 2, job, link, *channels, proc, *([rules] if rules >= 0 else [])]
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in wanted]
    for number, descriptor in enumerate(high):
        os.dup2(descriptor, number)
    os.closerange(len(wanted), 1 << 10)
    last = CHANNELS + len(channels)
    return [last, last + 1 if rules >= 0 else -1]


def drop(*descriptors: int) -> None:
    """Have descriptors lead nowhere, so that the other ends of their pipes see the end of the code."""
    for descriptor in descriptors:
        os.dup2(2, descriptor)  # /dev/null


def describe(error: Exception) -> bytes:
    """Return a line about an error: for OSError the reason and the file or call."""
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return text.encode(errors="replace")[:1_000]


if __name__ == "__main__":
    main()
