"""The jobs inside the sandbox: a program, a solution that answers calls, or the tests that call it; or verifiers.

A solution and its tests are in two sandboxes; jail_solution.py and jail_tests.py are the two sides.
"""

import atexit
import builtins
import importlib
import io
import os
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

# Beside this file, which is in no package inside the sandbox; imported while the file tree can still be seen.
jail_solution: Any = importlib.import_module("jail_solution")
jail_tests: Any = importlib.import_module("jail_tests")
jail_verifier: Any = importlib.import_module("jail_verifier")

ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}  # as of C.UTF-8
STANDARD_FILES = {"/dev/stdin": 0, "/proc/self/fd/0": 0, "/dev/fd/0": 0, "/dev/stdout": 1, "/dev/stderr": 2}


class PipeEnd:
    """An end of a pipe with the methods of a socket that asyncio uses to wake itself: sockets are forbidden here."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def setblocking(self, flag: bool) -> None:
        """Wait in later calls, or not."""
        os.set_blocking(self._descriptor, flag)

    def recv(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        return os.read(self._descriptor, size)

    def send(self, data: bytes) -> int:
        """Write bytes; return their number."""
        return os.write(self._descriptor, data)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


def run(job: dict[str, Any], channels: list[int]) -> None:
    """Run the job of this sandbox; never return."""
    if job["kind"] == "verifier":
        jail_verifier.run(job, channels)
    sys.setrecursionlimit(10_000 if job["kind"] == "program" else 3_000)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # Python without the module `site` has none
    socket.socketpair = _pair_of(socket.socketpair)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # else all programs would draw the numbers of the server
    if job["kind"] == "program":
        run_program(job["source"], job["files"])
    elif job["kind"] == "solution":
        jail_solution.serve(job["sources"], os.fdopen(channels[0]), os.fdopen(channels[1], "w"))
    else:
        jail_tests.run_tests(job, os.fdopen(channels[0]), os.fdopen(channels[1], "w"), channels[2])
    os._exit(0)


def run_program(source: str, files: Mapping[str, str]) -> None:
    """Run a whole program, as `python program.py` would; never return.

    files: texts that it can open by these names
    """
    sys.argv = ["program.py"]
    sys.stdin, sys.stdout = os.fdopen(0, "r", **ENCODING), os.fdopen(1, "w", **ENCODING)
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout)
    builtins.open = io.open = _opener(io.open, files)
    os.open = _low_opener(os.open)
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__dict__.update(__builtins__=builtins, __file__="program.py")
    code = 0
    try:
        exec(compile(source, "program.py", "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        # As Python does at its end.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        code = code or 120
    os._exit(code & 0xFF)


def _opener(open_file: Any, files: Mapping[str, str]) -> Any:
    """Return `open` that finds `files`, and the standard files by their descriptors, for there is no /proc."""

    def open_known(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        name = os.fspath(file) if isinstance(file, os.PathLike) else file
        if name in STANDARD_FILES:
            return open_file(os.dup(STANDARD_FILES[name]), mode, *arguments, **named)
        if name in files and not set(mode) & set("wax+"):
            content = io.BytesIO(files[name].encode(errors="surrogateescape"))
            return content if "b" in mode else io.TextIOWrapper(content, encoding="utf-8")
        return open_file(file, mode, *arguments, **named)

    return open_known


def _low_opener(open_file: Any) -> Any:
    def open_known(path: Any, *arguments: Any, **named: Any) -> int:
        is_known = isinstance(path, str) and path in STANDARD_FILES
        return os.dup(STANDARD_FILES[path]) if is_known else open_file(path, *arguments, **named)

    return open_known


def _pair_of(socketpair: Any) -> Any:
    """Return `socketpair` that makes a pipe where no kind of socket is requested."""

    def pair(*arguments: Any, **named: Any) -> Any:
        if arguments or named:
            return socketpair(*arguments, **named)
        return tuple(map(PipeEnd, os.pipe()))

    return pair
