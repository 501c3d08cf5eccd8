"""The end of a launch in which a rank fails: every cause is printed once, with its rank, and no rank waits for ever.

torchrun, which `accelerate launch` starts, notices a dead process and sends SIGTERM to the others of its node
(interruption.py receives it). The processes of other nodes notice the lost connection, or the report of the failure.
"""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed

from rekatrain.trainer.processes.ranks import Ranks, ranks

# Time for a failed rank to end, or for its launcher to report its death, before the others end by themselves.
END_SECONDS = 10.0
WATCH_SECONDS = 1.0
# Of Linux: the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1
RESUME = "Go on from the newest checkpoint with --resume"


def print_failure(message: str, status: int, *, details: str = "") -> None:
    """Print an error of this process; of a message that several ranks of a launch have, one of them prints it.

    status:  with which this process will exit
    details: lines below the message, such as a traceback
    """
    here = ranks()
    if here is None:
        print("\n".join(filter(None, (f"rekatrain: {message}", details.rstrip()))), file=sys.stderr, flush=True)
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all ranks after the first
    here.fail(message, status, details=details)


@contextmanager
def end_with_the_others() -> Iterator[None]:
    """End this process when another process of the launch fails; do nothing if the launch has one process."""
    here = ranks()
    if here is None:
        yield
        return
    if sys.platform == "linux":  # the ranks of a launcher that is killed would hold their GPUs for ever
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    stopped = threading.Event()
    watcher = threading.Thread(target=_watch, args=(here, stopped), daemon=True)
    watcher.start()
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        here.is_ending = True
        cause = str(error).splitlines()[0]
        if "imed out" in cause:
            _end(here, _describe_timeout(cause))
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:  # the rank that died, or its launcher, may know more
            end_if_a_rank_failed(here)
            time.sleep(WATCH_SECONDS)
        _end(here, f"the connection to another rank is lost ({cause}). {RESUME}")
    finally:
        # A thread that is in a call of the store when Python ends aborts the process.
        stopped.set()
        watcher.join(END_SECONDS)


def end_if_a_rank_failed(here: Ranks) -> None:
    """End this process if another rank has reported why it ends, or has died on this host."""
    if here.num_failed():
        os._exit(here.let_others_speak())  # every other thread may wait for the rank that has ended
    dead = here.dead_sibling()
    if dead is not None:
        _end(here, f"another process died: {dead}; its output or the kernel's log may say why. {RESUME}")


def _watch(here: Ranks, stopped: threading.Event) -> None:
    """End this process some time after another rank has failed, in case it waits for that rank."""
    try:
        while not here.num_failed():
            if stopped.wait(WATCH_SECONDS):
                return
    except RuntimeError:  # the store has ended with the launcher of rank 0
        return
    if not here.is_ending and not stopped.wait(END_SECONDS):
        os._exit(1)


def _is_lost_connection(error: RuntimeError) -> bool:
    # NCCL's errors have a class, gloo's only the name of its source file in their text.
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)


def _describe_timeout(cause: str) -> str:
    found = re.search(r"(\d+) ?ms", cause)
    limit = f" of {int(found[1]) / 1000:g} s" if found else ""
    return (
        f"an exchange between the ranks took longer than its time limit{limit}: a rank hangs, or is slower than that. "
        f"If it is slow, raise ddp_timeout in the stage's section. {RESUME}"
    )


def _end(here: Ranks, message: str) -> None:
    here.fail(f"error: {message}", 1, names_rank=False)
    os._exit(1)  # every other thread waits for the dead process
