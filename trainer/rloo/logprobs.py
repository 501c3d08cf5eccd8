"""Log-probabilities of completions under a model: each prompt computed once, LM head on completion positions only.

Prompts are padded on the left and completions on the right, so that the two meet. Nothing that is padding is ever seen
by a real token: left padding is masked, and what comes after a token a causal model does not look at.

Shapes: P prompts, G completions a prompt, N = P * G rows, C tokens of the longest completion, D the hidden size,
V the tokenizer's ids, T tokens of all completions laid end to end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from trainer.models import Policy

# Positions whose logits exist at the same time, the rest being computed again in the backward pass: Reka Flash 3's
# float32 logits take 0.4 GB a thousand positions, and the loss needs several of that size.
LOGITS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Prompts with their groups of completions.

    prompts, prompt_mask: [P, longest prompt], padded on the left; the mask is 1 on real tokens
    completions:          [N, C], padded on the right, group after group
    lengths:              [N], tokens of each completion
    """

    prompts: Tensor
    prompt_mask: Tensor
    completions: Tensor
    lengths: Tensor

    @property
    def is_token(self) -> Tensor:
        """[N, C], true on completion tokens and false on padding."""
        return torch.arange(self.completions.shape[1], device=self.lengths.device) < self.lengths[:, None]


def make_rows(prompts: Sequence[list[int]], groups: Sequence[Sequence[list[int]]], device: torch.device) -> Rows:
    """Lay out prompts and their equally large groups of completions; no prompt and no completion is empty.

    >>> rows = make_rows([[5, 6], [4]], [[[7]], [[8, 9]]], torch.device("cpu"))
    >>> rows.prompts.tolist(), rows.completions.tolist()
    ([[5, 6], [0, 4]], [[7, 0], [8, 9]])
    """
    prompt_mask, padded_prompts = left_padded(prompts, device)
    completions = [completion for group in groups for completion in group]
    longest = max(map(len, completions))
    padded = [completion + [0] * (longest - len(completion)) for completion in completions]
    return Rows(
        prompts=padded_prompts,
        prompt_mask=prompt_mask,
        completions=torch.tensor(padded, device=device),
        lengths=torch.tensor([len(completion) for completion in completions], device=device),
    )


def left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mask and ids of prompts that end in the same column, both [P, longest prompt]."""
    longest = max(map(len, prompts))
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    return torch.tensor(mask, device=device), torch.tensor(ids, device=device)


def positions(mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row; 0 on left padding."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


class CompletionLogprobs(nn.Module):
    """A policy as a function from rows to log-probabilities.

    A module, so that what wraps models (data parallel, DeepSpeed) wraps this one call with all its uses of the weights.
    """

    def __init__(self, policy: Policy, *, temperature: float, num_tokens: int) -> None:
        """`num_tokens`: ids that can be sampled, the tokenizer's; the distribution is over those, as in sampling."""
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.num_tokens = num_tokens

    def forward(self, rows: Rows) -> Tensor:
        """Log-probability of each completion token at the sampling temperature -> [T], float32."""
        policy = self.policy
        causal_lm = cast(PreTrainedModel, policy.get_base_model() if isinstance(policy, PeftModel) else policy)
        # Activation checkpointing runs a layer again in the backward pass and allows no cache in it.
        hidden = _hidden_of_each_row if causal_lm.is_activation_checkpointing else _hidden_with_shared_prompts
        is_token_NC = rows.is_token
        hidden_TD = hidden(causal_lm.get_decoder(), rows)[is_token_NC]
        targets_T = rows.completions[is_token_NC]
        if len(targets_T) <= LOGITS_AT_ONCE:
            return self._score(hidden_TD, targets_T)
        pieces = zip(hidden_TD.split(LOGITS_AT_ONCE), targets_T.split(LOGITS_AT_ONCE), strict=True)
        return torch.cat([checkpoint(self._score, *piece, use_reentrant=False) for piece in pieces])

    def _score(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        logits_TV = cast(nn.Module, self.policy.get_output_embeddings())(hidden_TD)
        logits_TV = logits_TV[:, : self.num_tokens].float() / self.temperature
        return logits_TV.gather(1, targets_T[:, None])[:, 0] - logits_TV.logsumexp(dim=1)


def _hidden_with_shared_prompts(decoder: PreTrainedModel, rows: Rows) -> Tensor:
    """Outputs that predict each completion token, [N, C, D]; a prompt is run once, its cache forked with gradient."""
    group_size = len(rows.completions) // len(rows.prompts)
    cache = DynamicCache(config=decoder.config)
    prompt_PLD = decoder(
        input_ids=rows.prompts,
        attention_mask=rows.prompt_mask,
        position_ids=positions(rows.prompt_mask),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    first_N1D = prompt_PLD[:, -1:].repeat_interleave(group_size, dim=0)
    if rows.completions.shape[1] == 1:
        return first_N1D
    cache.batch_repeat_interleave(group_size)
    mask = _whole_mask(rows, group_size)
    following_NCD = decoder(
        input_ids=rows.completions[:, :-1],
        attention_mask=mask,
        position_ids=positions(mask)[:, rows.prompts.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first_N1D, following_NCD], dim=1)


def _hidden_of_each_row(decoder: PreTrainedModel, rows: Rows) -> Tensor:
    """The same outputs, [N, C, D], from rows that each carry their prompt."""
    group_size = len(rows.completions) // len(rows.prompts)
    mask = _whole_mask(rows, group_size)
    hidden = decoder(
        input_ids=torch.cat([rows.prompts.repeat_interleave(group_size, dim=0), rows.completions[:, :-1]], dim=1),
        attention_mask=mask,
        position_ids=positions(mask),
        use_cache=False,
    ).last_hidden_state
    return hidden[:, rows.prompts.shape[1] - 1 :]


def _whole_mask(rows: Rows, group_size: int) -> Tensor:
    prompt_mask = rows.prompt_mask.repeat_interleave(group_size, dim=0)
    return torch.cat([prompt_mask, torch.ones_like(rows.completions[:, :-1])], dim=1)


def micro_batches(row_lengths: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Put groups of rows together so that each batch has at most `budget` padded tokens -> places of its groups.

    Groups of like length come together. A group is never split; one that is above the budget is a batch of its own.

    >>> list(micro_batches([[3, 2], [8, 1], [2, 2]], budget=12))
    [[1], [0, 2]]
    """
    batch: list[int] = []
    num_rows = longest = 0
    for place in sorted(range(len(row_lengths)), key=lambda place: max(row_lengths[place]), reverse=True):
        num_rows += len(row_lengths[place])
        if batch and num_rows * longest > budget:
            yield batch
            batch, num_rows = [], len(row_lengths[place])
        if not batch:
            longest = max(row_lengths[place])
        batch.append(place)
    if batch:
        yield batch
