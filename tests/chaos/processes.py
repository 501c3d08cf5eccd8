"""Runs in separate processes: forked from a warm server, by the command, or by the launcher on two processes."""

import ctypes
import json
import os
import resource
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil

from tests.chaos.kill_points import POINT, KillPoint, install
from tests.helpers.forks import LAUNCH_FILES, PROJECT, Launch, Process, Program, fork

HERE = Path(__file__).parent
LAUNCH_FILE = LAUNCH_FILES / "zero3.yaml"
# Every start would otherwise plan its memory for a second.
COMMAND = ["train", "recipe.yaml", "--skip-memory-check"]


def fork_run(
    folder: Path, *arguments: str, point: KillPoint | None = None, file_limit: int = 0, processes: int = 1
) -> Process:
    """Start `rekatrain train recipe.yaml ARGUMENTS` in a fork of the warm server, or under ZeRO-3 in several.

    file_limit: largest size of a file in bytes; 0 for none
    """
    program = Program(
        command=("-m", "rekatrain", *COMMAND, *arguments),
        folder=folder,
        log=_next_log(folder),
        environment=os.environ.copy(),
        prepare=partial(_prepare, point, file_limit),
    )
    return fork(program, Launch(num_processes=processes) if processes > 1 else None)


def _next_log(folder: Path) -> Path:
    return folder / f"log-{len(list(folder.glob('log-*'))) + 1}"


def _prepare(point: KillPoint | None, file_limit: int) -> None:
    _drop_capabilities()
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if point:
        install(point)


def start_command(folder: Path, *arguments: str, point: KillPoint | None = None, processes: int = 1) -> Process:
    """Start the command as a user does: on its own, or under ZeRO-3 by `accelerate launch`."""
    log = _next_log(folder)
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--config_file", LAUNCH_FILE]
    program = [HERE / "entry.py"] if point else ["-m", "rekatrain"]
    command = [sys.executable, *(launcher if processes > 1 else []), *program, *COMMAND, *arguments]
    path = os.pathsep.join([str(PROJECT / ".package"), *([str(PROJECT)] if point else [])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    if point:
        environment[POINT] = json.dumps(asdict(point))
    with log.open("ab") as file:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    return Process(pid=process.pid, poll=process.poll, log=log)


def _drop_capabilities() -> None:
    """Have the permissions of files hold for root too."""
    if os.geteuid() == 0:
        header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)  # linux/capability.h, version 3
        if ctypes.CDLL(None, use_errno=True).capset(header, nothing) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in a folder: a run, its launcher and its reward workers."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def orphans(folder: Path, seconds: float = 5.0) -> list[str]:
    """Return the command lines of the processes that still work in a folder after some seconds."""
    deadline = time.monotonic() + seconds
    while (left := processes_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    names = []
    for process in left:
        with suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline()))
    return names
