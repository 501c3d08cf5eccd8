"""The reward `remote_reward_model`: a score from a server, vLLM's or any that speaks a small JSON contract.

    rewards:
      remote_reward_model: {url: "http://127.0.0.1:8001", route: classify, model: reward}

The contract of `route: http`, which POSTs to the url itself:

    {"prompts": ["human: Hi <sep> assistant:"], "messages": [[{"role": "user", "content": "Hi"}]], "answers": ["Hi!"]}
    {"scores": [0.25]}

with one entry a completion, `messages` being the prompt's turns. A score is a number, null where the model has no
opinion on the row, or {"error": "why"} where it could not be computed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from rekatrain.data.chat import Message, parse_completion, parse_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.reward_model_input import RewardModelInput, TextTemplate, break_markup, render_text
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.endpoint import Endpoint, Json, RefusedError

Route = Literal["classify", "pooling", "score", "http"]
ServedTemplate = TextTemplate | Literal["chat_template"]
TEMPLATES = (*get_args(TextTemplate), "chat_template")
Value = float | None | RewardError


class RemoteRewardModel:
    """(score - mean) / std of a reward model behind HTTP."""

    def __init__(
        self,
        *,
        url: str,
        route: Route,
        model: str | None = None,
        template: ServedTemplate | None = None,
        reasoning: bool = False,
        label: int = 0,
        use_activation: bool = True,
        mean: float = 0.0,
        std: float = 1.0,
        api_key_env: str | None = None,
        batch_size: int = 16,
        concurrency: int = 8,
        request_timeout: float = 60.0,
        max_retries: int = 4,
    ) -> None:
        """Check the options; nothing is sent.

        url:        of the server, to which /classify, /pooling or /score is added; route http posts to it as it is
        model:      the name that vLLM serves it under
        template:   how an answer is written for classify and pooling: reka (default), answer, or chat_template, which
                    sends messages for the server's own template, one request a completion; score sends the last
                    message of the prompt and the answer, as `reward_model` reads its template pair
        reasoning:  have the reasoning judged too, by vLLM's routes
        label:      the place of the output that is the score
        mean, std:  of the scores, to bring them to the policy's scale
        batch_size: completions a request
        use_activation: vLLM's own key: whether the model's activation is applied, which is none for exported reward
                    models, and a sigmoid or a softmax for most others. False is right for decoders alone: of BERT's
                    kind it also leaves out the tanh inside the model (vLLM 0.30)
        api_key_env, concurrency, request_timeout, max_retries: see `rekatrain.rewards.models.endpoint.Endpoint`
        """
        if route not in get_args(Route):
            raise InputError(f"remote_reward_model: route must be one of {', '.join(get_args(Route))}, not {route!r}")
        if template is not None and (template not in TEMPLATES or route not in ("classify", "pooling")):
            raise InputError(
                f"remote_reward_model: template {template!r} must be one of {', '.join(TEMPLATES)} and goes "
                "with the routes classify and pooling"
            )
        if route == "http" and (reasoning or not use_activation):
            raise InputError("remote_reward_model: reasoning and use_activation go with vLLM's routes, not with http")
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise InputError(f"remote_reward_model: mean must be finite and std above 0, not {mean} and {std}")
        if batch_size < 1 or label < 0:
            raise InputError(
                f"remote_reward_model: batch_size must be at least 1 and label 0, not {batch_size}, {label}"
            )
        self._endpoint = Endpoint(
            url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            request_timeout=request_timeout,
            max_retries=max_retries,
        )
        self._route, self._model, self._label, self._reasoning = route, model, label, reasoning
        self._use_activation = use_activation
        self._template: ServedTemplate = template or "reka"
        self._mean, self._std = mean, std
        self._batch_size = 1 if self._template == "chat_template" else batch_size

    async def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[Value]:
        """One score a completion, an error where the server gave none."""
        rows = [
            RewardModelInput(
                prompt=parse_prompt(prompt), answer=parsed.answer, reasoning=self._thought(parsed.reasoning)
            )
            for prompt, parsed in zip(prompts, map(parse_completion, completions), strict=True)
        ]
        values = await self._score(list(zip(prompts, rows, strict=True)), self._batch_size)
        return [(value - self._mean) / self._std if isinstance(value, float) else value for value in values]

    def metrics(self) -> dict[str, float]:
        """Since the last call: requests and retries sent."""
        counted = {"num_requests": self._endpoint.num_requests, "num_retries": self._endpoint.num_retries}
        self._endpoint.num_requests = self._endpoint.num_retries = 0
        return {key: float(count) for key, count in counted.items()}

    async def _score(self, rows: Sequence[tuple[str, RewardModelInput]], batch_size: int) -> list[Value]:
        """A value for each (prompt, row), before scaling."""
        batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        if self._route == "http":
            bodies = [_plain_body(batch) for batch in batches]
        else:
            bodies = [self._vllm_body([row for _, row in batch]) for batch in batches]
        answers = await self._endpoint.post_all("" if self._route == "http" else f"/{self._route}", bodies)
        values: list[Value] = []
        for batch, answer in zip(batches, answers, strict=True):
            if isinstance(answer, RefusedError) and len(batch) > 1:
                # vLLM refuses a request whole for one text that is empty or longer than its context.
                values += await self._score(batch, 1)
            else:
                values += self._read(answer, len(batch))
        return values

    def _vllm_body(self, batch: Sequence[RewardModelInput]) -> Json:
        """A request of vLLM's routes."""
        broken = [_broken(row) for row in batch]
        body: Json = {"model": self._model, "use_activation": self._use_activation}
        if self._route == "score":
            body["text_1"] = [row.prompt[-1]["content"] for row in broken]
            body["text_2"] = [render_text(row, "answer") for row in broken]
        elif self._template == "chat_template":
            answer = render_text(broken[0], "answer")
            body["messages"] = [*broken[0].prompt, {"role": "assistant", "content": answer}]
            body |= {"add_generation_prompt": False, "continue_final_message": False}
        else:
            body["input"] = [render_text(row, self._template) for row in broken]
        return {key: value for key, value in body.items() if value is not None}

    def _thought(self, reasoning: str | None) -> str | None:
        return reasoning if self._reasoning else None

    def _read(self, answer: Json | RewardError, size: int) -> list[Value]:
        if isinstance(answer, RewardError):
            return [answer] * size
        read: Callable[[Any], Value] = self._read_plain if self._route == "http" else self._read_vllm
        found = answer.get("scores" if self._route == "http" else "data")
        if not isinstance(found, list) or len(found) != size:
            told = f"{self._endpoint.url} answered no list of {size} scores; the answer has {', '.join(answer)}"
            return [RewardError(told)] * size
        if self._route != "http":  # vLLM numbers its answers
            found = sorted(found, key=lambda item: item.get("index", 0) if isinstance(item, dict) else 0)
        return [read(item) for item in found]

    def _read_vllm(self, item: Any) -> Value:  # Any: a JSON value
        outputs = item.get({"classify": "probs", "pooling": "data", "score": "score"}[self._route], None)
        if self._route == "score":
            return _number(outputs)
        if isinstance(outputs, list) and outputs and isinstance(outputs[-1], list):
            outputs = outputs[-1]  # a model that scores every token: the last one has read the whole answer
        if not isinstance(outputs, list) or self._label >= len(outputs):
            return RewardError(f"{self._endpoint.url} gave no output {self._label} but {str(outputs)[:100]}")
        return _number(outputs[self._label])

    def _read_plain(self, item: Any) -> Value:  # Any: a JSON value
        if item is None:
            return None
        if isinstance(item, dict) and isinstance(item.get("error"), str):
            return RewardError(f"{self._endpoint.url}: {item['error'][:200]}")
        return _number(item)


def _plain_body(batch: Sequence[tuple[str, RewardModelInput]]) -> Json:
    return {
        "prompts": [prompt for prompt, _ in batch],
        "answers": [row.answer for _, row in batch],
        "messages": [list(row.prompt) for _, row in batch],
    }


def _broken(row: RewardModelInput) -> RewardModelInput:
    """The row without anything that vLLM could read as a special token: it does so in any text, and a policy writes."""
    prompt: list[Message] = [{**turn, "content": break_markup(turn["content"])} for turn in row.prompt]
    reasoning = None if row.reasoning is None else break_markup(row.reasoning)
    return RewardModelInput(prompt=prompt, answer=break_markup(row.answer), reasoning=reasoning)


def _number(value: Any) -> float | RewardError:  # Any: a JSON value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return RewardError(f"the server's score {str(value)[:100]} is no finite number")
    return float(value)
