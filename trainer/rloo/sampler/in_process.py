"""The in-process sampler: completions from the live policy, with string stop, finish reasons and recorded logprobs.

Each prompt is prefilled once, and its group shares that part of the cache. A completion leaves the batch when it ends.
Each token is drawn with one uniform number, keyed by (seed, step, prompt, completion). A completion therefore depends
neither on the other completions of its batch nor on the number of processes.

Shapes: S tokens of all prompts of a batch, N completions that have not ended yet, T tokens of a completion, V tokens of
the vocabulary, D hidden size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import FinishReason
from rekatrain.data.stop import StopSearch, reasoning_closing
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.rloo.kernels.cpu import decoding_weights
from rekatrain.trainer.rloo.kernels.grouped_attention import ForkedCache, decoder_and_head, run_decoder
from rekatrain.trainer.rloo.sampler.draw import draw


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled completion.

    ids:           sampled token ids, the last token included (the one that completes `<sep>`, or eos)
    logprobs:      log-probability with which each token was drawn, at the sampling temperature; 0 for forced tokens
    finish_reason: `<sep>` was completed, the eos token was drawn, or the length ran out
    forced:        indices of the tokens that the reasoning budget forced instead of a draw
    versions:      number of updates of the weights that drew each token; empty in process, where they are the step's
    cutoffs:       for each token, the log-prob of the least likely kept token minus this token's, rounded down: at most
                   0, and -inf for forced tokens; empty where no top-k or top-p filter is on
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    forced: range = range(0)
    versions: list[int] = field(default_factory=list)
    cutoffs: list[float] = field(default_factory=list)


class Sampler:
    """Samples groups of completions from a causal language model."""

    def __init__(
        self,
        model: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        temperature: float,
        batch_size: int,
        top_p: float = 1.0,
        top_k: int | None = None,
        reasoning_budget: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Store the sampling settings.

        temperature:      0 is greedy
        batch_size:       number of completions sampled at the same time
        top_p, top_k:     filters of `draw`
        reasoning_budget: tokens after which `</reasoning>` is forced, if `<reasoning>` is still open
        dtype:            dtype in which linear layers compute, as under autocast; None: the dtype of their weights
        """
        self.model = model
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.batch_size = batch_size
        self.top_p, self.top_k = top_p, top_k
        self.reasoning_budget = reasoning_budget
        self.dtype = dtype
        self._tokenizer = tokenizer
        self._stop = StopSearch(tokenizer)
        self._eos_id = tokenizer.eos_token_id
        # Embeddings are padded beyond the tokenizer (by 75 in Reka Flash 3): those ids mean nothing.
        self._num_tokens = len(tokenizer)

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample a group of `num_generations` completions for each prompt, in the order of the prompts.

        keys:          seeds of the draws, one key per prompt
        on_completion: called as soon as a completion ends, with its index in the flattened result; not called for
                       completions that run out of length
        """
        prompts_at_once = max(1, self.batch_size // num_generations)
        groups: list[list[Completion]] = []
        num_inputs = min(self.batch_size, len(prompts) * num_generations)
        with torch.no_grad(), _eval_mode(self.model), decoding_weights(self.model, num_inputs, self.dtype):
            for first in range(0, len(prompts), prompts_at_once):
                chunk = slice(first, first + prompts_at_once)
                uniforms = [
                    np.random.default_rng([*key, number]).random(self.max_completion_length)
                    for key in keys[chunk]
                    for number in range(num_generations)
                ]
                batch = self._sample_batch(
                    prompts[chunk], np.stack(uniforms), num_generations, on_completion, len(groups)
                )
                groups += [batch[at : at + num_generations] for at in range(0, len(batch), num_generations)]
        return groups

    def _sample_batch(
        self,
        prompts: Sequence[list[int]],
        uniforms: np.ndarray,
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None,
        first_group: int,
    ) -> list[Completion]:
        """Sample the completions of some prompts together; `first_group` is the index of the first prompt's group."""
        device = self.model.device
        decoder, head = decoder_and_head(self.model)
        # 1. Prefill: run each prompt once.
        cache = ForkedCache([len(prompt) for prompt in prompts], num_generations, self.max_completion_length, device)
        prompt_ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
        hidden_SD = run_decoder(decoder, prompt_ids, cache.prompts.position_ids, cache)[0]
        last_of_prompts = torch.tensor([len(prompt) for prompt in prompts], device=device).cumsum(0) - 1
        logits_NV = head(hidden_SD[last_of_prompts]).repeat_interleave(num_generations, dim=0)
        uniforms_NT = torch.from_numpy(uniforms).to(device)  # of all completions, ended or not

        partials = [_PartialCompletion() for _ in uniforms]
        completions: dict[int, Completion] = {}
        live = list(range(len(partials)))
        for length in range(1, self.max_completion_length + 1):
            # 2. Draw one token for each completion that has not ended.
            drawn, logprobs, cutoffs = draw(
                logits_NV[:, : self._num_tokens],
                uniforms_NT[live, length - 1],
                self.temperature,
                self.top_p,
                self.top_k,
            )
            cutoffs_of_live = [None] * len(live) if cutoffs is None else cutoffs.tolist()
            for index, *token in zip(live, drawn.tolist(), logprobs.tolist(), cutoffs_of_live, strict=True):
                self._append(partials[index], *token)
            # 3. Report completions that ended and remove them from the batch.
            for index in live:
                partial = partials[index]
                if partial.finish_reason is None and length < self.max_completion_length:
                    continue
                completions[index] = Completion(
                    ids=partial.ids,
                    logprobs=partial.logprobs,
                    finish_reason=partial.finish_reason or FinishReason.LENGTH,
                    forced=range(partial.forced_from, partial.forced_from + partial.num_forced),
                    cutoffs=partial.cutoffs,
                )
                if on_completion is not None and partial.finish_reason is not None:
                    on_completion(first_group * num_generations + index, completions[index])
            unfinished = [at for at, index in enumerate(live) if index not in completions]
            if not unfinished:
                break
            if len(unfinished) < len(live):
                live = [live[at] for at in cache.keep(unfinished)]
            # 4. Decode: run the new tokens.
            last_ids = torch.tensor([[partials[index].ids[-1]] for index in live], device=device)
            logits_NV = head(run_decoder(decoder, last_ids, cache.position_ids, cache)[:, 0])
            cache.advance()
        return [completions[index] for index in range(len(partials))]

    def _append(self, partial: "_PartialCompletion", drawn: int, logprob: float, cutoff: float | None) -> None:
        """Append the drawn token, or a forced one instead, and set `finish_reason` if the completion ends with it."""
        if partial.to_force:
            drawn, logprob, cutoff = partial.to_force.pop(0), 0.0, None if cutoff is None else -math.inf
            partial.num_forced += 1
        partial.ids.append(drawn)
        partial.logprobs.append(logprob)
        if cutoff is not None:
            partial.cutoffs.append(cutoff)
        if self._stop.completes_at(partial.ids, len(partial.ids)):
            partial.finish_reason = FinishReason.STOP
        elif drawn == self._eos_id:
            partial.finish_reason = FinishReason.EOS
        elif len(partial.ids) == self.reasoning_budget:
            partial.to_force, partial.forced_from = reasoning_closing(partial.ids, self._tokenizer), len(partial.ids)


@dataclass(kw_only=True)
class _PartialCompletion:
    """A completion that is being sampled.

    to_force:    tokens to append instead of the next draws
    forced_from: index of the first forced token
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cutoffs: list[float] = field(default_factory=list)
    to_force: list[int] = field(default_factory=list)
    num_forced: int = 0
    forced_from: int = 0
    finish_reason: FinishReason | None = None


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
