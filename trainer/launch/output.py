"""The terminal of a launch: lines of all processes with their names in front, and one progress line."""

import os
import re
import shutil
import sys
import threading
import time
from contextlib import suppress

from rekatrain.trainer.terminal import VERBOSE

# Lines of vLLM that say nothing about this run; VERBOSE shows them.
NOISE = re.compile(
    r"launcher.py:\d+\] (Route|Available routes)|nanobind: |  - (leaked |\.\.\. skipped)|refleaks\.html|Triton|"
    r"DeprecationWarning|^ *warnings\.warn\(|resource_tracker|shm_broadcast|^\s*$|[█▀▄]{2}|"
    r"checkpoint shards:|Unknown vLLM environment|DeepSelect|uvicorn|\) INFO:     |LD_PRELOAD|\] *$"
)
STEP = re.compile(r"^step (\d+)/(\d+)  ")


class Output:
    """Prints to standard error. On a terminal the last line is the progress line, which shows the trainer's steps."""

    def __init__(self, names: list[str]) -> None:
        """Start the clock of the run.

        names:         of all processes
        hides_servers: set when the servers end: their lines about that are hidden
        """
        self._width = max(map(len, names), default=0)
        self._is_terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._progress = self._step = ""
        self._phase = "start"
        self._servers = ""
        self._hides_noise = not os.environ.get(VERBOSE)
        self.hides_servers = False

    def line(self, name: str, text: str) -> None:
        """Print a line of a process; a step of the trainer goes into the progress line."""
        is_server = name.startswith("server")
        if is_server and self._hides_noise and (self.hides_servers or NOISE.search(text)):
            return
        with self._lock:
            if STEP.match(text) and not is_server:
                self._step = text
                if self._is_terminal:
                    self._draw()
                    return
            self._print(f"[{name}]{' ' * (self._width - len(name))} {text}")

    def say(self, text: str) -> None:
        """Print a line of the launch itself."""
        with self._lock:
            self._print(f"rekatrain: {text}")

    def status(self, phase: str, servers: str = "") -> None:
        """Set what the progress line says; without a terminal a new phase is one line."""
        with self._lock:
            is_new, self._phase, self._servers = phase != self._phase, phase, servers
            if self._is_terminal:
                self._draw()
            elif is_new:
                self._print(f"rekatrain: {self._text()}")

    def close(self) -> None:
        """Remove the progress line."""
        with self._lock:
            self._clear()
            self._progress, self._is_terminal = "", False

    def _text(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        parts = [self._step or self._phase, self._servers, f"{minutes}m{seconds:02}s"]
        return " | ".join(part for part in parts if part)

    def _draw(self) -> None:
        self._clear()
        self._progress = self._text()[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write(self._progress)
        sys.stderr.flush()

    def _clear(self) -> None:
        if self._progress:
            sys.stderr.write("\r\x1b[K")

    def _print(self, text: str) -> None:
        with suppress(BrokenPipeError):  # whoever reads the output has ended, and the run goes on
            self._clear()
            sys.stderr.write(f"{text}\n")
            sys.stderr.write(self._progress)
            sys.stderr.flush()
