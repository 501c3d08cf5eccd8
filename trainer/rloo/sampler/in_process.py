"""The in-process sampler: completions from the live policy, with string stop, finish reasons and recorded logprobs.

Each prompt is prefilled once and its cache forked into the group; a row leaves the batch when it ends. Every token is
drawn with one uniform number that is keyed by (seed, step, prompt, completion), so that a completion depends neither on
the other rows of its batch nor on the number of processes.

Shapes: P prompts, R rows (completions being sampled), V tokens of the tokenizer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from rekatrain.data.chat import FinishReason
from rekatrain.data.stop import StopSearch, reasoning_closing
from rekatrain.trainer.models import Policy
from rekatrain.trainer.rloo.kernels.cpu.packed_weights import decoding_weights
from rekatrain.trainer.rloo.kernels.grouped_attention import run_decoder
from rekatrain.trainer.rloo.logprobs import decoder_and_head
from rekatrain.trainer.rloo.sampler.draw import draw
from rekatrain.trainer.rloo.sampler.kv_cache import ForkedCache
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled completion.

    ids:      sampled ids, up to and including the one that ended it
    logprobs: log-probability that each id was drawn with, at the sampling temperature (same length)
    finish_reason:   `<sep>` was completed, the eos token was drawn, or the length ran out
    forced:   places of ids that were not drawn but forced by the reasoning budget; their log-probability reads 0
    cutoffs:   for each id, log p of the least likely token that could be drawn, less that of the id, rounded down;
              empty where every token could be drawn
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    forced: range = range(0)
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
        """Set how completions are drawn.

        temperature:      0 is greedy
        batch_size:       completions sampled at the same time
        top_p, top_k:     draw from the likeliest tokens only
        reasoning_budget: tokens after which `</reasoning>` is forced where `<reasoning>` is still open
        dtype:            what linear layers compute in, as under autocast; None: in their weights'
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
        # Embeddings are padded beyond the tokenizer (Reka Flash 3 by 75 rows): those ids mean nothing.
        self._num_tokens = len(tokenizer)

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample a group of `num_generations` completions for each prompt; `keys` seed them, one key a prompt.

        `on_completion` is called with each completion that ends before the others of its batch, and with its place in
        the order of the result, as soon as it has ended.
        """
        prompts_at_once = max(1, self.batch_size // num_generations)
        groups: list[list[Completion]] = []
        num_rows = min(self.batch_size, len(prompts) * num_generations)
        with torch.no_grad(), _eval_mode(self.model), decoding_weights(self.model, num_rows, self.dtype):
            for first in range(0, len(prompts), prompts_at_once):
                chunk = slice(first, first + prompts_at_once)
                uniforms = [
                    np.random.default_rng([*key, number]).random(self.max_completion_length)
                    for key in keys[chunk]
                    for number in range(num_generations)
                ]
                rows = self._sample_rows(
                    prompts[chunk], np.stack(uniforms), num_generations, on_completion, len(groups)
                )
                groups += [rows[at : at + num_generations] for at in range(0, len(rows), num_generations)]
        return groups

    def _sample_rows(
        self,
        prompts: Sequence[list[int]],
        uniforms: np.ndarray,
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None,
        first_group: int,
    ) -> list[Completion]:
        device = self.model.device
        decoder, head = decoder_and_head(self.model)
        cache = ForkedCache([len(prompt) for prompt in prompts], num_generations, self.max_completion_length, device)
        prompt_ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
        hidden_SD = run_decoder(decoder, prompt_ids, cache.prompts.position_ids, cache)[0]
        last_of_prompts = torch.tensor([len(prompt) for prompt in prompts], device=device).cumsum(0) - 1
        logits_RV = head(hidden_SD[last_of_prompts]).repeat_interleave(num_generations, dim=0)
        uniforms_RT = torch.from_numpy(uniforms).to(device)

        rows = [_Row() for _ in uniforms]
        live = list(range(len(rows)))
        for length in range(1, self.max_completion_length + 1):
            drawn, logprobs, cutoffs = draw(
                logits_RV[:, : self._num_tokens],
                uniforms_RT[live, length - 1],
                self.temperature,
                self.top_p,
                self.top_k,
            )
            cutoffs_of_rows = [None] * len(live) if cutoffs is None else cutoffs.tolist()
            for row, *token in zip(live, drawn.tolist(), logprobs.tolist(), cutoffs_of_rows, strict=True):
                self._append(rows[row], *token)
            for row in live:
                if on_completion is not None and rows[row].finish_reason is not None:
                    on_completion(first_group * num_generations + row, rows[row].completion())
            going_on = [place for place, row in enumerate(live) if rows[row].finish_reason is None]
            if not going_on or length == self.max_completion_length:
                break
            if len(going_on) < len(live):
                live = [live[place] for place in cache.keep(going_on)]
            last_ids = torch.tensor([[rows[row].ids[-1]] for row in live], device=device)
            logits_RV = head(run_decoder(decoder, last_ids, cache.position_ids, cache)[:, 0])
            cache.advance()
        return [row.completion() for row in rows]

    def _append(self, row: "_Row", drawn: int, logprob: float, cutoff: float | None) -> None:
        """Add the drawn token, or the one that is forced in its place, and see whether the row ends with it."""
        if row.to_force:
            drawn, logprob, cutoff = row.to_force.pop(0), 0.0, None if cutoff is None else -math.inf
            row.num_forced += 1
        row.ids.append(drawn)
        row.logprobs.append(logprob)
        if cutoff is not None:
            row.cutoffs.append(cutoff)
        if self._stop.completes_at(row.ids, len(row.ids)):
            row.finish_reason = FinishReason.STOP
        elif drawn == self._eos_id:
            row.finish_reason = FinishReason.EOS
        elif len(row.ids) == self.reasoning_budget:
            row.to_force, row.forced_from = reasoning_closing(row.ids, self._tokenizer), len(row.ids)


@dataclass(kw_only=True)
class _Row:
    """A completion that is being sampled."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cutoffs: list[float] = field(default_factory=list)
    to_force: list[int] = field(default_factory=list)
    num_forced: int = 0
    forced_from: int = 0
    finish_reason: FinishReason | None = None

    def completion(self) -> Completion:
        return Completion(
            ids=self.ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason or FinishReason.LENGTH,
            forced=range(self.forced_from, self.forced_from + self.num_forced),
            cutoffs=self.cutoffs,
        )


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
