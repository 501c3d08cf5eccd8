"""What vLLM's answers to requests for completions say: ids, log-probabilities, cutoffs, and how each completion ended.

Ids are the truth: what a completion is, and how it ended, is found from the ids that the server drew, by the same
search for `<sep>` as in the in-process sampler.
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import STOP, FinishReason
from rekatrain.data.errors import InputError
from rekatrain.data.stop import StopSearch, reasoning_closing
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.draw import TIE
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.sampler.vllm.client import Json

LEFT_OUT = -9999.0  # how vLLM writes the log-probability of a token that could not be drawn


def num_listed(config: RLOOConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a server lists with each one it draws, so that all which could be drawn are among them; 0: none."""
    return min(config.top_k or 0, len(tokenizer))


def request_filters(config: RLOOConfig, tokenizer: PreTrainedTokenizerBase) -> Json:
    """What a request says of its filters, 0 and 1 being none, and of the listing: by id, as texts are not unique."""
    listed = num_listed(config, tokenizer)
    return {"top_k": listed, "top_p": config.top_p, "logprobs": listed, "return_tokens_as_token_ids": True}


class AnswerReader:
    """Reads completions of up to `max_completion_length` tokens, of which one request may be a part."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: RLOOConfig) -> None:
        self._tokenizer = tokenizer
        self._num_listed = num_listed(config, tokenizer)
        self._max_completion_length = config.max_completion_length
        self._stop = StopSearch(tokenizer)

    def read(
        self, answer: Json, url: str, *, num_completions: int, max_tokens: int, goes_on: bool = False
    ) -> list[Completion]:
        """The completions of one answer, in the order of their numbers.

        goes_on: what was asked for is the rest of a completion; where its beginning ends within a character vLLM reads
                 the prompt once more with the first token, and may stop at a `<sep>` there, which is no ending
        """
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != num_completions:
            raise InputError(f"the vLLM server {url} gave no {num_completions} choices but {str(choices)[:100]}")
        ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [self._read_choice(choice, url, max_tokens, goes_on) for choice in ordered]

    def close_reasoning(self, beginning: Completion) -> Completion:
        """The beginning with the closing forced on it where its reasoning is open, as far as there is room."""
        room = self._max_completion_length - len(beginning.ids)
        closing = reasoning_closing(beginning.ids, self._tokenizer)[:room]
        return replace(
            beginning,
            ids=beginning.ids + closing,
            logprobs=beginning.logprobs + [0.0] * len(closing),
            forced=range(len(beginning.ids), len(beginning.ids) + len(closing)),
            cutoffs=beginning.cutoffs + ([-float("inf")] * len(closing) if self._num_listed else []),
        )

    def join(self, beginning: Completion, rest: Completion) -> Completion:
        """One completion of two parts; a `<sep>` that lies across the seam, where no server looks for it, ends it."""
        ids = self._stop.cut(beginning.ids + rest.ids)
        return replace(
            beginning,
            ids=ids,
            logprobs=(beginning.logprobs + rest.logprobs)[: len(ids)],
            cutoffs=(beginning.cutoffs + rest.cutoffs)[: len(ids)],
            finish_reason=FinishReason.STOP if self._stop.completes_at(ids, len(ids)) else rest.finish_reason,
        )

    def _read_choice(self, choice: Any, url: str, max_tokens: int, goes_on: bool) -> Completion:  # Any: a JSON value
        told = choice.get("logprobs") or {}
        ids, logprobs = choice.get("token_ids"), told.get("token_logprobs")
        if not isinstance(ids, list) or not isinstance(logprobs, list) or not len(ids) == len(logprobs) > 0:
            raise InputError(
                f"the vLLM server {url} gives no token_ids with as many token_logprobs: vLLM 0.30 does, "
                "rekatrain serve-rollouts starts it"
            )
        # The server looks for the stop in text that it decodes as it goes; here it is looked for in the ids.
        cut = self._stop.cut(ids)
        if self._stop.completes_at(cut, len(cut)):
            finish_reason = FinishReason.STOP
        elif ids[-1] == self._tokenizer.eos_token_id:
            finish_reason = FinishReason.EOS
        elif len(ids) == max_tokens or (goes_on and choice.get("stop_reason") == STOP):
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
            cutoffs=self._cutoffs(logprobs, told.get("top_logprobs"), url)[: len(cut)] if self._num_listed else [],
        )

    def _cutoffs(self, logprobs: list[float], listed: Any, url: str) -> list[float]:  # Any: a JSON value
        """The least likely of the listed tokens is the least likely that could be drawn, up to others' rounding."""
        if not isinstance(listed, list) or len(listed) != len(logprobs) or min(map(len, listed)) < self._num_listed:
            raise InputError(
                f"the vLLM server {url} does not list the {self._num_listed} log-probabilities a token that rloo.top_k "
                "asks for, by which the trainer knows which tokens could be drawn"
            )
        return [
            min(logprob, *(other for other in of_token.values() if other > LEFT_OUT)) - logprob - TIE
            for logprob, of_token in zip(logprobs, listed, strict=True)
        ]
