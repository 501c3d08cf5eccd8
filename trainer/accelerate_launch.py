"""`accelerate launch` for schedulers: signals reach the ranks, and the exit status is theirs.

    python -m rekatrain.trainer.accelerate_launch --config_file FILE -m rekatrain train RECIPE --resume

takes the options of `accelerate launch`. That command ends with status 1 whatever its processes end with; it kills them
30 seconds after a SIGTERM, dies of SIGUSR1 and leaves them behind. This one hands SIGTERM, SIGUSR1 and Ctrl-C on, waits
for the ranks, and ends with the status of the first one that failed: 75 if the run was interrupted and saved.
"""

import os
import signal
import subprocess
import sys
from types import FrameType

from rekatrain.data.errors import INTERRUPTED
from rekatrain.trainer.processes.early_signals import interruptible_imports

with interruptible_imports():
    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# torchrun's own handlers would replace ours; this signal, which it must be given one of, nobody sends.
UNUSED_SIGNAL = "SIGHUP"


def main() -> None:
    """Launch the processes, and exit with their status."""
    options = launch_command_parser().parse_args()
    os.environ["PET_SIGNALS_TO_HANDLE"] = UNUSED_SIGNAL
    for number in SIGNALS:
        signal.signal(number, _hand_on)
    try:
        launch_command(options)
    except ChildFailedError as error:
        sys.exit(_status(error.get_first_failure()[1].exitcode))
    except subprocess.CalledProcessError as error:  # of a single process
        sys.exit(_status(error.returncode))


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the ranks, wait for them, and exit: torchrun does not start them again."""
    waiting = psutil.Process().children()
    if not waiting:  # none has started
        os._exit(INTERRUPTED)
    for process in waiting:
        process.send_signal(number)
    statuses: list[int] = []
    while waiting:
        ended, waiting = psutil.wait_procs(waiting, timeout=0.5)
        new = [process.returncode or 0 for process in ended]
        statuses += new
        if any(status not in (0, INTERRUPTED) for status in new):
            for process in waiting:  # they wait for the one that has failed
                process.terminate()
    # os._exit: torchrun would look for processes that have been waited for.
    os._exit(next((_status(status) for status in statuses if status not in (0, INTERRUPTED)), max(statuses, default=0)))


def _status(returncode: int) -> int:
    """Return a process's exit status, as a shell gives it where a signal ended the process."""
    return returncode if returncode >= 0 else 128 - returncode


if __name__ == "__main__":
    main()
