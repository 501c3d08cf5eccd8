"""The sampler of vLLM servers: groups of completions from a pool of servers (group_requests.py: one group from one).

A group that is lost with a server is requested again with the same seeds, so no group is lost or sampled twice.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

from transformers import PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.sampler.vllm.client import RequestRejected, ServerClient
from rekatrain.trainer.rloo.sampler.vllm.group_requests import GroupRequests, Served
from rekatrain.trainer.rloo.sampler.vllm.request_loop import RequestLoop
from rekatrain.trainer.rloo.sampler.vllm.server_pool import Paces, ServerPool

POLL_SECONDS = 0.1


class VLLMSampler:
    """Samples groups of completions from vLLM servers; `served.weights` are set before each step.

    finished: with `max_staleness`, the groups that are sampled and not trained on, by their keys
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: RLOOConfig, *, vocab_size: int, rank: int = 0
    ) -> None:
        """Prepare the settings of requests.

        vocab_size: number of the model's embeddings; ids beyond the tokenizer are never drawn
        rank:       of this process, which decides the server of its first group
        """
        self._rank, self._paces = rank, Paces()
        self.served = Served()
        self.finished: dict[tuple[int, ...], list[Completion]] = {}
        self._num_retries, self._is_cancelled, self._lock = 0, False, threading.Lock()
        self._running: set[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = set()
        self._loop: RequestLoop | None = None
        self._config = config
        self._requests = GroupRequests(tokenizer, config, self.served, vocab_size=vocab_size)

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample a group of `num_generations` completions for each prompt, in the order of the prompts.

        keys:          seeds of the draws, one key per prompt; of groups that wait, the one with the least key begins
        on_completion: called for each completion as soon as its group is complete, with its index in the flattened
                       result

        Several threads may call this at the same time if the weights are updated in flight. Raise InputError if a
        server rejects a request, and if no server is left.
        """
        if self._is_cancelled:
            raise asyncio.CancelledError
        job = partial(self._sample, prompts, keys, num_generations, on_completion)
        try:
            if self._config.max_staleness > 1:
                with self._lock:
                    self._loop = self._loop or RequestLoop(self._make_pool(num_generations, len(prompts)))
                return self._loop.run(job)
            return asyncio.run(self._sample_alone(job, self._make_pool(num_generations, len(prompts))))
        except RequestRejected as error:
            raise InputError(str(error)) from None

    def forget(self, step: int) -> None:
        """Forget the groups of a step, which is trained now, and of those before it."""
        for key in list(self.finished):
            if key[2] <= step:
                self.finished.pop(key, None)

    def take_retries(self) -> int:
        """Return the number of groups that were requested again since the last call."""
        num_retries, self._num_retries = self._num_retries, 0
        if self._loop is not None:
            num_retries, self._loop.pool.num_retries = num_retries + self._loop.pool.num_retries, 0
        return num_retries

    def cancel(self) -> None:
        """End all sampling, also that of other threads, with CancelledError."""
        self._is_cancelled = True
        for loop, task in list(self._running):
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """End all sampling and disconnect from the servers."""
        self.cancel()
        if self._loop is not None:
            while self._running:
                time.sleep(POLL_SECONDS)
                self.cancel()  # also what has begun meanwhile
            self._loop.close()

    def _make_pool(self, num_generations: int, num_prompts: int) -> ServerPool:
        config = self._config
        # A request is for a whole group, so at most `per_device_generation_batch_size` completions are in flight.
        max_concurrent_requests = max(1, config.per_device_generation_batch_size // num_generations)
        clients = [ServerClient(url, request_timeout=config.vllm_request_timeout) for url in config.vllm_server_urls]
        self._paces.begin_batch()
        return ServerPool(
            clients,
            self._load,
            max_in_flight=max_concurrent_requests,
            server_timeout=config.vllm_server_timeout,
            # As if the groups of all processes, in their order, went to the servers in turn. Where each process fills
            # all servers evenly, its first wave of requests counts.
            first_server=self._rank * (num_prompts if num_prompts % len(clients) else max_concurrent_requests),
            paces=self._paces,
        )

    async def _sample_alone(
        self, job: Callable[[ServerPool], Awaitable[list[list[Completion]]]], pool: ServerPool
    ) -> list[list[Completion]]:
        async with pool:
            try:
                return await job(pool)
            finally:
                self._num_retries += pool.num_retries

    async def _load(self, client: ServerClient) -> None:
        """Load the weights into a server; again if they have been updated meanwhile."""
        weights = None
        while weights is not self.served.weights:
            weights = self.served.known()
            await weights.load(client)

    async def _sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None,
        pool: ServerPool,
    ) -> list[list[Completion]]:
        if self._is_cancelled:
            raise asyncio.CancelledError
        current = asyncio.current_task()
        assert current is not None
        running = asyncio.get_running_loop(), current
        self._running.add(running)

        async def sample_group(number: int) -> list[Completion]:
            async def on_server(client: ServerClient) -> list[Completion]:
                return await self._requests.sample(client, prompts[number], keys[number], num_generations)

            group = self.finished.get(keys[number])
            if group is None:
                group = await pool.run(on_server, longest, keys[number])
            if self._config.max_staleness:
                self.finished[keys[number]] = group
            if on_completion is not None:
                for index, completion in enumerate(group):
                    on_completion(number * num_generations + index, completion)
            return group

        tasks = [asyncio.create_task(sample_group(number)) for number in range(len(prompts))]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # if one fails, the others would go on in a loop that lasts
                task.cancel()
            self._running.discard(running)


def longest(group: Sequence[Completion]) -> int:
    """Return the number of tokens of the longest completion."""
    return max(len(completion.ids) for completion in group)
