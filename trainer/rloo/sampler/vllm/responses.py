"""Read vLLM's responses to completion requests: ids, log-probabilities, cutoffs and finish reasons.

Ids are the truth: a completion and its finish reason follow from the ids that the server drew, by the same search for
`<sep>` as in the in-process sampler.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import STOP, FinishReason
from rekatrain.data.errors import InputError
from rekatrain.data.stop import StopSearch, reasoning_closing
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.draw import TIE
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.sampler.vllm.client import ServerDown

DROPPED_LOGPROB = -9999.0  # vLLM's log-probability of a token that its filters dropped


def num_listed(config: RLOOConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many log-probs a server lists per drawn token, so that all kept tokens are listed; 0: none."""
    return min(config.top_k or 0, len(tokenizer))


def request_filters(config: RLOOConfig, tokenizer: PreTrainedTokenizerBase) -> Json:
    """Return the fields of a request that set its filters and its listed log-probs.

    vLLM reads top_k 0 and top_p 1 as no filter. Tokens are listed by id, because texts of tokens are not unique.
    """
    listed = num_listed(config, tokenizer)
    return {"top_k": listed, "top_p": config.top_p, "logprobs": listed, "return_tokens_as_token_ids": True}


class StreamedResponse:
    """Collects the events of a streamed response -> the response as it is without streaming, with versions of tokens.

    version: returns the number of updates of the weights that draw the tokens that arrive now
    """

    def __init__(self, num_completions: int, version: Callable[[], int]) -> None:
        self._version, self._model = version, ""
        self._choices: list[dict[str, Any]] = [
            {"index": index, "token_ids": [], "versions": [], "token_logprobs": [], "top_logprobs": []}
            for index in range(num_completions)
        ]

    def add(self, event: Json) -> None:
        """Add the tokens of an event; raise ServerDown for an error in the middle of the stream."""
        if "choices" not in event:
            raise ServerDown(f"a vLLM server broke a stream off: {str(event)[:300]}")
        self._model = event.get("model", "")
        for part in event["choices"]:
            choice, listing, ids = self._choices[part["index"]], part.get("logprobs") or {}, part.get("token_ids") or []
            choice["token_ids"] += ids
            choice["versions"] += [self._version()] * len(ids)
            for name in ("token_logprobs", "top_logprobs"):
                choice[name] += listing.get(name) or []
            if part.get("finish_reason") is not None:
                choice |= {"finish_reason": part["finish_reason"], "stop_reason": part.get("stop_reason")}

    def response(self) -> Json:
        """Return the whole response; raise ServerDown if a completion has not ended."""
        if any("finish_reason" not in choice for choice in self._choices):
            raise ServerDown("a vLLM server ended a stream before its completions")
        choices = [
            {**choice, "logprobs": {name: choice.pop(name) for name in ("token_logprobs", "top_logprobs")}}
            for choice in self._choices
        ]
        return {"model": self._model, "choices": choices}


class ResponseReader:
    """Reads completions from responses; one completion may take several requests (reasoning budget)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: RLOOConfig) -> None:
        self._tokenizer = tokenizer
        self._num_listed = num_listed(config, tokenizer)
        self._max_completion_length = config.max_completion_length
        self._stop = StopSearch(tokenizer)

    def read(
        self,
        response: Json,
        url: str,
        *,
        num_completions: int,
        max_tokens: int,
        version: int = 0,
        is_continuation: bool = False,
    ) -> list[Completion]:
        """Return the completions of one response, ordered by their index.

        version:         number of updates of the weights, where the response does not say it per token
        is_continuation: True where the request continues a partial completion. If the partial text ends within a
                         character, vLLM decodes the prompt again with the first token and may report a stop at a
                         `<sep>` of the prompt. That stop is ignored: the completion continues.
        """
        choices = response.get("choices")
        if not isinstance(choices, list) or len(choices) != num_completions:
            raise InputError(
                f"the vLLM server {url} must return {num_completions} choices, but returned {str(choices)[:100]}"
            )
        ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [self._read_choice(choice, url, max_tokens, version, is_continuation) for choice in ordered]

    def close_reasoning(self, partial: Completion) -> Completion:
        """Append the closing of the reasoning where it is open, as far as the length limit allows."""
        room = self._max_completion_length - len(partial.ids)
        closing = reasoning_closing(partial.ids, self._tokenizer)[:room]
        return replace(
            partial,
            ids=partial.ids + closing,
            logprobs=partial.logprobs + [0.0] * len(closing),
            forced=range(len(partial.ids), len(partial.ids) + len(closing)),
            versions=partial.versions + partial.versions[-1:] * len(closing),
            cutoffs=partial.cutoffs + ([-float("inf")] * len(closing) if self._num_listed else []),
        )

    def join(self, partial: Completion, rest: Completion) -> Completion:
        """Join two parts of a completion; a `<sep>` across the seam, where no server looks for it, ends it."""
        ids = self._stop.cut(partial.ids + rest.ids)
        return replace(
            partial,
            ids=ids,
            logprobs=(partial.logprobs + rest.logprobs)[: len(ids)],
            versions=(partial.versions + rest.versions)[: len(ids)],
            cutoffs=(partial.cutoffs + rest.cutoffs)[: len(ids)],
            finish_reason=FinishReason.STOP if self._stop.completes_at(ids, len(ids)) else rest.finish_reason,
        )

    def _read_choice(
        self,
        choice: Any,  # a JSON value
        url: str,
        max_tokens: int,
        version: int,
        is_continuation: bool,
    ) -> Completion:
        listing = choice.get("logprobs") or {}
        ids, logprobs = choice.get("token_ids"), listing.get("token_logprobs")
        if not isinstance(ids, list) or not isinstance(logprobs, list) or not len(ids) == len(logprobs) > 0:
            raise InputError(
                f"the vLLM server {url} does not return one token_logprobs per token_ids, as vLLM 0.30 does; "
                "start it by rekatrain serve-rollouts"
            )
        # The server searches for the stop in the text that it decodes token by token; here the ids decide.
        cut = self._stop.cut(ids)
        if self._stop.completes_at(cut, len(cut)):
            finish_reason = FinishReason.STOP
        elif ids[-1] == self._tokenizer.eos_token_id:
            finish_reason = FinishReason.EOS
        elif len(ids) == max_tokens or (is_continuation and choice.get("stop_reason") == STOP):
            finish_reason = FinishReason.LENGTH
        else:
            raise InputError(
                f"the vLLM server {url} ended a completion of {len(ids)} tokens at id {ids[-1]}, which is neither "
                f"{STOP} nor the eos token {self._tokenizer.eos_token_id} of the recipe's tokenizer: start it with "
                "--generation-config vllm, as rekatrain serve-rollouts does"
            )
        return Completion(
            ids=cut,
            logprobs=[float(logprob) for logprob in logprobs[: len(cut)]],
            finish_reason=finish_reason,
            versions=choice.get("versions", [version] * len(ids))[: len(cut)],
            cutoffs=self._cutoffs(logprobs, listing.get("top_logprobs"), url)[: len(cut)] if self._num_listed else [],
        )

    def _cutoffs(self, logprobs: list[float], listed: Any, url: str) -> list[float]:  # Any: a JSON value
        """Return the cutoff of each token: the smallest listed log-prob minus the token's, less `TIE` for rounding."""
        if not isinstance(listed, list) or len(listed) != len(logprobs) or min(map(len, listed)) < self._num_listed:
            raise InputError(
                f"the vLLM server {url} does not list the {self._num_listed} log-probs per token that rloo.top_k "
                "needs: by them the trainer finds the kept tokens"
            )
        return [
            min(logprob, *(other for other in of_token.values() if other > DROPPED_LOGPROB)) - logprob - TIE
            for logprob, of_token in zip(logprobs, listed, strict=True)
        ]
