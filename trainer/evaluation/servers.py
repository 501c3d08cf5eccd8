"""Answers of an OpenAI-compatible endpoint: a deployed model, or another one that is measured by the same rows."""

import asyncio
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import FinishReason, encode_text
from rekatrain.data.stop import decode_completion, reasoning_closing
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.held_out_prompts import EvaluateConfig
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.synthesis.config import ServerConfig, SynthesisConfig
from rekatrain.trainer.synthesis.journal import Answer
from rekatrain.trainer.synthesis.replies import PATHS, make_body, read_reply
from rekatrain.trainer.synthesis.requests import make_questions, seed_of
from rekatrain.trainer.synthesis.servers import make_endpoint


class ServerSampler:
    """Asks the servers of `evaluate.base_url`; each request has its own seed, for servers that use one."""

    def __init__(self, config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
        """Check addresses and key; nothing is sent."""
        assert config.base_url is not None and config.model is not None
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._server = ServerConfig(
            base_url=config.base_urls[0],
            model=config.model,
            format=config.format,
            reasoning_tags=config.reasoning_tags,
            extra_body=config.extra_body,
            api_key_env=config.api_key_env,
            concurrency=config.concurrency,
            request_timeout=config.request_timeout,
            max_retries=config.max_retries,
        )
        self._endpoint = make_endpoint(self._server, config.base_urls)

    def sample(self, prompts: Sequence[Prompt], budget: int | None) -> list[list[Answer | RewardError]]:
        """Return the answers to each prompt, or the error of a request that failed beyond its retries.

        budget: tokens after which an open reasoning is closed; None: it is never closed
        """
        return asyncio.run(self._sample_all(prompts, budget))

    async def _sample_all(self, prompts: Sequence[Prompt], budget: int | None) -> list[list[Answer | RewardError]]:
        async with self._endpoint.connect() as post:

            async def ask(prompt: Prompt, index: int) -> Answer | RewardError:
                (question,) = make_questions([prompt])
                limit = self._config.max_completion_length
                settings = SynthesisConfig(out="-", temperature=self._config.temperature, num_generations=1)
                body: Json = make_body(question, self._server, settings, seed_of(self._seed, question, index))
                body["max_tokens"] = limit if budget is None else min(budget, limit)
                first = _read(await post(PATHS[self._server.format], body), self._server)
                if isinstance(first, RewardError) or budget is None or budget >= limit:
                    return first
                if first.finish_reason is not FinishReason.LENGTH:
                    return first
                # The budget is used up: close the reasoning if it is open, and let the model go on.
                ids = encode_text(first.text, self._tokenizer)
                ids += reasoning_closing(ids, self._tokenizer)
                body |= {"prompt": [*prompt.ids, *ids], "max_tokens": max(1, limit - len(ids))}
                rest = _read(await post(PATHS[self._server.format], body), self._server)
                if isinstance(rest, RewardError):
                    return rest
                begun = decode_completion(ids, self._tokenizer)
                return Answer(
                    text=begun + rest.text,
                    finish_reason=rest.finish_reason,
                    prompt_tokens=first.prompt_tokens,
                    completion_tokens=len(ids) + rest.completion_tokens,
                )

            tasks = [[ask(prompt, index) for index in range(self._config.num_generations)] for prompt in prompts]
            return [list(await asyncio.gather(*group)) for group in await _start(tasks)]


async def _start(groups: Sequence[Sequence]) -> list[list[asyncio.Task]]:
    """Start all requests at once: the endpoint bounds how many are in flight."""
    return [[asyncio.ensure_future(request) for request in group] for group in groups]


def _read(reply: Json | RewardError, server: ServerConfig) -> Answer | RewardError:
    if isinstance(reply, RewardError):
        return reply
    try:
        return read_reply(reply, server)
    except RewardError as error:
        return error
