"""How worker processes start: forked from a server of their own, without the main module of the training process.

multiprocessing lets a child import the parent's `__main__` again. A worker looks its rewards up by name and needs none
of it, and importing it would start a second run where a script has no `if __name__ == "__main__":`, and fail in a
here-document. The server and its context are separate from multiprocessing's own, which the user's code may use.
"""

import io
import os
from multiprocessing import context, forkserver, popen_forkserver, process, reduction, spawn, util
from typing import Any

SAFE_PATH = "PYTHONSAFEPATH"


class WorkerServer(forkserver.ForkServer):
    """A fork server that does not look for Python's own modules in the current folder."""

    def ensure_running(self) -> None:
        """Start the server unless it runs."""
        is_set = SAFE_PATH in os.environ
        os.environ.setdefault(SAFE_PATH, "1")  # `python -c` would put the current folder first on the path
        try:
            super().ensure_running()
        finally:
            if not is_set:
                os.environ.pop(SAFE_PATH, None)


SERVER = WorkerServer()


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
        self.sentinel, pipe = SERVER.connect_to_new_process(self._fds)
        # The worker knows by this end of the pipe whether the training process lives.
        parent_end = os.dup(pipe)
        self.finalizer = util.Finalize(self, util.close_fds, (parent_end, self.sentinel))
        with open(pipe, "wb", closefd=True) as file:
            file.write(buffer.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


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
