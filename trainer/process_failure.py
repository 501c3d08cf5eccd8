"""What a process of a launch does when another one is gone: it says so in one line and ends, without a traceback.

torchrun, which `accelerate launch` starts, sees a process die and sends SIGTERM to the others of its machine. On other
machines they learn of it by the connection.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed

LAUNCHER_SECONDS = 10.0
MESSAGE = (
    "rekatrain: error: the run has ended: another process of it died, or the launcher was stopped; its report says "
    "which. Go on from the newest checkpoint with --resume"
)


@contextmanager
def end_with_the_others() -> Iterator[None]:
    """End this process when another process of the launch dies; nothing where there is no other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A handler of Python's waits for the call it interrupts, and a collective that misses a process never returns: a
    # thread reads the number that the signal leaves in the pipe.
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_wait_for_sigterm, args=(reader,), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        time.sleep(LAUNCHER_SECONDS)  # the launcher of this machine, if it is its process, ends this one meanwhile
        _end(str(error).splitlines()[0])


def _wait_for_sigterm(reader: int) -> None:
    while os.read(reader, 1)[0] != signal.SIGTERM:
        pass
    _end()


def _is_lost_connection(error: RuntimeError) -> bool:
    # NCCL's errors have a class, gloo's only the name of its source file in their text.
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _end(cause: str = "") -> None:
    if os.environ.get("LOCAL_RANK") in ("0", "1"):  # of two, one is alive
        print(f"{MESSAGE} {f'({cause})' if cause else ''}".rstrip(), file=sys.stderr, flush=True)
    os._exit(1)  # what is left waits for a process that is gone
