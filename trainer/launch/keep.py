"""Run one process, and end it with all its descendants when this program's standard input ends.

    python keep.py     # then one line on standard input: {"argv": [...], "env": {...}, "unset": [...], "cwd": "..."}

Whoever starts this program holds the other end of its standard input, also over ssh or srun. However that one ends, by
`kill -9` too, the input ends, and nothing that was started stays: descendants whose parent has died become children of
this program (PR_SET_CHILD_SUBREAPER). A line with a number sends that signal to the process. The exit status is that of
the process, as a shell gives it.

This program imports nothing of the project, so it starts at once.
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# The signals that a scheduler sends to this program are for the process.
HANDED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds until a process that was killed must be gone; one in a call of a broken driver stays longer.
KILL_SECONDS = 30.0
# Exit status if the program cannot be started, as a shell's.
NOT_FOUND = 127

LIBC = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants(spared: Collection[int] = ()) -> None:
    """Kill all descendants of this process, and those that they start meanwhile.

    spared: process ids of children that live on with their descendants
    """
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        children = [child for child in psutil.Process().children() if child.pid not in spared]
        if not children:
            return
        for child in children:
            with suppress(psutil.Error):
                for each in (child, *child.children(recursive=True)):
                    each.kill()
            with suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)
        time.sleep(0.01)


def _reap() -> dict[int, int]:
    """Return the statuses of the children that have ended, by process id."""
    ended: dict[int, int] = {}
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def main() -> int:
    """Run the process that the first line of standard input names, and return its exit status."""
    adopt_orphans()
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    numbers: list[int] = []
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for handed_on in HANDED_ON:
        signal.signal(handed_on, lambda number, frame: numbers.append(number))
    text = b""
    while b"\n" not in text:
        if not (read := os.read(0, 65536)):
            return 0
        text += read
    first, _, text = text.partition(b"\n")
    started = _start(json.loads(first))
    if started is None:
        return NOT_FOUND
    while True:
        *lines, text = text.split(b"\n")
        numbers += [int(line) for line in lines]
        status = _reap().get(started.pid)
        if status is not None:
            kill_descendants()
            return status if status >= 0 else 128 - status
        for number in numbers:
            os.kill(started.pid, number)
        numbers.clear()
        readable, _, _ = select.select([0, woken], [], [], 1.0)
        if woken in readable:
            os.read(woken, 4096)
        if 0 in readable:
            read = os.read(0, 4096)
            if not read:
                kill_descendants()
                return 128 + signal.SIGKILL
            text += read


def _start(spec: dict) -> subprocess.Popen[bytes] | None:
    environment = {**os.environ, **spec["env"]}
    for name in spec["unset"]:
        environment.pop(name, None)
    try:
        return subprocess.Popen(
            spec["argv"],
            env=environment,
            cwd=spec["cwd"],
            stdin=subprocess.DEVNULL,
            preexec_fn=_before_exec,
        )
    except OSError as error:
        print(f"{spec['argv'][0]} cannot be started: {error.strerror} ({error.filename})", flush=True)
        return None


def _before_exec() -> None:
    # If this program is killed, so is the process; whoever started this program kills the rest.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
