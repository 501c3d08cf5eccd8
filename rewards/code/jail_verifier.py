"""The job of reasoning_gym's verifiers inside the sandbox: judge each answer in a separate child process.

Verifiers evaluate answers as Python (`eval`, `sympy.parse_expr`). This process imports reasoning_gym once and never
reads an answer. It forks a child for each one, which can neither fork nor report on another answer, and kills it
afterwards.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pickle
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import Any, BinaryIO

jail_filter: Any = importlib.import_module("jail_filter")  # beside this file, which is in no package here
libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4  # 0: no other process can trace this one or open its files in /proc
READY = b"ready"
MAX_REPLY = 1_000  # bytes

Verifier = Callable[[str, dict[str, Any]], float]


def run(job: dict[str, Any], channels: list[int]) -> None:
    """Answer requests until the other end is closed; never return.

    A request is a line of JSON, {"task": ..., "size": ...}, and `size` bytes: a pickled pair of answer and entry, which
    the reward worker made. A reply is a line: `1` or `0` for the verdict, or `!` and the reason why there is none.
    """
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    # reasoning_gym imports matplotlib, which insists on a folder for a cache, but works if it cannot write there.
    os.environ["MPLCONFIGDIR"] = "/tmp"
    with os.fdopen(channels[0], "rb") as requests, os.fdopen(channels[1], "wb") as replies:
        try:
            import reasoning_gym  # noqa: F401
        except Exception as error:  # whatever an import raises
            send(replies, b"!" + describe(error))
            os._exit(1)
        send(replies, READY)
        serve(job, load_verifier, requests, replies)
    os._exit(0)


def load_verifier(task: str) -> Verifier:
    """Return the verifier of a task, after it has judged an answer that the task made.

    So it has imported and cached here, once, what it needs; sympy's parser takes 50 ms for that.
    """
    from reasoning_gym import create_dataset, get_score_answer_fn

    verifier = get_score_answer_fn(task)
    with contextlib.suppress(Exception):  # a task without defaults, or without an answer
        entry = create_dataset(task, size=1, seed=0)[0]
        verifier(entry["answer"], entry)
    gc.collect()
    gc.freeze()  # children share the memory of objects that the collector does not touch
    return verifier


def serve(job: dict[str, Any], load_verifier: Callable[[str], Verifier], requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer each request of the pipe."""
    verifiers: dict[str, Verifier] = {}
    for line in requests:
        request = json.loads(line)
        task, content = request["task"], requests.read(request["size"])
        try:
            verifier = verifiers.setdefault(task, verifiers.get(task) or load_verifier(task))
        except Exception as error:  # an unknown task, or one whose data set cannot be made
            send(replies, b"!" + describe(error))
        else:
            send(replies, judge(verifier, content, job, (requests.fileno(), replies.fileno())))


def judge(verifier: Verifier, content: bytes, job: dict[str, Any], private: tuple[int, ...]) -> bytes:
    """Return the reply of a child that runs the verifier, without the files `private` and under a time limit."""
    seconds, server = job["seconds"], os.getpid()
    verdict_out, verdict_in = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            for descriptor in (verdict_out, *private):
                os.close(descriptor)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != server:
                os._exit(1)  # it has ended before the kernel knew
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
            jail_filter.install(may_fork=False, same_user=job["same_user"])
            os.write(verdict_in, verify(verifier, *pickle.loads(content)))
        finally:
            os._exit(0)
    os.close(verdict_in)
    reply, is_late = read(verdict_out, seconds)
    os.close(verdict_out)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if is_late:
        return f"!no verdict after {seconds:g} seconds".encode()
    # The child belongs to the answer: all that it can write is one line of text.
    return b" ".join(reply[:MAX_REPLY].split()) or f"!the verifier died (exit code {exit_code(status)})".encode()


def verify(verifier: Verifier, answer: str, entry: dict[str, Any]) -> bytes:
    """Return the reply for an answer; partial credit is for answers that are not right."""
    try:
        return b"1" if verifier(answer, entry) == 1.0 else b"0"
    except BaseException:
        # Verifiers raise whatever their parsing raises (prime_factorization: ValueError from int("two")). A verifier
        # that can judge the gold answer works, so the text is at fault; one that cannot raises again, here.
        try:
            verifier(entry["answer"], entry)
        except Exception as error:
            return b"!" + describe(error)
        return b"0"


def read(descriptor: int, seconds: float) -> tuple[bytes, bool]:
    """Read until the other end is closed, the time is over or a reply is full; return the bytes, and True if late."""
    deadline, data = time.monotonic() + seconds, b""
    while len(data) <= MAX_REPLY:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return data, True
        part = os.read(descriptor, 1 << 12)
        if not part:
            break
        data += part
    return data, False


def exit_code(status: int) -> int:
    return os.waitstatus_to_exitcode(status)


def send(replies: BinaryIO, text: bytes) -> None:
    replies.write(text + b"\n")
    replies.flush()


def describe(error: Exception) -> bytes:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text.encode(errors="backslashreplace")[:MAX_REPLY]
