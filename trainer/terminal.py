"""The terminal of a run: log lines of the run, and the known noise of the libraries filtered out.

Only messages that are listed here are hidden, and all of them are shown with REKATRAIN_VERBOSE=1. `python -W` and
PYTHONWARNINGS have the last word on warnings, as in any Python program.
"""

import logging
import os
import sys
import warnings

VERBOSE = "REKATRAIN_VERBOSE"
# Warnings about calls that the libraries themselves make: (category, pattern of the message, pattern of the module).
WARNINGS: list[tuple[type[Warning], str, str]] = [
    # transformers' and TRL's own use of names that transformers renames in version 6.
    (FutureWarning, r"`\w*gradient_checkpointing\w*` is deprecated", r"transformers\."),
    # DeepSpeed's use of names that torch renames.
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed\."),
    # Accelerate's wrapper steps a scheduler once per process before torch's sees the optimizer's first step.
    (UserWarning, r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`", ""),
]
# Log lines that state what every run without a GPU knows, or what our own line says: (logger, start of the message).
LOG_LINES = [
    ("DeepSpeed", "Setting accelerator to CPU"),
    ("transformers.trainer_utils", "Warning: The following arguments do not match the ones in the"),
]
# Their INFO lines are of use to their own developers.
CHATTY = ("accelerate", "httpx", "httpx2", "datasets", "transformers", "DeepSpeed", "filelock", "gguf")


def set_up_terminal() -> None:
    """Show the run's own log lines, those of the main process alone, and hide the listed noise. May be called again."""
    is_main_process = os.environ.get("RANK", "0") == "0"
    # Without effect where the program that calls us has set up logging.
    logging.basicConfig(level=logging.INFO if is_main_process else logging.ERROR, format="%(message)s")
    if not is_main_process or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a log file, the libraries' bars are thousand-character lines
    if os.environ.get(VERBOSE):
        return
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name, start in LOG_LINES:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Starts) for each in logger.filters):
            logger.addFilter(_Starts(start))
    # TRL prepares rows that need no preparation, with a bar for each pass over them.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        for category, message, module in WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category, module=module)


class _Starts(logging.Filter):
    """Drops the records whose message has a given start."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._start)
