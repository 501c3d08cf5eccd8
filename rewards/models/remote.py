"""The reward `remote_reward_model`: the score of a server, vLLM's or any other that follows a small JSON contract.

    rewards:
      remote_reward_model: {url: "http://127.0.0.1:8001", route: classify, model: reward}

The contract of `route: http`, which POSTs to the url itself:

    {"prompts": ["human: Hi <sep> assistant:"], "messages": [[{"role": "user", "content": "Hi"}]], "answers": ["Hi!"]}
    {"scores": [0.25]}

Each list has one entry per completion; `messages` holds the prompt's turns. A score is a number, null if the reward
does not apply to the row, or {"error": "why"} if it could not be computed.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, MinLen
from pydantic import FiniteFloat

from rekatrain.data.chat import Message, parse_completion, parse_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.reward_model_input import RewardModelInput, break_markup, render_text
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.endpoint import Count, Endpoint, Json, Minutes, RejectedError, Retries, Seconds
from rekatrain.rewards.outcome import MAX_REWARD

Route = Literal["classify", "pooling", "score", "http"]
ServedTemplate = Literal["reka", "answer", "chat_template"]
Value = float | None | RewardError


class RemoteRewardModel:
    """(score - mean) / std of a reward model behind HTTP."""

    def __init__(
        self,
        *,
        url: str | list[str],
        route: Route,
        model: Annotated[str, MinLen(1)] | None = None,
        template: ServedTemplate | None = None,
        reasoning: bool = False,
        label: Annotated[int, Ge(0)] = 0,
        use_activation: bool = True,
        mean: FiniteFloat = 0.0,
        std: Annotated[FiniteFloat, Gt(0)] = 1.0,
        api_key_env: Annotated[str, MinLen(1)] | None = None,
        batch_size: Count = 16,
        concurrency: Count = 8,
        request_timeout: Seconds = 60.0,
        max_retries: Retries = 4,
        outage_timeout: Minutes = 10.0,
    ) -> None:
        """Check the options; nothing is sent.

        url:        the server, or several; /classify, /pooling or /score is added, and route http posts to it as it
                    is
        model:      the name under which vLLM serves the model
        template:   the text of an answer for classify and pooling: reka (default), answer, or chat_template, which
                    sends messages for the server's own template, one request per completion. Route score sends the
                    last message of the prompt and the answer, as `reward_model` reads its template pair
        reasoning:  judge the reasoning too, with vLLM's routes
        label:      index of the output that is the score
        mean, std:  of the scores; the reward is (score - mean) / std
        batch_size: completions per request
        use_activation: vLLM's key: apply the model's activation, which is none for exported reward models, and a
                    sigmoid or a softmax for most others. Set it to false for decoders only: for encoders such as BERT
                    it also leaves out the tanh inside the model (vLLM 0.30)
        api_key_env, concurrency, request_timeout, max_retries, outage_timeout:
                    see `rekatrain.rewards.models.endpoint.Endpoint`
        """
        if template is not None and route not in ("classify", "pooling"):
            raise InputError(
                f"template is {template!r}, which goes with the routes classify and pooling, not with {route}"
            )
        if route == "http" and (reasoning or not use_activation):
            raise InputError("reasoning and use_activation go with vLLM's routes, not with http; take them out")
        self._endpoint = Endpoint(
            url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            request_timeout=request_timeout,
            max_retries=max_retries,
            outage_timeout=outage_timeout,
        )
        self.outage_seconds = 60 * outage_timeout
        self._route, self._model, self._label, self._reasoning = route, model, label, reasoning
        self._use_activation = use_activation
        self._template: ServedTemplate = template or "reka"
        self._mean, self._std = mean, std
        self._batch_size = 1 if self._template == "chat_template" else batch_size

    async def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[Value]:
        """Return one score per completion, an error where the server returned none."""
        rows = [
            RewardModelInput(
                prompt=parse_prompt(prompt), answer=parsed.answer, reasoning=self._thought(parsed.reasoning)
            )
            for prompt, parsed in zip(prompts, map(parse_completion, completions), strict=True)
        ]
        values = await self._score(list(zip(prompts, rows, strict=True)), self._batch_size)
        return [(value - self._mean) / self._std if isinstance(value, float) else value for value in values]

    def metrics(self) -> dict[str, float]:
        """Return counts since the last call: requests and retries."""
        counted = {"num_requests": self._endpoint.num_requests, "num_retries": self._endpoint.num_retries}
        self._endpoint.num_requests = self._endpoint.num_retries = 0
        return {key: float(count) for key, count in counted.items()}

    async def _score(self, rows: Sequence[tuple[str, RewardModelInput]], batch_size: int) -> list[Value]:
        """Return a score for each (prompt, answer), before scaling."""
        batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        if self._route == "http":
            bodies = [_plain_body(batch) for batch in batches]
        else:
            bodies = [self._vllm_body([row for _, row in batch]) for batch in batches]
        answers = await self._endpoint.post_all("" if self._route == "http" else f"/{self._route}", bodies)
        values: list[Value] = []
        for batch, answer in zip(batches, answers, strict=True):
            if isinstance(answer, RejectedError) and len(batch) > 1:
                # vLLM rejects the whole request if one text is empty or longer than the context.
                values += await self._score(batch, 1)
            else:
                values += self._read(answer, len(batch))
        return values

    def _vllm_body(self, batch: Sequence[RewardModelInput]) -> Json:
        """Return a request of vLLM's routes."""
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
        items = answer.get("scores" if self._route == "http" else "data")
        if not isinstance(items, list) or len(items) != size:
            message = f"{self._endpoint.url} answered no list of {size} scores; the answer has {', '.join(answer)}"
            return [RewardError(message)] * size
        if self._route != "http":  # vLLM numbers its answers
            items = sorted(items, key=_index)
        return [read(item) for item in items]

    def _read_vllm(self, item: Any) -> Value:  # Any: a JSON value
        if not isinstance(item, dict):
            return RewardError(f"{self._endpoint.url} returned {str(item)[:100]} for a completion")
        outputs = item.get({"classify": "probs", "pooling": "data", "score": "score"}[self._route], None)
        if self._route == "score":
            return _number(outputs)
        if isinstance(outputs, list) and outputs and isinstance(outputs[-1], list):
            outputs = outputs[-1]  # a model that scores every token: only the last token has seen the whole answer
        if not isinstance(outputs, list) or self._label >= len(outputs):
            return RewardError(f"{self._endpoint.url} returned no output {self._label} but {str(outputs)[:100]}")
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
    """Break all text that vLLM could read as a special token: it reads them in any text, also in a policy's."""
    prompt: list[Message] = [{**turn, "content": break_markup(turn["content"])} for turn in row.prompt]
    reasoning = None if row.reasoning is None else break_markup(row.reasoning)
    return RewardModelInput(prompt=prompt, answer=break_markup(row.answer), reasoning=reasoning)


def _index(item: Any) -> float:  # Any: a JSON value
    index = item.get("index", 0) if isinstance(item, dict) else 0
    return float(index) if isinstance(index, int | float) and abs(index) <= MAX_REWARD else 0.0


def _number(value: Any) -> float | RewardError:  # Any: a JSON value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_REWARD:
        return RewardError(f"the server's score {str(value)[:100]} is not a finite number")
    return float(value)
