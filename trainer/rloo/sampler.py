"""The in-process sampler: completions from the live policy, with string stop, finish reasons and recorded logprobs.

Each prompt is prefilled once and its cache forked into the group; a row leaves the batch when it ends. Every token is
drawn with one uniform number that is keyed by (seed, step, prompt, completion), so that a completion depends neither on
the other rows of its batch nor on the number of processes.

Shapes: P prompts, R rows (completions being sampled), V tokens of the tokenizer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from data.chat import Ending
from data.stop import StopSearch
from trainer.models import Policy
from trainer.rloo.logprobs import left_padded, positions


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled completion.

    ids:      sampled ids, up to and including the one that ended it
    logprobs: log-probability that each id was drawn with, at the sampling temperature (same length)
    ending:   `<sep>` was completed, the eos token was drawn, or the length ran out
    """

    ids: list[int]
    logprobs: list[float]
    ending: Ending


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
    ) -> None:
        """`temperature` 0 is greedy; `batch_size` is the number of completions sampled at the same time."""
        self.model = model
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.batch_size = batch_size
        self._stop = StopSearch(tokenizer)
        self._eos_id = tokenizer.eos_token_id
        # Embeddings are padded beyond the tokenizer (Reka Flash 3 by 75 rows): those ids mean nothing.
        self._num_tokens = len(tokenizer)

    def sample(
        self, prompts: Sequence[list[int]], keys: Sequence[tuple[int, ...]], num_generations: int
    ) -> list[list[Completion]]:
        """Sample a group of `num_generations` completions for each prompt; `keys` seed them, one key a prompt."""
        prompts_at_once = max(1, self.batch_size // num_generations)
        groups: list[list[Completion]] = []
        with torch.no_grad(), _eval_mode(self.model):
            for first in range(0, len(prompts), prompts_at_once):
                chunk = slice(first, first + prompts_at_once)
                uniforms = [
                    np.random.default_rng([*key, number]).random(self.max_completion_length)
                    for key in keys[chunk]
                    for number in range(num_generations)
                ]
                rows = self._sample_rows(prompts[chunk], np.stack(uniforms), num_generations)
                groups += [rows[at : at + num_generations] for at in range(0, len(rows), num_generations)]
        return groups

    def _sample_rows(
        self, prompts: Sequence[list[int]], uniforms: np.ndarray, num_generations: int
    ) -> list[Completion]:
        device = self.model.device
        mask, input_ids = left_padded(prompts, device)
        cache = DynamicCache(config=self.model.config)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_repeat_interleave(num_generations)
        mask = mask.repeat_interleave(num_generations, dim=0)
        logits = logits.repeat_interleave(num_generations, dim=0)
        uniforms_RT = torch.from_numpy(uniforms).to(device)

        num_rows = len(uniforms)
        ids: list[list[int]] = [[] for _ in range(num_rows)]
        logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        endings = [Ending.LENGTH] * num_rows
        live = list(range(num_rows))
        for length in range(1, self.max_completion_length + 1):
            drawn, drawn_logprobs = draw(logits[:, : self._num_tokens], uniforms_RT[live, length - 1], self.temperature)
            going_on = []
            for place, (row, token, logprob) in enumerate(
                zip(live, drawn.tolist(), drawn_logprobs.tolist(), strict=True)
            ):
                ids[row].append(token)
                logprobs[row].append(logprob)
                if self._stop.completes_at(ids[row], length):
                    endings[row] = Ending.STOP
                elif token == self._eos_id:
                    endings[row] = Ending.EOS
                else:
                    going_on.append(place)
            if not going_on or length == self.max_completion_length:
                break
            if len(going_on) < len(live):
                kept = torch.tensor(going_on, device=device)
                cache.batch_select_indices(kept)
                mask, drawn = mask[kept], drawn[kept]
                live = [live[place] for place in going_on]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            logits = self.model(
                input_ids=drawn[:, None],
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return [Completion(ids=ids[row], logprobs=logprobs[row], ending=endings[row]) for row in range(num_rows)]


def draw(logits_RV: Tensor, uniforms_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution at its uniform in [0, 1) -> ids [R], logprobs [R].

    Temperature 0 takes the most likely token; its log-probability is then the one at temperature 1.
    """
    logprobs_RV = torch.log_softmax(logits_RV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids_R1 = logprobs_RV.argmax(dim=-1, keepdim=True)
    else:
        # In float64: the tail of a large vocabulary is lost in a float32 running sum.
        cumulative_RV = logprobs_RV.double().exp().cumsum(dim=-1)
        targets_R1 = uniforms_R.double()[:, None] * cumulative_RV[:, -1:]
        # The first id whose running sum exceeds the target has a probability above zero.
        ids_R1 = torch.searchsorted(cumulative_RV, targets_R1, right=True).clamp(max=logits_RV.shape[1] - 1)
    return ids_R1[:, 0], logprobs_RV.gather(1, ids_R1)[:, 0]


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
