"""Exit cleanly, with one line and no traceback, when another rank dies.

torchrun, which `accelerate launch` starts, notices a dead process and sends SIGTERM to the others of its node. The
processes of other nodes notice the lost connection.
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
    "rekatrain: error: the run has ended: another process died, or the launcher was stopped; the launcher's report "
    "says which. Go on from the newest checkpoint with --resume"
)


@contextmanager
def end_with_the_others() -> Iterator[None]:
    """End this process when another process of the launch dies; do nothing if the launch has one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python runs a signal handler after the call that the signal interrupts, and a collective that waits for a dead
    # process never returns. So a thread reads the signal's number from a pipe.
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_wait_for_sigterm, args=(reader,), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        time.sleep(LAUNCHER_SECONDS)  # if the dead process is on this node, the launcher ends this one meanwhile
        _end(str(error).splitlines()[0])


def _wait_for_sigterm(reader: int) -> None:
    while os.read(reader, 1)[0] != signal.SIGTERM:
        pass
    _end()


def _is_lost_connection(error: RuntimeError) -> bool:
    # NCCL's errors have a class, gloo's only the name of its source file in their text.
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _end(cause: str = "") -> None:
    if os.environ.get("LOCAL_RANK") in ("0", "1"):  # one rank may be the dead one: at least one of the two prints
        print(f"{MESSAGE} {f'({cause})' if cause else ''}".rstrip(), file=sys.stderr, flush=True)
    os._exit(1)  # every other thread waits for the dead process
