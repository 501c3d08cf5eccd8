"""The reward `judge`: a chat model's verdict on the answer, from any OpenAI-compatible endpoint.

rewards:
  judge:
    base_url: http://127.0.0.1:8000/v1
    model: judge
    rubric: Prefer answers that are polite, correct and short.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rekatrain.data.chat import parse_completion, parse_prompt
from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.endpoint import Endpoint, Json
from rekatrain.rewards.models.judge_cache import JudgeCache
from rekatrain.rewards.models.judge_prompt import (
    pairwise_messages,
    pairwise_schema,
    read_score,
    read_winner,
    rubric_messages,
    rubric_schema,
)

MILLION = 1e6


class Judge:
    """A score from 0 to 1: the judge's mark on a rubric, or how often it prefers the answer to a reference.

    An empty answer, and one that is still reasoning, scores 0 and is not asked about. A reply that is not exactly the
    JSON object asked for, and a request that fails beyond its retries, is an error of that completion.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        rubric: str,
        reference: str | None = None,
        scale: list[float] | None = None,
        api_key_env: str | None = None,
        concurrency: int = 16,
        request_timeout: float = 60.0,
        max_retries: int = 4,
        max_tokens: int = 256,
        json_schema: bool = True,
        extra_body: dict[str, Any] | None = None,
        cache: str | None = None,
        prompt_price: float | None = None,
        completion_price: float | None = None,
    ) -> None:
        """Check the options; nothing is sent.

        base_url, model:       of the endpoint; requests go to base_url/chat/completions at temperature 0
        rubric:                what a good answer is
        reference:             a column with an answer to compare with, in both orders: 1 wins, 0.5 ties, 0 loses
        scale:                 lowest and highest mark without a reference; [1, 10]
        api_key_env:           name of the environment variable that holds the key
        concurrency, request_timeout, max_retries: see `rekatrain.rewards.models.endpoint.Endpoint`
        max_tokens:            of a reply
        json_schema:           have the server hold the model to the reply's JSON schema, where it can
        extra_body:            further keys of the request; a null takes one of ours out
        cache:                 an SQLite file for the replies; None keeps them in memory
        prompt_price, completion_price: money for a million tokens, for the metric `cost`
        """
        if not isinstance(rubric, str) or not rubric.strip():
            raise InputError("judge: rubric is empty: say what a good answer is")
        self._low, self._high = scale or [1, 10]
        if not -math.inf < self._low < self._high < math.inf:
            raise InputError(f"judge: scale must be the lowest and the highest mark, as in [1, 10], not {scale}")
        if (prompt_price is None) != (completion_price is None):
            raise InputError("judge: prompt_price and completion_price go together: give both or neither")
        self._endpoint = Endpoint(
            base_url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            request_timeout=request_timeout,
            max_retries=max_retries,
        )
        self.columns = (reference,) if reference else ()
        self._rubric, self._reference, self._cache_path = rubric, reference, cache
        schema = pairwise_schema() if reference else rubric_schema(self._low, self._high)
        reply_format = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
        settings = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        settings |= {"response_format": reply_format if json_schema else None} | (extra_body or {})
        self._settings = {key: value for key, value in settings.items() if value is not None}
        self._prices = (prompt_price, completion_price)
        self._num_cached = 0
        self._tokens = {"prompt_tokens": 0, "completion_tokens": 0}

    def setup(self) -> None:
        """Open the cache."""
        self._cache = JudgeCache(self._cache_path)

    async def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | RewardError]:
        """A verdict for each completion; equal requests are sent once."""
        questions = [parse_prompt(prompt) for prompt in prompts]
        answers = [parse_completion(completion).answer for completion in completions]
        references = columns[self._reference] if self._reference else [None] * len(answers)
        asked = [
            self._bodies(_transcript(question), answer, reference) if answer else []
            for question, answer, reference in zip(questions, answers, references, strict=True)
        ]
        replies = await self._replies([body for bodies in asked for body in bodies])
        given = iter(replies)
        return [self._verdict([next(given) for _ in bodies]) if bodies else 0.0 for bodies in asked]

    def metrics(self) -> dict[str, float]:
        """Since the last call: requests and retries sent, replies from the cache, tokens, and their cost if priced."""
        counted: dict[str, float] = {
            "num_requests": self._endpoint.num_requests,
            "num_retries": self._endpoint.num_retries,
            "num_cached": self._num_cached,
            **self._tokens,
        }
        prompt_price, completion_price = self._prices
        if prompt_price is not None and completion_price is not None:
            spent = self._tokens["prompt_tokens"] * prompt_price + self._tokens["completion_tokens"] * completion_price
            counted["cost"] = spent / MILLION
        self._endpoint.num_requests = self._endpoint.num_retries = self._num_cached = 0
        self._tokens = dict.fromkeys(self._tokens, 0)
        return counted

    def _bodies(self, question: str, answer: str, reference: object) -> list[Json]:
        """What the judge is asked about one answer: once on a rubric, in both orders beside a reference."""
        if self._reference is None:
            asked = [
                rubric_messages(rubric=self._rubric, question=question, answer=answer, low=self._low, high=self._high)
            ]
        else:
            if not isinstance(reference, str):
                raise InputError(f"judge: the column {self._reference} must be text, not {type(reference).__name__}")
            pairs = [(answer, reference), (reference, answer)]
            asked = [
                pairwise_messages(rubric=self._rubric, question=question, first=first, second=second)
                for first, second in pairs
            ]
        return [{**self._settings, "messages": messages} for messages in asked]

    def _verdict(self, replies: Sequence[str | RewardError]) -> float | RewardError:
        for reply in replies:
            if isinstance(reply, RewardError):
                return reply
        texts = [str(reply) for reply in replies]
        if self._reference is None:
            return read_score(texts[0], low=self._low, high=self._high)
        as_first, as_second = map(read_winner, texts)
        # Judges favour a place; asking in both orders cancels it (arXiv 2306.05685).
        return ({"A": 1.0, "tie": 0.5, "B": 0.0}[as_first] + {"B": 1.0, "tie": 0.5, "A": 0.0}[as_second]) / 2

    async def _replies(self, bodies: Sequence[Json]) -> list[str | RewardError]:
        """The judge's reply to each request, read once to see that it is one: only what can be read is kept."""
        known = {_name(body): self._cache.get(self._endpoint.url, body) for body in bodies}
        fresh = {_name(body): body for body in bodies if known[_name(body)] is None}
        self._num_cached += len(bodies) - len(fresh)
        answers = await self._endpoint.post_all("/chat/completions", list(fresh.values()))
        replies: dict[str, str | RewardError] = {name: reply for name, reply in known.items() if reply is not None}
        for (name, body), answer in zip(fresh.items(), answers, strict=True):
            reply = answer if isinstance(answer, RewardError) else self._read_reply(answer)
            if isinstance(reply, str):
                self._cache.put(self._endpoint.url, body, reply)
            replies[name] = reply
        return [replies[_name(body)] for body in bodies]

    def _read_reply(self, answer: Json) -> str | RewardError:
        """The text of the only choice, once it is known to hold a verdict; its tokens are counted in any case."""
        usage = answer.get("usage")
        for key in self._tokens:
            count = usage.get(key) if isinstance(usage, Mapping) else None
            self._tokens[key] += count if isinstance(count, int) else 0
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return RewardError("the judge's answer has no choices[0].message.content")
        if not isinstance(text, str):
            return RewardError(f"the judge's message holds no text but {type(text).__name__}")
        try:
            if self._reference is None:
                read_score(text, low=self._low, high=self._high)
            else:
                read_winner(text)
        except RewardError as error:
            return error
        return text


def _transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    """The conversation that the answer continues; its only message as it is."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _name(body: Json) -> str:
    return json.dumps(body, sort_keys=True)
