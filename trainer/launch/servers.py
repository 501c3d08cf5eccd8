"""The vLLM servers of a launch: started, waited for, and started again when they die."""

import time
from contextlib import suppress
from dataclasses import dataclass

import httpx2

from rekatrain.data.errors import TrainingStopped
from rekatrain.trainer.launch.output import Output
from rekatrain.trainer.launch.processes import Command, Kept

HEALTH_SECONDS, TIMEOUT_SECONDS = 0.5, 1.0


@dataclass(kw_only=True)
class Server:
    """A server, its process while it is started, and the number of times that it was started again."""

    command: Command
    url: str
    kept: Kept | None = None
    num_restarts: int = 0
    is_up: bool = False

    @property
    def is_dead(self) -> bool:
        """True if the server was started and has ended."""
        return self.kept is not None and self.kept.poll() is not None

    @property
    def seconds(self) -> float:
        """Seconds since the server was started."""
        return 0.0 if self.kept is None else time.monotonic() - self.kept.started


class Servers:
    """All servers of a launch."""

    def __init__(self, servers: list[Server], output: Output, *, start_timeout: float, max_restarts: int) -> None:
        """Store the settings; nothing is started.

        start_timeout: seconds until a started server must respond
        max_restarts:  number of times that each server is started again after it has died
        """
        self.servers, self._output = servers, output
        self._start_timeout, self._max_restarts = start_timeout, max_restarts
        self._checked = 0.0

    @property
    def kept(self) -> list[Kept]:
        """The processes of the servers that were started."""
        return [server.kept for server in self.servers if server.kept is not None]

    def start(self) -> None:
        """Start every server that does not run."""
        for server in self.servers:
            if server.kept is None or server.is_dead:
                server.is_up = False
                server.kept = Kept(server.command, self._output.line)

    def are_ready(self) -> bool:
        """Return True once all servers respond; raise TrainingStopped if one ends before, or needs too long."""
        self.check_health()
        for server in self.servers:
            if server.kept is None or server.is_up:
                continue
            name, status = server.command.name, server.kept.poll()
            if status is not None:
                raise TrainingStopped(f"{name} ended with status {status} before it was ready: {server.kept.reason()}")
            if server.seconds > self._start_timeout:
                raise TrainingStopped(
                    f"{name} is not ready after {self._start_timeout:g} s; its last line: {server.kept.reason()}; "
                    "raise launch.server_start_timeout if it only needs longer"
                )
        return all(server.is_up for server in self.servers)

    def find_dead(self) -> list[Server]:
        """Return the servers that have died, or were started again and do not respond in time: those are killed.

        Each counts as one restart; raise TrainingStopped beyond the limit.
        """
        dead = []
        for server in self.servers:
            if server.kept is not None and not server.is_up and server.seconds > self._start_timeout:
                server.kept.end()
            if not server.is_dead:
                continue
            assert server.kept is not None
            name, status, reason = server.command.name, server.kept.poll(), server.kept.reason()
            server.is_up = False
            if server.num_restarts == self._max_restarts:
                raise TrainingStopped(
                    f"{name} died {server.num_restarts + 1} times, last with status {status}: {reason}; continue the "
                    "run with --resume, and raise launch.max_server_restarts if that is usual"
                )
            server.num_restarts += 1
            self._output.say(
                f"{name} died with status {status} ({reason}): restart {server.num_restarts} of {self._max_restarts}"
            )
            dead.append(server)
        return dead

    def check_health(self) -> None:
        """Ask the servers that do not respond yet, at most twice a second."""
        if time.monotonic() - self._checked < HEALTH_SECONDS:
            return
        for server in self.servers:
            if server.kept is not None and not server.is_up and not server.is_dead:
                with suppress(httpx2.TransportError):
                    response = httpx2.get(f"{server.url}/health", timeout=TIMEOUT_SECONDS, trust_env=False)
                    server.is_up = response.status_code == 200
        self._checked = time.monotonic()

    def describe(self) -> str:
        """Return the number of servers that are up and of restarts, for the progress line."""
        num_restarts = sum(server.num_restarts for server in self.servers)
        text = f"servers {sum(server.is_up for server in self.servers)}/{len(self.servers)} up" if self.servers else ""
        return text + (f", {num_restarts} restarted" if num_restarts else "")
