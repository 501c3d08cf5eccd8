"""Runs in separate processes: forked from a warm server, by the command, or by the launcher on two processes.

A forked run starts in milliseconds instead of seconds: the server has imported what a run imports (warm.py), has no
threads, and has computed nothing. The ranks of a forked launch have the environment that Accelerate's launcher makes.
"""

import argparse
import atexit
import ctypes
import json
import multiprocessing
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from kill_points import KillPoint, install, kill_tree
from runs import PROJECT

HERE = Path(__file__).parent
LAUNCH_FILE = PROJECT / "recipes" / "accelerate" / "zero3.yaml"
POINT = "REKATRAIN_CHAOS_POINT"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["warm", "runs"])
# The server does not get the path of this process.
os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{PROJECT}"
# Every start would otherwise plan its memory for a second.
COMMAND = ["train", "recipe.yaml", "--skip-memory-check"]


@dataclass(frozen=True, kw_only=True)
class Process:
    """A started run: its process id, its exit status or None while it runs, and the file of its output."""

    pid: int
    poll: Callable[[], int | None]
    log: Path

    def wait(self, seconds: float = 600.0) -> int:
        """Return the exit status, which is -9 after a SIGKILL; kill the run and raise TimeoutError after some time."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                kill_tree(self.pid)
                raise TimeoutError(f"no end after {seconds:.0f} s; see {self.log}")
            time.sleep(0.01)
        return status

    def output(self) -> str:
        """Return all that the run has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def fork_run(
    folder: Path, *arguments: str, point: KillPoint | None = None, file_limit: int = 0, processes: int = 1
) -> Process:
    """Start `rekatrain train recipe.yaml ARGUMENTS` in a fork of the warm server, or under ZeRO-3 in several.

    file_limit: largest size of a file in bytes; 0 for none
    """
    log = _next_log(folder)
    target = _run if processes == 1 else partial(_launch, processes)
    process = SERVER.Process(target=target, args=(folder, arguments, log, point, file_limit))
    process.start()
    assert process.pid is not None
    return Process(pid=process.pid, poll=lambda: process.exitcode, log=log)


def _next_log(folder: Path) -> Path:
    return folder / f"log-{len(list(folder.glob('log-*'))) + 1}"


def _run(folder: Path, arguments: Sequence[str], log: Path, point: KillPoint | None, file_limit: int) -> None:
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.path.append(str(folder))  # as `python -m rekatrain` does
    _drop_capabilities()
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if point:
        install(point)
    from rekatrain.trainer.cli import main

    status = 0
    try:
        main([*COMMAND, *arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        status = 1
    # A process of multiprocessing would wait for its children, and not call these first, as a main program does.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def start_command(folder: Path, *arguments: str, point: KillPoint | None = None, processes: int = 1) -> Process:
    """Start the command as a user does: on its own, or under ZeRO-3 by `accelerate launch`."""
    log = _next_log(folder)
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--config_file", LAUNCH_FILE]
    program = [HERE / "entry.py"] if point else ["-m", "rekatrain"]
    command = [sys.executable, *(launcher if processes > 1 else []), *program, *COMMAND, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / ".package"), "PYTHONWARNINGS": "ignore"}
    if point:
        environment[POINT] = json.dumps(asdict(point))
    with log.open("ab") as file:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    return Process(pid=process.pid, poll=process.poll, log=log)


def _launch(processes: int, *arguments: Any) -> None:  # Any: those of _run
    """Fork the ranks, as torchrun starts them, and end all after the first failure."""
    os.setsid()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    environment = _read_launch_environment(processes)
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update(environment, **{name: str(value) for name, value in own.items()})
            return _run(*arguments)
        ranks.append(pid)
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    sys.exit(1 if failed else 0)


def _read_launch_environment(processes: int) -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for the shipped launch file of ZeRO-3."""
    from accelerate.commands import launch

    found: dict[str, str] = {}

    def read(options: argparse.Namespace) -> None:
        found.update(launch.prepare_deepspeed_cmd_env(options)[1])

    launch.deepspeed_launcher = read
    options = ["--num_processes", str(processes), "--config_file", str(LAUNCH_FILE), "program"]
    launch.launch_command(launch.launch_command_parser().parse_args(options))
    return {name: value for name, value in found.items() if name.startswith("ACCELERATE_")}


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
