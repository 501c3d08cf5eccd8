"""The reward `judge`: a chat model's verdict on the answer, from any OpenAI-compatible endpoint.

rewards:
  judge:
    base_url: http://127.0.0.1:8000/v1
    model: judge
    rubric: Prefer answers that are polite, correct and short.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Le, Len, MinLen
from pydantic import FiniteFloat, JsonValue

from rekatrain.data.chat import parse_completion, parse_prompt
from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.endpoint import Count, Endpoint, Json, Minutes, Retries, Seconds
from rekatrain.rewards.models.judge_cache import JudgeCache
from rekatrain.rewards.models.judge_forms import Form, PairwiseForm, RubricForm, TemplateForm

MILLION = 1e6
SHORT_REPLY, LONG_REPLY = 256, 2048  # tokens
MAX_TOKENS = 10**9  # of one reply; a server's larger number is none
Text = Annotated[str, MinLen(1)]
Price = Annotated[FiniteFloat, Ge(0)]


class Judge:
    """A score from 0 to 1: the judge's score on a rubric, or how often it prefers the answer to a reference.

    An empty answer, and one that is still reasoning, scores 0 and is not sent. A reply that is not exactly the
    requested JSON object, and a request that fails beyond its retries, is an error of that completion.
    """

    def __init__(
        self,
        *,
        base_url: str | list[str],
        model: Text,
        rubric: Text | None = None,
        template: Text | None = None,
        verdict: Text | None = None,
        verdict_scores: dict[str, Annotated[FiniteFloat, Ge(0), Le(1)]] | None = None,
        thoughts: bool = False,
        reference: Text | None = None,
        scale: Annotated[list[FiniteFloat], Len(2, 2)] | None = None,
        api_key_env: Text | None = None,
        concurrency: Count = 16,
        request_timeout: Seconds = 60.0,
        max_retries: Retries = 4,
        outage_timeout: Minutes = 10.0,
        max_tokens: Count | None = None,
        json_schema: bool = True,
        extra_body: dict[str, JsonValue] | None = None,
        cache: Text | None = None,
        prompt_price: Price | None = None,
        completion_price: Price | None = None,
    ) -> None:
        """Check the options; nothing is sent.

        base_url, model:       of the endpoint, or of several; requests go to base_url/chat/completions at temperature 0
        rubric:                describes a good answer
        template, verdict:     in place of a rubric: the user's own prompt, with fields such as {question} and {answer},
                               and a pattern whose group holds the verdict in the reply (`judge_forms.TemplateForm`)
        verdict_scores:        scores of verdicts that are words, such as {Yes: 1, No: 0}; else a number on `scale`
        thoughts:              have the judge think in free text before its verdict. Tagged thoughts of a reasoning
                               model (<think>) are left out in any case
        reference:             a column with an answer to compare with, in both orders: 1 wins, 0.5 ties, 0 loses
        scale:                 lowest and highest score on the rubric; default [1, 10]
        api_key_env:           name of the environment variable that holds the key
        concurrency, request_timeout, max_retries, outage_timeout:
                    see `rekatrain.rewards.models.endpoint.Endpoint`
        max_tokens:            longest reply; default 256, or 2048 with thoughts or a template
        json_schema:           request replies that follow a JSON schema; false for a server that cannot enforce one
        extra_body:            further keys of the request; null removes one of ours
        cache:                 an SQLite file for the replies; None keeps them in memory
        prompt_price, completion_price: price of a million tokens, for the metric `cost`
        """
        if rubric is not None and not rubric.strip():
            raise InputError("rubric is empty; describe a good answer")
        low, high = scale or [1, 10]
        if low >= high:
            raise InputError(f"scale is {scale}; it should be the lowest and the highest score, as in [1, 10]")
        self._form: Form
        if template is not None:
            if rubric is not None or thoughts or verdict is None:
                raise InputError(
                    "template goes with verdict, and not with rubric and thoughts, which are for our own prompt: it "
                    "says itself what a good answer is, and how to reply"
                )
            own = TemplateForm(template, verdict, scores=verdict_scores, low=low, high=high)
            if own.needs_reference != (reference is not None):
                raise InputError(
                    "template and reference do not fit: {reference}, {answer_a} and {answer_b} need the key"
                )
            self._form = own
        elif rubric is None or verdict is not None or verdict_scores is not None:
            raise InputError("rubric is missing: describe a good answer, or set template and verdict")
        elif reference is not None:
            self._form = PairwiseForm(rubric, thoughts=thoughts)
        else:
            self._form = RubricForm(rubric, low=low, high=high, thoughts=thoughts)
        if (prompt_price is None) != (completion_price is None):
            raise InputError("prompt_price and completion_price go together; set both or neither")
        self._endpoint = Endpoint(
            base_url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            request_timeout=request_timeout,
            max_retries=max_retries,
            outage_timeout=outage_timeout,
        )
        self.outage_seconds = 60 * outage_timeout
        self.columns = (reference,) if reference else ()
        self._reference, self._cache_path = reference, cache
        verdict_schema = {"name": "verdict", "strict": True, "schema": self._form.schema}
        reply_format = {"type": "json_schema", "json_schema": verdict_schema}
        longest = max_tokens or (SHORT_REPLY if self._form.schema else LONG_REPLY)
        settings: Json = {"model": model, "temperature": 0, "max_tokens": longest}
        settings |= {"response_format": reply_format if json_schema and self._form.schema else None}
        settings |= extra_body or {}
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
        """Return a score for each completion; equal requests are sent once."""
        questions = [parse_prompt(prompt) for prompt in prompts]
        answers = [parse_completion(completion).answer for completion in completions]
        references = columns[self._reference] if self._reference else [None] * len(answers)
        requests = [
            self._bodies(_transcript(question), answer, reference) if answer else []
            for question, answer, reference in zip(questions, answers, references, strict=True)
        ]
        replies = iter(await self._replies([body for bodies in requests for body in bodies]))
        return [self._verdict([next(replies) for _ in bodies]) if bodies else 0.0 for bodies in requests]

    def metrics(self) -> dict[str, float]:
        """Return counts since the last call: requests, retries, replies from the cache, tokens, and their cost."""
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
        """Return the requests for one answer: one on a rubric, or two beside a reference, one in each order."""
        if self._reference is not None and not isinstance(reference, str):
            raise InputError(f"reward judge: the column {self._reference} must be text, not {type(reference).__name__}")
        conversations = self._form.conversations(question, answer, None if reference is None else str(reference))
        return [{**self._settings, "messages": messages} for messages in conversations]

    def _verdict(self, replies: Sequence[str | RewardError]) -> float | RewardError:
        for reply in replies:
            if isinstance(reply, RewardError):
                return reply
        return self._form.combine([self._form.read(str(reply)) for reply in replies])

    async def _replies(self, bodies: Sequence[Json]) -> list[str | RewardError]:
        """Return the judge's reply to each request; only replies that hold a verdict are cached."""
        known = {_name(body): self._read_cached(body) for body in bodies}
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
        """Return the text of the only choice if it holds a verdict, else the error; count its tokens in any case."""
        usage = answer.get("usage")
        for key in self._tokens:
            count = usage.get(key) if isinstance(usage, Mapping) else None
            self._tokens[key] += count if isinstance(count, int) and 0 <= count <= MAX_TOKENS else 0
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return RewardError("the judge's answer has no choices[0].message.content")
        if not isinstance(text, str):
            return RewardError(f"the judge's message holds {type(text).__name__} and no text")
        return self._check(text) or text

    def _read_cached(self, body: Json) -> str | None:
        """Return the cached reply to a request; None if there is none, or none with a verdict."""
        reply = self._cache.get(self._endpoint.url, body)
        return reply if isinstance(reply, str) and self._check(reply) is None else None

    def _check(self, text: str) -> RewardError | None:
        """Return the error of a reply that holds no verdict."""
        try:
            self._form.read(text)
        except RewardError as error:
            return error
        return None


def _transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the conversation before the answer as text; a single message as it is."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _name(body: Json) -> str:
    return json.dumps(body, sort_keys=True)
