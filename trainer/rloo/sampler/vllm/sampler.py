"""The sampler of vLLM servers: one request per group of completions, so that its prompt is computed once.

With a reasoning budget, that request ends at the budget. Each completion that has not ended by then continues in a
separate request, after the closing of its reasoning if that is open. A group that is lost with a server is requested
again with the same seeds, so no group is lost or sampled twice. A response from other weights than the requested ones
is dropped.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import STOP, FinishReason
from rekatrain.data.errors import InputError
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.sampler.vllm.client import RequestRejected, ServerClient, ServerDown
from rekatrain.trainer.rloo.sampler.vllm.responses import ResponseReader, request_filters
from rekatrain.trainer.rloo.sampler.vllm.server_pool import Paces, ServerPool

FORBIDDEN = -100.0  # the lowest logit bias that vLLM accepts


class ServedWeights(Protocol):
    """The version of the weights that rollouts must come from; weights.py has the implementations."""

    @property
    def model(self) -> str | None:
        """Model name in requests to a server; None: the server's default model."""

    async def load(self, client: ServerClient) -> None:
        """Load the weights into the server unless it has them."""

    async def check(self, client: ServerClient, response: Json) -> None:
        """Raise ServerDown unless the response came from these weights."""


class VLLMSampler:
    """Samples groups of completions from vLLM servers; `weights` are set before each step."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: RLOOConfig, *, vocab_size: int, rank: int = 0
    ) -> None:
        """Prepare the settings of requests.

        vocab_size: number of the model's embeddings; ids beyond the tokenizer are never drawn
        rank:       of this process, which decides the server of its first group
        """
        self._rank, self._paces = rank, Paces()
        self.weights: ServedWeights | None = None
        self.num_retries = 0
        self._is_cancelled = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task] | None = None
        self._config = config
        self._responses = ResponseReader(tokenizer, config)
        self._settings: Json = {
            "temperature": config.temperature,
            **request_filters(config, tokenizer),
            "return_token_ids": True,
            "stop": [STOP],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # otherwise `<s`, a special token and `ep>` would read as the stop
        }
        if vocab_size > len(tokenizer):
            self._settings["logit_bias"] = {str(token): FORBIDDEN for token in range(len(tokenizer), vocab_size)}

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample a group of `num_generations` completions for each prompt, in the order of the prompts.

        keys:          seeds of the draws, one key per prompt
        on_completion: called for each completion as soon as its group is complete, with its index in the flattened
                       result

        Raise InputError if a server rejects a request, and if no server is left.
        """
        if self._is_cancelled:
            raise asyncio.CancelledError
        try:
            return asyncio.run(self._sample(prompts, keys, num_generations, on_completion))
        except RequestRejected as error:
            raise InputError(str(error)) from None

    def cancel(self) -> None:
        """End all sampling, also that of another thread, with CancelledError."""
        self._is_cancelled = True
        if self._running is not None:
            loop, task = self._running
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(task.cancel)

    async def _sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None,
    ) -> list[list[Completion]]:
        task = asyncio.current_task()
        assert task is not None
        self._running = asyncio.get_running_loop(), task
        weights, config = self.weights, self._config
        assert weights is not None, "weights are published before a step is sampled"
        # A request is for a whole group, so at most `per_device_generation_batch_size` completions are in flight.
        max_concurrent_requests = max(1, config.per_device_generation_batch_size // num_generations)
        clients = [ServerClient(url, request_timeout=config.vllm_request_timeout) for url in config.vllm_server_urls]
        pool = ServerPool(
            clients,
            weights.load,
            max_in_flight=max_concurrent_requests,
            server_timeout=config.vllm_server_timeout,
            # As if the groups of all processes, in their order, went to the servers in turn. Where each process fills
            # all servers evenly, its first wave of requests counts.
            first_server=self._rank * (len(prompts) if len(prompts) % len(clients) else max_concurrent_requests),
            paces=self._paces,
        )
        self._paces.begin_batch()

        async def sample_group(number: int) -> list[Completion]:
            async def on_server(client: ServerClient) -> list[Completion]:
                request = partial(self._request, client, weights)
                return await self._sample_group(request, prompts[number], keys[number], num_generations)

            group = await pool.run(on_server, longest)
            if on_completion is not None:
                for index, completion in enumerate(group):
                    on_completion(number * num_generations + index, completion)
            return group

        async with pool:
            try:
                return list(await asyncio.gather(*(sample_group(number) for number in range(len(prompts)))))
            finally:
                self.num_retries += pool.num_retries

    async def _sample_group(
        self,
        request: Callable[..., Awaitable[list[Completion]]],
        prompt: list[int],
        key: tuple[int, ...],
        num_generations: int,
    ) -> list[Completion]:
        budget = self._config.reasoning_budget
        max_tokens = budget or self._config.max_completion_length
        group = await request(prompt=prompt, n=num_generations, max_tokens=max_tokens, seed=seed_of(key))
        if budget is None:
            return group

        async def finish(index: int, completion: Completion) -> Completion:
            """Request the rest of a completion cut at the budget; after a false stop of vLLM, request again."""
            if completion.finish_reason is FinishReason.LENGTH:
                completion = self._responses.close_reasoning(completion)
            number = 0
            while completion.finish_reason is FinishReason.LENGTH and (
                room := self._config.max_completion_length - len(completion.ids)
            ):
                seed = seed_of((*key, index, number := number + 1))
                ids = prompt + completion.ids
                [rest] = await request(prompt=ids, n=1, max_tokens=room, seed=seed, is_continuation=True)
                completion = self._responses.join(completion, rest)
            return completion

        tasks = [asyncio.create_task(finish(index, completion)) for index, completion in enumerate(group)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # if one fails, the whole group is requested again and nobody waits for the others
                task.cancel()

    async def _request(
        self,
        client: ServerClient,
        weights: ServedWeights,
        *,
        prompt: list[int],
        n: int,
        max_tokens: int,
        seed: int,
        is_continuation: bool = False,
    ) -> list[Completion]:
        body = {
            **self._settings,
            **({"model": weights.model} if weights.model else {}),
            **{"prompt": prompt, "n": n, "max_tokens": max_tokens, "seed": seed},
        }
        try:
            response = await client.post("/v1/completions", body)
        except RequestRejected as error:
            if error.status != 404:
                raise
            raise ServerDown(f"{error}: it has lost the weights") from None  # a restarted server has no adapter
        await weights.check(client, response)
        return self._responses.read(
            response, client.url, num_completions=n, max_tokens=max_tokens, is_continuation=is_continuation
        )


def longest(group: Sequence[Completion]) -> int:
    """Return the number of tokens of the longest completion."""
    return max(len(completion.ids) for completion in group)


def seed_of(key: tuple[int, ...]) -> int:
    """Return a request's seed from the key of a prompt or completion; vLLM adds the index of each completion to it."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
