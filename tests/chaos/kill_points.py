"""Kill a run before its N-th change of a folder: a file opened for writing, renamed or deleted, a folder made.

Python reports these operations to audit hooks before it makes them. safetensors and torch write their files without
Python: a kill a few milliseconds after an operation lands there.
"""

import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.helpers.forks import kill_tree

# Variable that holds the kill point of entry.py.
POINT = "REKATRAIN_CHAOS_POINT"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Events with a path, and the index of its folder's descriptor among their arguments.
EVENTS = {"open": None, "os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.truncate": None}

Scope = Literal["process", "tree", "launcher"]


@dataclass(frozen=True, kw_only=True)
class KillPoint:
    """The moment of a kill.

    folder: the folder whose changes are counted
    report: start of the name of the file that gets the number of changes so far; the rank is its end
    at:     number of the change before which a process dies; 0 to count only
    delay:  seconds from then to the kill
    scope:  "process" is the one that makes the change, "tree" the whole run, "launcher" the launcher alone
    rank:   rank of the process that counts; None for each
    """

    folder: str
    report: str
    at: int = 0
    delay: float = 0.0
    scope: Scope = "tree"
    rank: int | None = 0


def install(point: KillPoint) -> None:
    """Count the changes of the folder from now on, and kill at the chosen one."""
    rank = int(os.environ.get("RANK", "0"))
    if point.rank not in (None, rank):
        return
    folder = os.path.abspath(point.folder)
    count = 0
    is_counting = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:  # Any: the arguments of the event
        nonlocal count, is_counting
        if not is_counting or event not in EVENTS:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        path = _path_of(event, arguments)
        if path != folder and not path.startswith(folder + os.sep):
            return
        is_counting = False  # no audit of the hook's own operations
        count += 1
        if point.at == 0:
            Path(f"{point.report}-{rank}").write_text(str(count))
        elif count == point.at and point.delay == 0:
            kill_from_inside(point.scope)
        elif count == point.at:
            threading.Timer(point.delay, kill_from_inside, [point.scope]).start()
        is_counting = True

    sys.addaudithook(hook)


def kill_from_inside(scope: Scope) -> None:
    """Kill the run of this process: the launcher first, which would end the others, and this process last."""
    own = os.getpid()
    root = os.getppid() if "LOCAL_RANK" in os.environ else own
    if scope == "tree":
        kill_tree(root, spared=own)
    elif scope == "launcher":
        os.kill(root, signal.SIGKILL)
        return
    os.kill(own, signal.SIGKILL)


def _path_of(event: str, arguments: tuple[Any, ...]) -> str:
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return ""  # a descriptor
    text = os.fsdecode(path)
    index = EVENTS[event]
    descriptor = arguments[index] if index is not None else -1
    if isinstance(descriptor, int) and descriptor >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), text)
    return os.path.abspath(text)
