"""Several servers as one: work goes to a server that is up, and to another one, or later, where it goes down.

Not strictly in turns: a group goes to the server with the fewest in flight, so that a slow server gets less of them.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from rekatrain.data.errors import InputError
from rekatrain.trainer.rloo.sampler.vllm.client import ServerClient, ServerDown

logger = logging.getLogger(__name__)

# Attempts at one piece of work: a server that goes down with each of them has something against it.
MAX_ATTEMPTS = 8
_BACK_OFF = wait_random_exponential(multiplier=0.25, max=10)

Answer = TypeVar("Answer")


@dataclass(kw_only=True)
class _Place:
    """A server and what it has in flight."""

    client: ServerClient
    num_in_flight: int = 0
    is_up: bool = False
    is_known: bool = False  # to be up or down: until all are, the first to be up would get all the work


class ServerPool:
    """Servers for one step's work; used within `async with`.

    num_retries: pieces of work that were begun again
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        make_ready: Callable[[ServerClient], Awaitable[None]],
        *,
        max_in_flight: int,
        server_timeout: float,
    ) -> None:
        """`make_ready` is awaited before a server gets work, again when it has been down; it may raise ServerDown.

        max_in_flight:  on all servers together
        server_timeout: seconds without any server after which the step fails
        """
        self._places = [_Place(client=client) for client in clients]
        self._make_ready = make_ready
        self._max_in_flight, self._server_timeout = max_in_flight, server_timeout
        self._down: dict[str, str] = {}
        self._error: BaseException | None = None
        self._last_up = time.monotonic()
        self.num_retries = 0

    async def __aenter__(self) -> "ServerPool":
        self._changed = asyncio.Condition()
        self._stack = AsyncExitStack()
        for place in self._places:
            await self._stack.enter_async_context(place.client)
        self._tasks = {asyncio.create_task(self._bring_up(place)) for place in self._places}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def run(self, work: Callable[[ServerClient], Awaitable[Answer]]) -> Answer:
        """What `work` gives on one of the servers; where it raises ServerDown it is begun again, there or elsewhere."""
        told = ""
        for attempt in range(MAX_ATTEMPTS):
            self.num_retries += attempt > 0
            place = await self._take()
            try:
                return await work(place.client)
            except ServerDown as error:
                told = str(error)
                self._goes_down(place)
            finally:
                place.num_in_flight -= 1
                await self._notify()
        raise InputError(f"a group of rollouts failed {MAX_ATTEMPTS} times; the last time {told}")

    async def _take(self) -> _Place:
        async with self._changed:
            await self._changed.wait_for(self._has_room)
            if self._error is not None:
                raise self._error
            place = min((place for place in self._places if place.is_up), key=lambda place: place.num_in_flight)
            place.num_in_flight += 1
            return place

    def _has_room(self) -> bool:
        if self._error is not None:
            return True
        if not all(place.is_known for place in self._places):
            return False
        is_free = sum(place.num_in_flight for place in self._places) < self._max_in_flight
        return is_free and any(place.is_up for place in self._places)

    def _goes_down(self, place: _Place) -> None:
        if place.is_up:  # and not already seen by another piece of work
            place.is_up = False
            self._last_up = time.monotonic()
            self._tasks.add(asyncio.create_task(self._bring_up(place)))

    async def _bring_up(self, place: _Place) -> None:
        url = place.client.url
        attempts = AsyncRetrying(retry=retry_if_exception_type(ServerDown), wait=_BACK_OFF, reraise=True)
        try:
            async for attempt in attempts:
                with attempt:
                    await self._try(place)
        except Exception as error:  # what nobody waits for must reach those who wait for a server
            self._error = self._error or error
        else:
            place.is_up = place.is_known = True
            if self._down.pop(url, None):
                logger.warning("rollouts: the vLLM server %s is up again", url)
        await self._notify()

    async def _try(self, place: _Place) -> None:
        try:
            await place.client.get("/health")
            await self._make_ready(place.client)
        except ServerDown as error:
            if place.client.url not in self._down:
                logger.warning("rollouts: %s; waiting for it", error)
            self._down[place.client.url] = str(error)
            place.is_known = True
            await self._notify()
            waited = time.monotonic() - self._last_up
            if waited > self._server_timeout and not any(place.is_up for place in self._places):
                raise InputError(
                    f"no vLLM server for {self._server_timeout:g} s (rloo.vllm_server_timeout): {error}; start it and "
                    "go on with --resume"
                ) from None
            raise

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
