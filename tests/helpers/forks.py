"""Runs that start in milliseconds: forks of a server that has imported what a run imports.

`python -m rekatrain` takes about six seconds of a processor to import its libraries, and a launch that much per rank.
The server has imported them (warm.py), has no threads, and has computed nothing. A fork is a real process in a separate
session, with the environment, the folder and the streams of the program that it stands for; the ranks of a launch have
the variables that `accelerate launch` sets for the launch file.
"""

import argparse
import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

PROJECT = Path(__file__).parents[2]
LAUNCH_FILES = PROJECT / "recipes" / "accelerate"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.helpers.warm", "tests.conftest"])


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


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The number of ranks of a launch, and the name of its shipped launch file."""

    num_processes: int
    file: str = "zero3.yaml"


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program, as `python COMMAND` starts it in a folder; everything that it prints is appended to the file `log`.

    command: `-m MODULE ARGUMENTS`, or a script and its arguments
    prepare: called before the program, in each of its processes
    errors:  file of its standard error, if that is not `log`
    """

    command: tuple[str, ...]
    folder: Path
    log: Path
    environment: Mapping[str, str]
    prepare: Callable[[], None] | None = None
    errors: Path | None = None


def fork(program: Program, launch: Launch | None = None) -> Process:
    """Start a program, or its ranks where `launch` is given."""
    arguments = (program,) if launch is None else (program, launch)
    process = SERVER.Process(target=_run if launch is None else _run_ranks, args=arguments)
    with _importable_tests():
        process.start()
    assert process.pid is not None
    return Process(pid=process.pid, poll=lambda: process.exitcode, log=program.log)


@contextmanager
def _importable_tests() -> Iterator[None]:
    """Have the server, which the first fork starts, find the tests: it gets the environment, but not the path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{PROJECT}{os.pathsep}{before}" if before else str(PROJECT)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start_forked(folder: Path, *command: str, launch: Launch | None = None) -> Process:
    """Start `python COMMAND` in a folder with this process's environment; its output is in a file beside the folder."""
    number = 1 + len(list(folder.glob(".output.*")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    program = Program(command=command, folder=folder, log=folder / f".output.{number}", environment=environment)
    return fork(program, launch)


def run(command: Sequence[str], *, env: Mapping[str, str], **_options: object) -> subprocess.CompletedProcess[str]:
    """Return what `subprocess.run(command, capture_output=True, text=True, env=env)` does for a command of Python.

    The libraries read the settings of the hub when they are imported: a program with others does not fork.
    """
    if _hub_settings(env) != HUB_SETTINGS:
        return subprocess.run(command, capture_output=True, text=True, env=env)
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        words = tuple(word for word in command[1:] if word != "-P")
        program = Program(command=words, folder=Path.cwd(), log=out, environment={**env}, errors=errors)
        status = fork(program).wait()
        return subprocess.CompletedProcess(command, status, out.read_text(), errors.read_text())


def _hub_settings(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("HF_")}


HUB_SETTINGS = _hub_settings(os.environ)


def kill_tree(root: int, spared: int | None = None) -> None:
    """Kill a process and its descendants, but one."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(root)
        for each in (process, *process.children(recursive=True)):
            if each.pid != spared:
                with suppress(psutil.NoSuchProcess):
                    each.kill()


def _run(program: Program) -> None:
    os.setsid()
    os.chdir(program.folder)
    for stream, path in ((1, program.log), (2, program.errors or program.log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
    os.environ.clear()
    os.environ.update(program.environment)
    if program.prepare:
        program.prepare()
    status = 0
    try:
        _call(program.command)
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        status = 1
    # A process of multiprocessing would wait for its children, and not call these first, as a main program does.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def _call(command: tuple[str, ...]) -> None:
    if command[:2] == ("-m", "rekatrain"):
        from rekatrain.trainer.cli import main

        sys.path.append(os.getcwd())  # as `python -m rekatrain` does
        main(command[2:])
    elif command[0] == "-m":
        sys.argv = [*command[1:]]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*command]
        sys.path.insert(0, str(Path(command[0]).parent))  # as the interpreter does
        runpy.run_path(command[0], run_name="__main__")


def _run_ranks(program: Program, launch: Launch) -> None:
    """Fork the ranks, as a launch starts them; after the first failure end all, with its exit status.

    As in torchrun, the process that starts them hosts their store.
    """
    os.setsid()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    size = launch.num_processes
    shared = {**program.environment, **_read_launch_environment(launch), "MASTER_ADDR": "127.0.0.1"}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            environment = {**shared, **{name: str(value) for name, value in own.items()}}
            return _run(Program(**{**vars(program), "environment": environment}))
        ranks.append(pid)
    # After the forks: it has threads.
    _store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    sys.exit(failed if failed >= 0 else 1)


def _read_launch_environment(launch: Launch) -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for a shipped launch file."""
    from accelerate.commands import launch as accelerate_launch

    found: dict[str, str] = {}

    def read(options: argparse.Namespace) -> None:
        if options.use_deepspeed:
            found.update(accelerate_launch.prepare_deepspeed_cmd_env(options)[1])
        else:
            found.update(accelerate_launch.prepare_multi_gpu_env(options))

    for name in ("deepspeed_launcher", "multi_gpu_launcher", "simple_launcher"):
        setattr(accelerate_launch, name, read)
    file = str(LAUNCH_FILES / launch.file)
    options = ["--num_processes", str(launch.num_processes), "--config_file", file, "program"]
    accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(options))
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_"))}
