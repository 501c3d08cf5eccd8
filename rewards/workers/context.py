"""The start of worker processes: forked from a separate server, without the main module of the training process.

multiprocessing has a child import the parent's `__main__` again. A worker looks its rewards up by name and needs
none of it: importing it would start a second run if a script has no `if __name__ == "__main__":`, and would fail in a
here-document. The server and its context are separate from multiprocessing's own, which the user's code may use.
"""

import io
import os
import sys
import types
from multiprocessing import context, forkserver, popen_forkserver, process, reduction, spawn, util
from typing import Any

from rekatrain.rewards.workers.environment import allowed_names

# Variables that the server is started with; the workers get the user's own values back.
CHANGED = ("PYTHONPATH", "PYTHONSAFEPATH")
# The standard library starts its server with the whole environment, which stays readable in /proc. So the new process
# first replaces itself, with some variables only: their names are arguments, because arguments can be read by others.
EXECUTE = (
    "import os, sys; path, names = sys.argv[1], sys.argv[2].split(','); "
    "environment = {name: os.environ[name] for name in names if name in os.environ}; "
    "os.setsid(); os.execve(path, sys.argv[4:], {**environment, 'PYTHONPATH': sys.argv[3], 'PYTHONSAFEPATH': '1'})"
)


class _Utilities:
    """multiprocessing.util for the start of the server, which then has the environment of the workers."""

    def __getattr__(self, name: str) -> Any:  # whatever the module has
        return getattr(util, name)

    @staticmethod
    def spawnv_passfds(path: str, arguments: list[str], descriptors: list[int]) -> int:
        """Start the server and return its id. It imports from where this process does.

        Its interpreter would search the current folder first, which may hold a `rekatrain.py` or `random.py` of the
        user's.
        """
        names = ",".join(allowed_names([*os.environ]))
        python_path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        first = [path, "-I", "-S", "-c", EXECUTE, path, names, python_path, *arguments]
        return util.spawnv_passfds(path, first, descriptors)  # type: ignore[arg-type]  # typeshed has bytes only


class WorkerServer(forkserver.ForkServer):
    """A fork server that has the environment of the workers, and changes none in this process."""

    # The method of the standard library, with another function to start a process. os.environ is not changed for the
    # moment of the start: other threads read it.
    ensure_running = types.FunctionType(
        forkserver.ForkServer.ensure_running.__code__, {**vars(forkserver), "util": _Utilities()}
    )


SERVER = WorkerServer()


def read_environment() -> dict[str, str | None]:
    """Return the values of CHANGED; None for a variable that is not set."""
    return {name: os.environ.get(name) for name in CHANGED}


class WorkerPopen(popen_forkserver.Popen):
    """A process of SERVER."""

    def _launch(self, process_obj: process.BaseProcess) -> None:
        # As in multiprocessing, but for the server and the main module, which is left out.
        data = spawn.get_preparation_data(process_obj.name)
        data = {key: value for key, value in data.items() if not key.startswith("init_main_")}
        buffer = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(data, buffer)
            reduction.dump(process_obj, buffer)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, pipe = SERVER.connect_to_new_process(self._fds)  # type: ignore[attr-defined]  # of the base class
        # The worker knows by this end of the pipe whether the training process lives.
        parent_end = os.dup(pipe)
        self.finalizer = util.Finalize(self, _close, (parent_end, self.sentinel))
        with open(pipe, "wb", closefd=True) as file:
            file.write(buffer.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class WorkerProcess(context.ForkServerProcess):
    """A process that a pool starts."""

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> Any:  # typeshed lacks the base class
        return WorkerPopen(process_obj)


class WorkerContext(context.ForkServerContext):
    """The multiprocessing context of the workers."""

    Process = WorkerProcess

    def preload(self, modules: list[str]) -> None:
        """Have the server import these modules when it starts; later calls have no effect."""
        SERVER.set_forkserver_preload(modules)
