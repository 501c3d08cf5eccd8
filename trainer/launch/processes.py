"""One process under keep.py: its start, its output, its signals and its end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

KEEPER = Path(__file__).with_name("keep.py")
# Lines of a process's output that are kept for a message about its end.
KEPT_LINES = 200
# Lines at the end among which an error is the reason of the end.
END_LINES = 60
# Escape sequences that color the output of a program.
COLORS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# Lines of an error, of which the last one is the reason.
IS_ERROR = re.compile(r"(^|\s|\.)([A-Z]\w*(Error|Exception|Interrupt)\b|error:|Error:)")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A process to start.

    name:        of the process, such as `server 0`
    argv:        program and arguments
    environment: variables that it gets in addition to those of this process
    unset:       variables that it does not inherit
    prefix:      words that start a program on another node, such as `ssh node1`; none for this machine
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    unset: Sequence[str] = ()
    prefix: Sequence[str] = ()


def on_node(prefix: Sequence[str], argv: Sequence[str]) -> list[str]:
    """Return the command that runs `argv` on the node of a prefix; ssh hands it to a shell, as one text."""
    is_ssh = bool(prefix) and prefix[0] == "ssh"
    return [*prefix, *([shlex.join(argv)] if is_ssh else argv)]


class Kept:
    """A running process; `on_line` is called with its name and each line of its output, in another thread."""

    def __init__(self, command: Command, on_line: Callable[[str, str], None]) -> None:
        self.command, self.name = command, command.name
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.started = time.monotonic()
        self.is_ended = False  # by `end`
        # Unbuffered output: a line of a Python program is shown when it is written.
        environment = {"PYTHONUNBUFFERED": "1", **command.environment}
        spec = {"argv": [*command.argv], "env": environment, "unset": [*command.unset], "cwd": os.getcwd()}
        python = sys.executable
        self._keeper = subprocess.Popen(
            on_node(command.prefix, [python, "-P", str(KEEPER)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal goes to the launch alone
        )
        self._on_line = on_line
        self._reader = threading.Thread(target=self._read, daemon=True, name=command.name)
        self._reader.start()
        self._write(json.dumps(spec))

    @property
    def pid(self) -> int:
        """Process id of the program that keeps the process."""
        return self._keeper.pid

    def poll(self) -> int | None:
        """Return the exit status, as a shell gives it, once the process has ended and its output is read."""
        status = self._keeper.poll()
        if status is None:
            return None
        if status < 0:  # somebody killed it, and its descendants may hold the output open
            return 128 - status
        self._reader.join(timeout=2.0)
        return status

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self._write(str(int(number)))

    def end(self) -> None:
        """Have the process and its descendants killed; `poll` returns a status soon after."""
        self.is_ended = self._keeper.poll() is None
        assert self._keeper.stdin is not None
        with suppress(OSError):
            self._keeper.stdin.close()

    def wait(self, seconds: float) -> bool:
        """Wait until the process has ended, at most so many seconds; return True if it has."""
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(timeout=seconds)
        return self._keeper.poll() is not None

    def reason(self) -> str:
        """Return why the process has ended, or what it does: its last line that names an error, or its last line."""
        status = self.poll() or 0
        lines = [line for line in self.lines if line.strip()]
        last = lines[-1].strip() if lines else "it printed nothing"
        if status > 128:
            by = signal.Signals(status - 128).name if status - 128 in set(signal.Signals) else f"signal {status - 128}"
            hint = ", as the kernel does when memory runs out" if by == "SIGKILL" else ""
            hint = " by this launch, as it did not respond or end in time" if self.is_ended else hint
            return f"killed by {by}{hint}; its last line: {last}"
        # A server goes on after some errors: only those at the end are the reason.
        errors = [line for line in lines[-END_LINES:] if IS_ERROR.search(line)]
        return errors[-1].strip() if errors else last

    def _write(self, line: str) -> None:
        assert self._keeper.stdin is not None
        with suppress(OSError, ValueError):  # it has ended
            self._keeper.stdin.write(f"{line}\n".encode())
            self._keeper.stdin.flush()

    def _read(self) -> None:
        assert self._keeper.stdout is not None
        for line in self._keeper.stdout:
            text = COLORS.sub("", line.decode("utf-8", errors="replace")).rstrip("\r\n").rpartition("\r")[2]
            self.lines.append(text)
            self._on_line(self.name, text)
