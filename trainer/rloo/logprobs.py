"""Log-probabilities of completions under a model: no padding, each prompt once, LM head on completion positions only.

Shapes: N completions, T tokens of the completions laid end to end, S tokens that the model is run on, D the hidden
size, V the rows of the LM head.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from peft import PeftModel
from rekatrain.trainer.models import Policy
from rekatrain.trainer.rloo.kernels.grouped_attention import PackedGroups, run_decoder
from rekatrain.trainer.rloo.packing import PassCost
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Positions whose logits exist at the same time, the rest being computed again in the backward pass: Reka Flash 3's
# float32 logits take 0.4 GB a thousand positions.
LOGITS_AT_ONCE = 2048
# Bytes of logits that are worked on at the same time: temporaries stay in a processor's cache, a GPU has enough to do.
LOGIT_BYTES_AT_ONCE = {"cpu": 2**21, "cuda": 2**28}


@dataclass(frozen=True, kw_only=True)
class PackedCompletions:
    """Prompts with their groups of completions, packed.

    input_ids:  [1, S], groups end to end: a prompt, then its completions, each without its last token
    layout:     who sees whom among them
    predictors: [T], the place in S whose output predicts each completion token
    targets:    [T], the completion tokens
    lengths:    [N], tokens of each completion
    num_chunks: into which the completion tokens are cut for the LM head
    cutoffs:     [T], log p of the least likely token that could be drawn, less that of the target, rounded down;
                None where every token could be drawn
    """

    input_ids: Tensor
    layout: PackedGroups
    predictors: Tensor
    targets: Tensor
    lengths: Tensor
    num_chunks: int
    cutoffs: Tensor | None = None


def pack_completions(
    prompts: Sequence[list[int]],
    groups: Sequence[Sequence[list[int]]],
    device: torch.device,
    *,
    is_shared: Sequence[bool] | None = None,
    cutoffs: Sequence[float] | None = None,
) -> PackedCompletions:
    """Pack prompts and their groups of completions; no prompt and no completion is empty.

    is_shared: for each group, whether its prompt is run once or with each completion; default once

    >>> rows = pack_completions([[5, 6], [4]], [[[7, 8], [9]], [[1, 2]]], torch.device("cpu"))
    >>> rows.input_ids.tolist(), rows.predictors.tolist(), rows.targets.tolist()
    ([[5, 6, 7, 4, 1]], [1, 2, 1, 3, 4], [7, 8, 9, 1, 2])
    """
    input_ids: list[int] = []
    predictors: list[int] = []
    spans: list[tuple[int, list[int]]] = []
    for prompt, completions, shared in zip(prompts, groups, is_shared or [True] * len(prompts), strict=True):
        if shared:
            input_ids += prompt
            spans.append((len(prompt), [len(completion) - 1 for completion in completions]))
        last_of_prompt = len(input_ids) - 1
        for completion in completions:
            if not shared:  # to attention, prompt and completion are then one causal text
                input_ids += prompt
                spans.append((len(prompt) + len(completion) - 1, []))
                last_of_prompt = len(input_ids) - 1
            predictors += [last_of_prompt, *range(len(input_ids), len(input_ids) + len(completion) - 1)]
            input_ids += completion[:-1]
    flat = [completion for completions in groups for completion in completions]
    return PackedCompletions(
        input_ids=torch.tensor([input_ids], device=device),
        layout=PackedGroups(spans, device),
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor([token for completion in flat for token in completion], device=device),
        lengths=torch.tensor([len(completion) for completion in flat], device=device),
        num_chunks=max(1, math.ceil(len(predictors) / LOGITS_AT_ONCE)),
        cutoffs=None if cutoffs is None else torch.tensor(cutoffs, device=device),
    )


def decoder_and_head(policy: Policy) -> tuple[PreTrainedModel, nn.Module]:
    """A policy's two halves, with the adapter where it has one."""
    causal_lm = cast(PreTrainedModel, policy.get_base_model() if isinstance(policy, PeftModel) else policy)
    return causal_lm.get_decoder(), cast(nn.Module, causal_lm.get_output_embeddings())


class CompletionLogprobs(nn.Module):
    """A policy as a function from rows to log-probabilities.

    A module, so that what wraps models (data parallel, DeepSpeed) wraps this one call with all its uses of the weights.
    """

    def __init__(self, policy: Policy, *, temperature: float, num_tokens: int) -> None:
        """`num_tokens`: ids that can be sampled, the tokenizer's; the distribution is over those, as in sampling."""
        super().__init__()
        self.policy = policy
        self.config = policy.config  # by which Accelerate sizes what ZeRO-3 gathers at a time
        self.temperature = temperature
        self.num_tokens = num_tokens

    @cached_property
    def pass_cost(self) -> PassCost:
        """The cost of one pass, by which rows are packed."""
        decoder, _ = decoder_and_head(self.policy)
        return PassCost.of(decoder)

    def forward(self, rows: PackedCompletions) -> Tensor:
        """Log-probability of each completion token at the sampling temperature -> [T], float32."""
        decoder, _ = decoder_and_head(self.policy)
        hidden_SD = run_decoder(decoder, rows.input_ids, rows.layout.position_ids, rows.layout)[0]
        arguments = (hidden_SD.index_select(0, rows.predictors), rows.targets, rows.cutoffs)
        if rows.num_chunks == 1:
            return self._score(*arguments)
        pieces = zip(*(_split(tensor, rows.num_chunks) for tensor in arguments), strict=True)
        return torch.cat([checkpoint(self._score, *piece, use_reentrant=False) for piece in pieces])

    def _score(self, hidden_TD: Tensor, targets_T: Tensor, cutoffs_T: Tensor | None) -> Tensor:
        _, head = decoder_and_head(self.policy)
        scored = TokenLogprobs.apply(head(hidden_TD), targets_T, cutoffs_T, self.temperature, self.num_tokens)
        return cast(Tensor, scored)


def _split(tensor: Tensor | None, num_chunks: int) -> Sequence[Tensor | None]:
    return [None] * num_chunks if tensor is None else tensor.tensor_split(num_chunks)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(z / temperature)[target] over the first `num_tokens` logits z, for each of T positions.

    With cutoffs, at most 0, the softmax is over the tokens whose log-probability reaches the target's plus the cutoff:
    that of a policy that samples from its likeliest tokens only, its choice of them held fixed.

    The gradient, (1[v = target] - p_v) / temperature, is written over the logits: the largest tensor of a step exists
    once, where autograd would keep it, its quotient and its exponentials.
    """

    @staticmethod
    def forward(
        ctx: Any,  # autograd's own
        logits_TV: Tensor,
        targets_T: Tensor,
        cutoffs_T: Tensor | None,
        temperature: float,
        num_tokens: int,
    ) -> Tensor:
        """-> [T], float32. The caller gives `logits_TV` away."""
        chosen_T = logits_TV.gather(1, targets_T[:, None])[:, 0].float() / temperature
        lowest_T = None if cutoffs_T is None else chosen_T + cutoffs_T
        normalizers = []
        for rows in _rows_at_once(logits_TV):
            scaled = logits_TV[rows, :num_tokens].float()
            if temperature != 1:
                scaled = scaled / temperature
            if lowest_T is not None:
                scaled = scaled.masked_fill(scaled < lowest_T[rows, None], -torch.inf)
            normalizers.append(scaled.logsumexp(dim=1))
        normalizers_T = torch.cat(normalizers)
        ctx.save_for_backward(logits_TV, targets_T, normalizers_T, lowest_T)
        ctx.temperature, ctx.num_tokens = temperature, num_tokens
        return chosen_T - normalizers_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits, in their place."""
        logits_TV, targets_T, normalizers_T, lowest_T = ctx.saved_tensors
        scaled_T1 = (gradients[0] / ctx.temperature)[:, None]
        for rows in _rows_at_once(logits_TV):
            piece = logits_TV[rows, : ctx.num_tokens]
            scaled = piece.float()  # in float32 the piece itself
            if ctx.temperature != 1:
                scaled.div_(ctx.temperature)
            if lowest_T is not None:
                scaled.masked_fill_(scaled < lowest_T[rows, None], -torch.inf)
            scaled.sub_(normalizers_T[rows, None]).exp_().mul_(-scaled_T1[rows])
            if scaled.dtype != piece.dtype:
                piece.copy_(scaled)
        logits_TV[:, ctx.num_tokens :] = 0
        logits_TV.scatter_add_(1, targets_T[:, None], scaled_T1.to(logits_TV.dtype))
        return logits_TV, None, None, None, None


def _rows_at_once(logits_TV: Tensor) -> Iterator[slice]:
    num_rows = max(1, LOGIT_BYTES_AT_ONCE[logits_TV.device.type] // (4 * logits_TV.shape[1]))
    return (slice(first, first + num_rows) for first in range(0, len(logits_TV), num_rows))
