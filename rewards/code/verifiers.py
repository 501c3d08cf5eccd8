"""The reward `reasoning_gym`: a task's own verifier, in the sandbox, because verifiers evaluate answers as Python."""

import contextlib
import importlib.util
import json
import os
import pickle
import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt
from pydantic import FiniteFloat

from rekatrain.data.chat import ParsedCompletion
from rekatrain.rewards.code.launcher import Isolation, Limits, start_sandbox
from rekatrain.rewards.code.packages import package_folders
from rekatrain.rewards.code.sandbox import check_isolation
from rekatrain.rewards.errors import RewardError

# Seconds for the imports of a new sandbox on a busy machine.
IMPORT_SECONDS = 60.0
# Seconds beyond the time limit: the sandbox reports a late verdict itself; then the worker gives it up; then the pool
# gives the worker up.
REPLY_SECONDS, POOL_SECONDS = 3.0, 5.0


class ReasoningGym:
    """1.0 if the task's own verifier gives the answer full marks, else 0.0.

    A verifier's partial credit is for answers that are not right. Raises RewardError for an unknown task, for an answer
    with which the verifier does not end in time or dies, and for a verifier that fails on the gold answer of the entry.
    """

    def __init__(
        self,
        *,
        time_limit: Annotated[FiniteFloat, Gt(0)] = 2.0,
        memory_limit_mb: Annotated[int, Ge(256)] = 1024,
        isolation: Isolation = "namespaces",
    ) -> None:
        """Check by a trial run that this machine can provide the isolation.

        time_limit:      seconds per completion
        memory_limit_mb: address space of the verifier, in MiB
        isolation:       namespaces or rlimits, see rewards/README.md
        """
        check_isolation(isolation)
        self.timeout = time_limit + POOL_SECONDS
        limits = Limits(seconds=time_limit, memory=memory_limit_mb << 20)
        self._server = VerifierServer(limits, isolation)

    def setup(self) -> None:
        """Start the sandbox and import reasoning_gym in it, which takes seconds."""
        self._server.start()

    def __call__(
        self, completion: ParsedCompletion, *, reasoning_gym_task: str, reasoning_gym_entry: Mapping[str, Any]
    ) -> float:
        return float(self._server.verify(reasoning_gym_task, completion.answer, reasoning_gym_entry))

    def close(self) -> None:
        """End the sandbox. It also ends with the process that started it."""
        self._server.close()


class VerifierServer:
    """A sandbox with reasoning_gym that judges one answer after another. A new one replaces it if it hangs or dies."""

    def __init__(self, limits: Limits, isolation: Isolation) -> None:
        self._limits, self._isolation = limits, isolation
        self._resources: contextlib.ExitStack | None = None
        self._requests = self._replies = -1

    def start(self) -> None:
        """Start the sandbox unless it runs; raise RewardError if that fails."""
        if self._resources is not None:
            return
        paths = _package_folders()
        requests_out, self._requests = os.pipe()
        self._replies, replies_in = os.pipe()
        self._resources = contextlib.ExitStack()
        self._resources.callback(os.close, self._requests)
        self._resources.callback(os.close, self._replies)
        try:
            sandbox = self._resources.enter_context(
                start_sandbox(
                    {"kind": "verifier", "seconds": self._limits.seconds, "same_user": self._isolation == "rlimits"},
                    self._limits,
                    self._isolation,
                    channels=(requests_out, replies_in),
                    paths=paths,
                )
            )
            sandbox.wait_until_started()
            reply = self._read_line(IMPORT_SECONDS)
            if reply != "ready":
                raise RewardError(f"reasoning_gym cannot be imported in the sandbox: {reply.removeprefix('!')}")
        except BaseException:
            self.close()
            raise

    def verify(self, task: str, answer: str, entry: Mapping[str, Any]) -> bool:
        """Return True if the verifier of the task gives the answer full marks; raise RewardError for no verdict."""
        content = pickle.dumps((answer, dict(entry)))
        header = json.dumps({"task": task, "size": len(content)}).encode()
        self.start()
        try:
            self._write(header + b"\n" + content)
        except BrokenPipeError:  # it died since the last answer, which is not this answer's fault
            self.close()
            self.start()
            self._write(header + b"\n" + content)
        try:
            reply = self._read_line(self._limits.seconds + REPLY_SECONDS)
        except RewardError:
            self.close()
            raise
        if reply not in ("0", "1"):
            raise RewardError(f"verifier of {task}: {reply.removeprefix('!')}")
        return reply == "1"

    def close(self) -> None:
        """End the sandbox, whatever it is doing."""
        if self._resources is not None:
            resources, self._resources = self._resources, None
            resources.close()

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._requests, data) :]

    def _read_line(self, seconds: float) -> str:
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            if not select.select([self._replies], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise RewardError(f"the sandbox of the verifier did not answer within {seconds:g} seconds")
            part = os.read(self._replies, 1 << 12)
            if not part:
                raise RewardError("the sandbox of the verifier died")
            line += part
        return line.decode(errors="replace").strip()


def _package_folders() -> list[str]:
    """Return the folders of installed packages, and the one that holds reasoning_gym, without symbolic links."""
    folders = package_folders()
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is not None and spec.origin is not None:
        folders = [*folders, os.path.realpath(Path(spec.origin).parents[1])]
    return list(dict.fromkeys(folders))
