"""Spread requests over several vLLM servers; retry on the same or another server when one goes down.

A group goes to the server with the least work: the groups of this process that are in flight there, times the server's
pace. Of equals it is the next in turn, and each process begins at another server: processes do not see each other's
groups, but together they use all servers evenly.
"""

import asyncio
import heapq
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from rekatrain.data.errors import InputError
from rekatrain.trainer.rloo.sampler.vllm.client import ServerClient, ServerDown

logger = logging.getLogger(__name__)

# Attempts per job. After that many, assume that the request itself crashes the server.
MAX_ATTEMPTS = 8
# Part of a server's pace that a new measurement decides, and that it keeps when a batch left it out.
PACE_STEP, PACE_KEPT = 0.5, 0.7
_BACK_OFF = wait_random_exponential(multiplier=0.25, max=10)

Result = TypeVar("Result")
Order = tuple[int, ...]


class Paces:
    """Seconds per token of each server, as its last groups took; kept from batch to batch.

    A server is slow only from twice the time of the fastest on: lengths and the load of other processes are noise.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._measured: set[str] = set()

    def begin_batch(self) -> None:
        """Let the servers that the last batch left out become faster, so that each is measured again some time."""
        for url in self._seconds.keys() - self._measured:
            self._seconds[url] *= PACE_KEPT
        self._measured.clear()

    def measure(self, url: str, seconds: float, num_tokens: int) -> None:
        """Record the time of a group whose longest completion has `num_tokens` tokens."""
        pace = seconds / num_tokens
        self._seconds[url] = PACE_STEP * pace + (1 - PACE_STEP) * self._seconds.get(url, pace)
        self._measured.add(url)

    def factor(self, url: str) -> int:
        """Return how many times slower than the fastest a server is, rounded down to 1, 2, 4, ..."""
        if url not in self._seconds:
            return 1
        return 2 ** int(math.log2(max(self._seconds[url] / min(self._seconds.values()), 1)))


@dataclass(kw_only=True)
class _Server:
    """A server with its state.

    turn:     number of the group that it got last; before the first, its place in the order of this process
    is_known: True once the server has been seen up or down. Until all servers are known, none gets work: otherwise the
              first to be up would get all of it.
    """

    client: ServerClient
    turn: int
    num_in_flight: int = 0
    is_up: bool = False
    is_known: bool = False


class ServerPool:
    """The servers of one step, used within `async with`.

    num_retries: number of jobs that were started again
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        make_ready: Callable[[ServerClient], Awaitable[None]],
        *,
        max_in_flight: int,
        server_timeout: float,
        first_server: int = 0,
        paces: Paces | None = None,
    ) -> None:
        """Store the settings; nothing is sent.

        make_ready:     awaited before a server gets work, and again after it was down; may raise ServerDown
        max_in_flight:  jobs in flight on all servers together
        server_timeout: seconds without any server after which the step fails
        first_server:   index of the server that gets the first group, modulo their number
        paces:          of the servers, from earlier batches
        """
        num = len(clients)
        self._servers = [
            _Server(client=client, turn=(index - first_server) % num - num) for index, client in enumerate(clients)
        ]
        self._num_groups = 0
        self._waiting: list[tuple[Order, int]] = []
        self._tickets = count()
        self._paces = paces or Paces()
        self._make_ready = make_ready
        self._max_in_flight, self._server_timeout = max_in_flight, server_timeout
        self._down: dict[str, str] = {}
        self._error: BaseException | None = None
        self._last_up = time.monotonic()
        self.num_retries = 0

    async def __aenter__(self) -> "ServerPool":
        self._changed = asyncio.Condition()
        self._stack = AsyncExitStack()
        for server in self._servers:
            await self._stack.enter_async_context(server.client)
        self._tasks = {asyncio.create_task(self._bring_up(server)) for server in self._servers}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def run(
        self, job: Callable[[ServerClient], Awaitable[Result]], num_tokens: Callable[[Result], int], order: Order = ()
    ) -> Result:
        """Run `job` on one of the servers and return its result; start it again if it raises ServerDown.

        order:      of jobs that wait for room, the least begins first; of equals, the one that came first
        num_tokens: returns how many tokens of a result were drawn one after the other, for the pace of the server

        Raise InputError after MAX_ATTEMPTS attempts, or when no server is up for `server_timeout` seconds.
        """
        message = ""
        for attempt in range(MAX_ATTEMPTS):
            self.num_retries += attempt > 0
            server = await self._acquire(order)
            start = time.monotonic()
            try:
                result = await job(server.client)
                self._paces.measure(server.client.url, time.monotonic() - start, num_tokens(result))
                return result
            except ServerDown as error:
                message = str(error)
                self._mark_down(server)
            finally:
                server.num_in_flight -= 1
                await self._notify()
        raise InputError(f"a group of rollouts failed {MAX_ATTEMPTS} times; last error: {message}")

    async def _acquire(self, order: Order) -> _Server:
        ticket = (order, next(self._tickets))
        heapq.heappush(self._waiting, ticket)
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._has_room() and self._is_next(ticket))
                if self._error is not None:
                    raise self._error
                server = min((server for server in self._servers if server.is_up), key=self._work)
                server.num_in_flight += 1
                server.turn, self._num_groups = self._num_groups, self._num_groups + 1
                return server
        finally:
            self._waiting.remove(ticket)
            heapq.heapify(self._waiting)
            await self._notify()  # the next one may have room, too

    def _is_next(self, ticket: tuple[Order, int]) -> bool:
        return self._error is not None or self._waiting[0] == ticket

    def _work(self, server: _Server) -> tuple[int, int]:
        """Return the work of a server with one group more, and its turn: the least of them gets the group."""
        return (server.num_in_flight + 1) * self._paces.factor(server.client.url), server.turn

    def _has_room(self) -> bool:
        if self._error is not None:
            return True
        if not all(server.is_known for server in self._servers):
            return False
        is_free = sum(server.num_in_flight for server in self._servers) < self._max_in_flight
        return is_free and any(server.is_up for server in self._servers)

    def _mark_down(self, server: _Server) -> None:
        if server.is_up:  # otherwise another job has already marked it
            server.is_up = False
            self._last_up = time.monotonic()
            self._tasks.add(asyncio.create_task(self._bring_up(server)))

    async def _bring_up(self, server: _Server) -> None:
        """Wait until a server is up and ready, with back-off between attempts."""
        url = server.client.url
        attempts = AsyncRetrying(retry=retry_if_exception_type(ServerDown), wait=_BACK_OFF, reraise=True)
        try:
            async for attempt in attempts:
                with attempt:
                    await self._check_ready(server)
        except Exception as error:  # nobody awaits this task: `_acquire` raises its error
            self._error = self._error or error
        else:
            server.is_up = server.is_known = True
            if self._down.pop(url, None):
                logger.warning("rollouts: the vLLM server %s is up again", url)
        await self._notify()

    async def _check_ready(self, server: _Server) -> None:
        """Make one attempt to reach a server and make it ready.

        Raise ServerDown where it fails, and InputError if no server has been up for `server_timeout` seconds.
        """
        try:
            await server.client.get("/health")
            await self._make_ready(server.client)
        except ServerDown as error:
            if server.client.url not in self._down:
                logger.warning("rollouts: %s; waiting for it", error)
            self._down[server.client.url] = str(error)
            server.is_known = True
            await self._notify()
            seconds_down = time.monotonic() - self._last_up
            if seconds_down > self._server_timeout and not any(server.is_up for server in self._servers):
                raise InputError(
                    f"no vLLM server for {self._server_timeout:g} s (rloo.vllm_server_timeout): {error}; start one and "
                    "continue the run with --resume"
                ) from None
            raise

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
