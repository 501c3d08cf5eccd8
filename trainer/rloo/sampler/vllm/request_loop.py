"""An event loop in a thread, with one pool of servers for the batches of several threads: `max_staleness` above 1.

While the last groups of one batch are sampled, servers begin with the next batch.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from rekatrain.trainer.rloo.sampler.vllm.server_pool import ServerPool

Result = TypeVar("Result")
LINGER_SECONDS = 60.0


class RequestLoop:
    """Runs coroutines on a pool of servers, from any thread."""

    def __init__(self, pool: ServerPool) -> None:
        """Start the thread; it ends with the process, or at `close`."""
        self.pool = pool
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="requests", daemon=True).start()
        asyncio.run_coroutine_threadsafe(pool.__aenter__(), self._loop).result()

    def run(self, job: Callable[[ServerPool], Coroutine[Any, Any, Result]]) -> Result:
        """Return the result of a coroutine that uses the pool; called by another thread."""
        return asyncio.run_coroutine_threadsafe(job(self.pool), self._loop).result()

    def close(self) -> None:
        """Disconnect from the servers and end the thread; no coroutine may be running."""
        asyncio.run_coroutine_threadsafe(self.pool.__aexit__(None, None, None), self._loop).result()
        # A thread that calls `run` right now gets its answer.
        self._loop.call_soon_threadsafe(self._loop.call_later, LINGER_SECONDS, self._loop.stop)
