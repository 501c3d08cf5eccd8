"""The sampler that asks vLLM servers: a group of completions in one request, so that its prompt is computed once.

Where there is a reasoning budget, that request is for the tokens up to it; each completion that has not ended there
goes on by a request of its own, behind the closing where its reasoning was open. A group that is lost with a server is
asked for again under the same seeds, so that nothing is lost and nothing comes twice; an answer from other weights than
those asked for is thrown away.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import STOP, FinishReason
from rekatrain.data.errors import InputError
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.sampler.vllm.client import Json, ServerClient, ServerDown, ServerRefused
from rekatrain.trainer.rloo.sampler.vllm.pool import ServerPool
from rekatrain.trainer.rloo.sampler.vllm.responses import AnswerReader, request_filters

FORBIDDEN = -100.0  # the lowest bias that vLLM takes


class ServedWeights(Protocol):
    """The version of the weights that rollouts must come from; weights.py has the implementations."""

    @property
    def model(self) -> str | None:
        """Name under which a server answers with them; None: its own."""

    async def load(self, client: ServerClient) -> None:
        """Have the server hold them; nothing where it does."""

    async def check(self, client: ServerClient, answer: Json) -> None:
        """Raise ServerDown unless the answer came from them."""


class VLLMSampler:
    """Samples groups of completions from vLLM servers; `weights` are set before each step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: RLOOConfig, *, vocab_size: int) -> None:
        """`vocab_size`: rows of the model's embeddings; those beyond the tokenizer are never drawn."""
        self.weights: ServedWeights | None = None
        self.num_retries = 0
        self._config = config
        self._answers = AnswerReader(tokenizer, config)
        self._settings: Json = {
            "temperature": config.temperature,
            **request_filters(config, tokenizer),
            "return_token_ids": True,
            "stop": [STOP],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # or `<s`, a special token and `ep>` would read as the stop
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
        """Sample a group of `num_generations` completions for each prompt; `keys` seed them, one key a prompt.

        `on_completion` is called with each completion of a group, and with its place in the order of the result, as
        soon as the group has been answered. Raises InputError for what the servers refuse, and where none is left.
        """
        try:
            return asyncio.run(self._sample(prompts, keys, num_generations, on_completion))
        except ServerRefused as error:
            raise InputError(str(error)) from None

    async def _sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None,
    ) -> list[list[Completion]]:
        weights, config = self.weights, self._config
        assert weights is not None, "weights are published before a step is sampled"
        clients = [ServerClient(url, request_timeout=config.vllm_request_timeout) for url in config.vllm_server_urls]
        pool = ServerPool(
            clients,
            weights.load,
            max_in_flight=max(1, config.per_device_generation_batch_size // num_generations),
            server_timeout=config.vllm_server_timeout,
        )

        async def sample_group(number: int) -> list[Completion]:
            async def on_server(client: ServerClient) -> list[Completion]:
                ask = partial(self._ask, client, weights)
                return await self._sample_group(ask, prompts[number], keys[number], num_generations)

            group = await pool.run(on_server)
            if on_completion is not None:
                for place, completion in enumerate(group):
                    on_completion(number * num_generations + place, completion)
            return group

        async with pool:
            try:
                return list(await asyncio.gather(*(sample_group(number) for number in range(len(prompts)))))
            finally:
                self.num_retries += pool.num_retries

    async def _sample_group(
        self,
        ask: Callable[..., Awaitable[list[Completion]]],
        prompt: list[int],
        key: tuple[int, ...],
        num_generations: int,
    ) -> list[Completion]:
        budget = self._config.reasoning_budget
        first = budget or self._config.max_completion_length
        group = await ask(prompt=prompt, n=num_generations, max_tokens=first, seed=seed_of(key))
        if budget is None:
            return group

        async def go_on(place: int, begun: Completion) -> Completion:
            if begun.finish_reason is FinishReason.LENGTH:
                begun = self._answers.close_reasoning(begun)
            number = 0
            while begun.finish_reason is FinishReason.LENGTH and (
                room := self._config.max_completion_length - len(begun.ids)
            ):
                seed = seed_of((*key, place, number := number + 1))
                [rest] = await ask(prompt=prompt + begun.ids, n=1, max_tokens=room, seed=seed, goes_on=True)
                begun = self._answers.join(begun, rest)
            return begun

        tasks = [asyncio.create_task(go_on(place, begun)) for place, begun in enumerate(group)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # where one has failed the group is begun again, and nobody waits for the others
                task.cancel()

    async def _ask(
        self,
        client: ServerClient,
        weights: ServedWeights,
        *,
        prompt: list[int],
        n: int,
        max_tokens: int,
        seed: int,
        goes_on: bool = False,
    ) -> list[Completion]:
        body = {
            **self._settings,
            **({"model": weights.model} if weights.model else {}),
            **{"prompt": prompt, "n": n, "max_tokens": max_tokens, "seed": seed},
        }
        try:
            answer = await client.post("/v1/completions", body)
        except ServerRefused as error:
            if error.status != 404:  # a restarted server knows no adapter
                raise
            raise ServerDown(f"{error}: its weights are gone") from None
        await weights.check(client, answer)
        return self._answers.read(answer, client.url, num_completions=n, max_tokens=max_tokens, goes_on=goes_on)


def seed_of(key: tuple[int, ...]) -> int:
    """A request's seed from the key of a prompt or of a completion; vLLM numbers the completions of one on from it."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
