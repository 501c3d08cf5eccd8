"""Short messages between the ranks of a launch, through the TCPStore of its rendezvous.

They work before the process group is connected and while one of its collectives hangs, so they are for what must be
known then: that a rank has failed, is interrupted, or has another recipe than rank 0.
"""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import cache

import psutil
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch does not list them as exported
from torch.distributed.rendezvous import rendezvous

from rekatrain.data.errors import InputError
from rekatrain.trainer.processes.launched import is_launched

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
# A rank that fails waits so long for others to fail with the same message, which is then printed once.
FAILURE_SECONDS = 2.0
CONNECT_SECONDS = 600.0
# Differences that an error names.
MAX_DIFFERENCES = 3


@cache
def ranks() -> "Ranks | None":
    """Return the ranks of this launch, connected at the first call; None in a single process."""
    if not is_launched():
        return None
    try:
        return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except RuntimeError as error:  # the process group, which uses the same address, will fail and end the run
        logger.warning("rank 0 cannot be reached: %s", str(error).partition("\n")[0])
        return None


class Ranks:
    """This rank's view of all ranks of the launch."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.host = rank, size, socket.gethostname()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, *_ = next(iter(rendezvous("env://", rank, size, timeout=timedelta(seconds=CONNECT_SECONDS))))
        self._store: Store = PrefixStore(f"rekatrain/{attempt}", store)
        self.is_ending = False
        self._num_agreements = 0
        self._siblings: dict[int, int] | None = None
        self._store.set(f"process/{rank}", json.dumps([self.host, os.getpid()]))
        if attempt != "0":
            self._leave_the_old_store()

    def wait_for_all(self, name: str) -> None:
        """Wait until every rank has called this with `name`; exit as a rank that has failed instead, in silence."""
        self._store.add(f"arrived/{name}", 1)
        while self._store.add(f"arrived/{name}", 0) < self.size:
            if self.num_failed():
                sys.exit(self.let_others_speak())
            time.sleep(POLL_SECONDS)

    def agree(self, name: str, facts: Mapping[str, str]) -> None:
        """Raise InputError on a rank whose facts differ from those of rank 0; return when all have agreed."""
        self._num_agreements += 1  # a script may make several runs in one launch
        name = f"{self._num_agreements}/{name}"
        self._store.set(f"facts/{name}/{self.rank}", json.dumps([self.host, dict(facts)]))
        self.wait_for_all(f"facts/{name}")
        host, first = json.loads(self._store.get(f"facts/{name}/0"))
        differing = [
            f"{key} is {_show(facts.get(key))} here and {_show(first.get(key))} there"
            for key in sorted(facts.keys() | first.keys())
            if facts.get(key) != first.get(key)
        ]
        if differing:
            more = len(differing) - MAX_DIFFERENCES
            named = "; ".join(differing[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise InputError(f"all ranks must start from the same, and rank 0 on {host} has another start: {named}")
        self.wait_for_all(f"agreed/{name}")

    def fail(self, message: str, status: int, *, details: str = "", names_rank: bool = True) -> None:
        """Report that this rank ends with `message`, and print it if this is the lowest rank that ends with it.

        It is printed with rank and host, unless all ranks have it or `names_rank` is False. `details` follow in lines
        below it.
        """
        self.is_ending = True
        try:
            self._store.compare_set("status", "", str(status))
            self._store.set(f"failure/{self.rank}", message)
            self._store.add("failures", 1)
            deadline = time.monotonic() + FAILURE_SECONDS
            while self.num_failed() < self.size and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            same = [rank for rank in range(self.size) if self._read(f"failure/{rank}") == message.encode()]
        except RuntimeError:  # the store has ended with the launcher of rank 0
            same = [self.rank]
        if min(same, default=self.rank) != self.rank:
            self.let_others_speak()
            return
        who = f"rank {self.rank} on {self.host}: " if names_rank and len(same) < self.size else ""
        print("\n".join(filter(None, (f"rekatrain: {who}{message}", details.rstrip()))), file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            self._store.add("said", 1)

    def let_others_speak(self) -> int:
        """Return the exit status of the rank that failed first, once one has printed why it failed, or after a while.

        Launchers end all ranks after the first.
        """
        deadline = time.monotonic() + 2 * FAILURE_SECONDS
        try:
            while not self._store.add("said", 0) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return self.status() or 1
        except RuntimeError:  # the store has ended with the launcher of rank 0
            return 1

    def num_failed(self) -> int:
        """Return the number of ranks that have reported a failure."""
        return self._store.add("failures", 0)

    def status(self) -> int | None:
        """Return the exit status of the rank that failed first; None if none has reported a failure."""
        status = self._read("status")
        return None if status is None else int(status)

    def claim(self, name: str) -> bool:
        """Return True for the first rank that calls this with `name`."""
        return self._store.add(f"claim/{name}", 1) == 1

    def interrupt(self, cause: str) -> None:
        """Report to all ranks that the run is interrupted; the first cause counts."""
        self._store.compare_set("interrupted", "", cause)

    def interruption(self) -> str | None:
        """Return the cause of an interruption that some rank has reported."""
        cause = self._read("interrupted")
        return None if cause is None else cause.decode()

    def leave(self) -> None:
        """Report that this rank is about to end as it should."""
        self._store.set(f"left/{self.rank}", "")

    def dead_sibling(self) -> str | None:
        """Return which rank of this host died without a word, as text; None if there is none."""
        if self._siblings is None:
            processes = {rank: json.loads(self._read(f"process/{rank}") or "[null, 0]") for rank in range(self.size)}
            self._siblings = {rank: pid for rank, (host, pid) in processes.items() if host == self.host}
        for rank, pid in self._siblings.items():
            has_spoken = self._store.check([f"left/{rank}"]) or self._store.check([f"failure/{rank}"])
            if not _is_alive(pid) and not has_spoken:
                return f"rank {rank} on {self.host} (process {pid})"
        return None

    def _read(self, key: str) -> bytes | None:
        return self._store.get(key) if self._store.check([key]) else None

    def _leave_the_old_store(self) -> None:
        """Have the process group of a restart meet at a new store: the launcher's holds the addresses of the dead.

        torchrun restarts its processes with the store of the first attempt (torch 2.13), where gloo then finds the
        addresses at which earlier processes listened.
        """
        if self.rank == 0:
            with socket.socket() as free:
                free.bind(("", 0))
                self._store.set("port", str(free.getsockname()[1]))
        os.environ["MASTER_PORT"] = self._store.get("port").decode()
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _show(value: str | None) -> str:
    return "missing" if value is None else value
