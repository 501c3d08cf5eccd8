"""A group of completions from one vLLM server: one request, so that its prompt is computed once.

With a reasoning budget, that request ends at the budget. Each completion that has not ended by then continues in a
separate request, after the closing of its reasoning if that is open. A response from other weights than the requested
ones is dropped. Where weights are updated in flight, the response is streamed, and each token gets the version that
drew it.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import STOP, FinishReason
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.sampler.vllm.client import RequestRejected, ServerClient, ServerDown
from rekatrain.trainer.rloo.sampler.vllm.responses import ResponseReader, StreamedResponse, request_filters

FORBIDDEN = -100.0  # the lowest logit bias that vLLM accepts
UPDATE_POLL_SECONDS = 0.05


class ServedWeights(Protocol):
    """The version of the weights that rollouts must come from; weights.py has the implementations."""

    @property
    def name(self) -> str:
        """Version of the weights, unique."""

    @property
    def model(self) -> str | None:
        """Model name in requests to a server; None: the server's default model."""

    async def load(self, client: ServerClient) -> None:
        """Load the weights into the server unless it has them."""

    async def check(self, client: ServerClient, response: Json) -> None:
        """Raise ServerDown unless the response came from these weights."""


@dataclass(kw_only=True)
class Served:
    """The weights that the servers have, which the thread of the requests reads and the main thread sets.

    version:     number of updates of the weights
    is_updating: True while servers get other weights with requests in flight
    """

    weights: ServedWeights | None = None
    version: int = 0
    is_updating: bool = False

    def known(self) -> ServedWeights:
        """Return the weights, which are published before a step is sampled."""
        assert self.weights is not None
        return self.weights


class GroupRequests:
    """Requests groups of completions, with the settings of a recipe."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: RLOOConfig, served: Served, *, vocab_size: int
    ) -> None:
        """Prepare the settings of requests; `vocab_size` is that of `VLLMSampler`."""
        self._served = served
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

    async def sample(
        self, client: ServerClient, prompt: list[int], key: tuple[int, ...], num_generations: int
    ) -> list[Completion]:
        """Sample a group of completions of a prompt on one server; raise ServerDown if it must be requested again."""
        budget, request = self._config.reasoning_budget, partial(self._request, client, self._served.known())
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
        version, is_live = self._served.version, self._config.max_staleness > 1
        try:
            if is_live:
                # Tokens arrive as they are drawn, so that each is known to come from before or after an update.
                streamed = StreamedResponse(n, lambda: self._served.version)
                await client.stream("/v1/completions", {**body, "cache_salt": weights.name}, streamed.add)
                response = streamed.response()
            else:
                response = await client.post("/v1/completions", body)
        except RequestRejected as error:
            if error.status != 404:
                raise
            raise ServerDown(f"{error}: it has lost the weights") from None  # a restarted server has no adapter
        await self._check(client, response, weights)
        return self._responses.read(
            response,
            client.url,
            num_completions=n,
            max_tokens=max_tokens,
            version=version,
            is_continuation=is_continuation,
        )

    async def _check(self, client: ServerClient, response: Json, weights: ServedWeights) -> None:
        """Raise ServerDown unless the response came from the weights, or from those that they were updated to."""
        while True:
            try:
                return await weights.check(client, response)
            except ServerDown:
                if weights is self._served.weights and not self._served.is_updating:
                    raise
            await asyncio.sleep(UPDATE_POLL_SECONDS)  # an update is going on
            weights = self._served.known()


def seed_of(key: tuple[int, ...]) -> int:
    """Return a request's seed from the key of a prompt or completion; vLLM adds the index of each completion to it."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
