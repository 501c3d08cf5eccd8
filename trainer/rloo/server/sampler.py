"""The sampler that asks vLLM servers: a group of completions in one request, so that its prompt is computed once.

Ids are the truth: what a completion is, and how it ended, is found from the ids that the server drew, by the same
search for `<sep>` as in the in-process sampler. A group that is lost with a server is asked for again under the same
seed, so that nothing is lost and nothing comes twice; an answer from other weights than those asked for is thrown away.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.chat import STOP, Ending
from data.errors import InputError
from data.stop import StopSearch
from trainer.rloo.config import RLOOConfig
from trainer.rloo.sampler import Completion
from trainer.rloo.server.client import Json, ServerClient, ServerDown, ServerRefused
from trainer.rloo.server.pool import ServerPool

FORBIDDEN = -100.0  # the lowest bias that vLLM takes


class ServedWeights(Protocol):
    """The version of the weights that rollouts must come from; `trainer.rloo.server.weights` has those there are."""

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
        self._stop = StopSearch(tokenizer)
        self._eos_id = tokenizer.eos_token_id
        self._settings: Json = {
            "max_tokens": config.max_completion_length,
            "temperature": config.temperature,
            "logprobs": 0,
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
            async def ask(client: ServerClient) -> list[Completion]:
                body = {
                    **self._settings,
                    **({"model": weights.model} if weights.model else {}),
                    "prompt": prompts[number],
                    "n": num_generations,
                    "seed": seed_of(keys[number]),
                }
                try:
                    answer = await client.post("/v1/completions", body)
                except ServerRefused as error:
                    if error.status != 404:  # a restarted server knows no adapter
                        raise
                    raise ServerDown(f"{error}: its weights are gone") from None
                await weights.check(client, answer)
                return self.read(answer, num_generations, client.url)

            group = await pool.run(ask)
            if on_completion is not None:
                for place, completion in enumerate(group):
                    on_completion(number * num_generations + place, completion)
            return group

        async with pool:
            try:
                return list(await asyncio.gather(*(sample_group(number) for number in range(len(prompts)))))
            finally:
                self.num_retries += pool.num_retries

    def read(self, answer: Json, num_generations: int, url: str) -> list[Completion]:
        """The completions of one answer, in the order of their numbers."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != num_generations:
            raise InputError(f"the vLLM server {url} gave no {num_generations} choices but {str(choices)[:100]}")
        ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [self._read_choice(choice, url) for choice in ordered]

    def _read_choice(self, choice: Any, url: str) -> Completion:  # Any: a JSON value
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not isinstance(logprobs, list) or not len(ids) == len(logprobs) > 0:
            raise InputError(
                f"the vLLM server {url} gives no token_ids with as many token_logprobs: vLLM 0.30 does, "
                "rekatrain serve-rollouts starts it"
            )
        # The server looks for the stop in text that it decodes as it goes; here it is looked for in the ids.
        cut = self._stop.cut(ids)
        if self._stop.completes_at(cut, len(cut)):
            ending = Ending.STOP
        elif ids[-1] == self._eos_id:
            ending = Ending.EOS
        elif len(ids) == self._config.max_completion_length:
            ending = Ending.LENGTH
        else:
            raise InputError(
                f"the vLLM server {url} ended a completion of {len(ids)} tokens at id {ids[-1]}, which is neither "
                f"{STOP} nor the eos token {self._eos_id} of the recipe's tokenizer: start it with "
                "--generation-config vllm, as rekatrain serve-rollouts does"
            )
        return Completion(ids=cut, logprobs=[float(logprob) for logprob in logprobs[: len(cut)]], ending=ending)


def seed_of(key: tuple[int, ...]) -> int:
    """A request's seed from a prompt's key; vLLM numbers the completions of a request on from it."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
