"""Log-probabilities of completions under the policy and the reference: no padding, each prompt once per group.

Shapes: N completions, T tokens of the completions laid end to end, S tokens that the model is run on, D the hidden
size, V the size of the LM head.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.models.parameters import replaced, trained_of
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.distributed import frozen, zero_stage
from rekatrain.trainer.rloo.kernels.cpu import PassCost
from rekatrain.trainer.rloo.kernels.float32_head import compute_head_in_float32
from rekatrain.trainer.rloo.kernels.fused_head import fused_logprobs
from rekatrain.trainer.rloo.kernels.grouped_attention import Layout, PackedGroups, decoder_and_head, run_decoder

# Tokens whose logits exist at the same time; the backward pass computes them again, chunk by chunk. The float32 logits
# of Reka Flash 3 take 0.4 GB per thousand tokens.
TOKENS_PER_CHUNK = 2048
# Bytes of logits that are worked on at the same time: temporaries stay in a processor's cache; a GPU has enough to do.
# There they are four times as large: a sum in float64 begins with a copy.
LOGIT_BYTES_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}


@dataclass(frozen=True, kw_only=True)
class PackedCompletions:
    """Prompts with their groups of completions, packed end to end.

    input_ids:  [1, S], group after group: a prompt, then its completions, each without its last token; filler tokens
    layout:     the attention pattern: which of these tokens sees which
    predictors: [T], for each completion token the index in S of the output that predicts it
    targets:    [T], the completion tokens
    lengths:    [N], tokens of each completion
    num_chunks: number of chunks that the completion tokens are cut into for the LM head
    cutoffs:    [T], log p of the least likely kept token minus that of the target, rounded down; None where the
                sampler filtered nothing

    Where processes split the tokens (sequence_parallel.py), all but `lengths` is that of this process's slice, and
    put_together makes the log-probabilities of all tokens, [T], of those of each process.
    """

    input_ids: Tensor
    layout: Layout
    predictors: Tensor
    targets: Tensor
    lengths: Tensor
    num_chunks: int
    cutoffs: Tensor | None = None
    put_together: Callable[[Tensor], Tensor] = lambda logprobs_T: logprobs_T


def pack_completions(
    prompts: Sequence[list[int]],
    groups: Sequence[Sequence[list[int]]],
    device: torch.device,
    *,
    is_shared: Sequence[bool] | None = None,
    cutoffs: Sequence[float] | None = None,
    multiple_of: int = 1,
) -> PackedCompletions:
    """Pack prompts and their groups of completions; no prompt and no completion is empty.

    is_shared:   for each group, True where its prompt is run once (the default), False where with each completion
    multiple_of: the number of tokens is a multiple of this, by filler tokens that no other sees

    >>> packed = pack_completions([[5, 6], [4]], [[[7, 8], [9]], [[1, 2]]], torch.device("cpu"))
    >>> packed.input_ids.tolist(), packed.predictors.tolist(), packed.targets.tolist()
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
    if num_padding := -len(input_ids) % multiple_of:
        input_ids += [0] * num_padding
        spans.append((num_padding, []))
    flat = [completion for completions in groups for completion in completions]
    return PackedCompletions(
        input_ids=torch.tensor([input_ids], device=device),
        layout=PackedGroups(spans, device),
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor([token for completion in flat for token in completion], device=device),
        lengths=torch.tensor([len(completion) for completion in flat], device=device),
        num_chunks=count_chunks(len(predictors)),
        cutoffs=None if cutoffs is None else torch.tensor(cutoffs, device=device),
    )


def count_chunks(num_tokens: int) -> int:
    """Number of chunks in which the LM head scores so many tokens."""
    return max(1, math.ceil(num_tokens / TOKENS_PER_CHUNK))


class CompletionLogprobs(nn.Module):
    """A policy as a function from packed completions to log-probabilities.

    It is a module so that a wrapper (data parallel, DeepSpeed) wraps this one call with all its uses of the weights.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        temperature: float,
        num_tokens: int,
        logit_bytes_at_once: int | None = None,
        fused_lm_head: bool = False,
    ) -> None:
        """Wrap a policy.

        temperature:         divides the logits, as in sampling
        num_tokens:          ids that can be sampled, the tokenizer's; the distribution is over those, as in sampling
        logit_bytes_at_once: bytes of logits that are worked on at the same time; None: `LOGIT_BYTES_AT_ONCE`
        fused_lm_head:       compute head and log-probabilities by `fused_logprobs`, which has no cutoffs
        """
        super().__init__()
        self.policy = policy
        self.config = policy.config  # Accelerate derives the sizes of ZeRO-3's gathers from it
        self.temperature = temperature
        self.num_tokens = num_tokens
        self.logit_bytes_at_once = logit_bytes_at_once
        self.fused_lm_head = fused_lm_head

    @cached_property
    def pass_cost(self) -> PassCost:
        """Cost of one pass, by which completions are packed."""
        decoder, _ = decoder_and_head(self.policy)
        return PassCost.of(decoder)

    def forward(self, packed: PackedCompletions) -> Tensor:
        """Log-probability of each completion token at the sampling temperature -> [T], float32."""
        decoder, _ = decoder_and_head(self.policy)
        hidden_SD = run_decoder(decoder, packed.input_ids, packed.layout.position_ids, packed.layout)[0]
        arguments = (hidden_SD.index_select(0, packed.predictors), packed.targets, packed.cutoffs)
        if packed.num_chunks == 1 or self.fused_lm_head:  # which has tiles instead of chunks
            return packed.put_together(self._score(*arguments))
        chunks = zip(*(_split(tensor, packed.num_chunks) for tensor in arguments), strict=True)
        logprobs = [checkpoint(self._score, *chunk, use_reentrant=False) for chunk in chunks]
        return packed.put_together(torch.cat(logprobs))

    def _score(self, hidden_TD: Tensor, targets_T: Tensor, cutoffs_T: Tensor | None) -> Tensor:
        _, head = decoder_and_head(self.policy)
        if self.fused_lm_head:
            assert cutoffs_T is None
            return fused_logprobs(
                cast(nn.Linear, head), hidden_TD, targets_T, temperature=self.temperature, num_tokens=self.num_tokens
            )
        logits_TV = head(hidden_TD)
        num_bytes = self.logit_bytes_at_once or LOGIT_BYTES_AT_ONCE[logits_TV.device.type]
        at_once = max(1, num_bytes // (4 * logits_TV.shape[1]))
        logprobs_T = TokenLogprobs.apply(logits_TV, targets_T, cutoffs_T, self.temperature, self.num_tokens, at_once)
        return cast(Tensor, logprobs_T)


def _split(tensor: Tensor | None, num_chunks: int) -> Sequence[Tensor | None]:
    return [None] * num_chunks if tensor is None else tensor.tensor_split(num_chunks)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(z / temperature)[target] over the first `num_tokens` logits z, for each of T tokens.

    With cutoffs the softmax is over the tokens whose log-probability is at least the target's plus the cutoff: the
    distribution of a policy that samples from its most likely tokens only, with that set of tokens held fixed.

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
        num_at_once: int,
    ) -> Tensor:
        """Return [T], float32. `logits_TV` belongs to this function from here on; it is empty where T is 0."""
        chosen_T = logits_TV.gather(1, targets_T[:, None])[:, 0].float() / temperature
        lowest_T = None if cutoffs_T is None else chosen_T + cutoffs_T
        # The normalizer is highest_T + log_sums_T. Added up in float32 they have an error of 1e-6, as has a float32 sum
        # over the vocabulary: as much as 1 - p of a sure token.
        highest_T, log_sums_T = torch.empty_like(chosen_T), torch.empty_like(chosen_T)
        for chunk in _slices(len(logits_TV), num_at_once):
            scaled = logits_TV[chunk, :num_tokens].float()
            if temperature != 1:
                scaled = scaled / temperature
            if lowest_T is not None:
                scaled = scaled.masked_fill(scaled < lowest_T[chunk, None], -torch.inf)
            highest_T[chunk] = scaled.amax(dim=1)
            log_sums_T[chunk] = (scaled - highest_T[chunk, None]).exp_().sum(dim=1, dtype=torch.float64).log_().float()
        logprobs_T = chosen_T - highest_T - log_sums_T
        ctx.save_for_backward(logits_TV, targets_T, highest_T, log_sums_T, lowest_T, logprobs_T)
        ctx.temperature, ctx.num_tokens, ctx.num_at_once = temperature, num_tokens, num_at_once
        return logprobs_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the logits, in their storage."""
        logits_TV, targets_T, highest_T, log_sums_T, lowest_T, logprobs_T = ctx.saved_tensors
        scaled_T = gradients[0] / ctx.temperature
        factors_T1 = (-scaled_T * (-log_sums_T).exp())[:, None]
        at_targets_T1 = (-scaled_T * logprobs_T.expm1())[:, None]  # 1 - p, without its rounding error near p = 1
        for chunk in _slices(len(logits_TV), ctx.num_at_once):
            logits = logits_TV[chunk, : ctx.num_tokens]
            scaled = logits.float()  # in float32 the logits themselves
            if ctx.temperature != 1:
                scaled.div_(ctx.temperature)
            if lowest_T is not None:
                scaled.masked_fill_(scaled < lowest_T[chunk, None], -torch.inf)
            scaled.sub_(highest_T[chunk, None]).exp_().mul_(factors_T1[chunk])  # -p * gradient / temperature
            scaled.scatter_(1, targets_T[chunk, None], at_targets_T1[chunk])
            if scaled.dtype != logits.dtype:
                logits.copy_(scaled)
        logits_TV[:, ctx.num_tokens :] = 0
        return logits_TV, None, None, None, None, None


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, length, size))


Reference = Callable[[PackedCompletions], Tensor]


def make_reference(
    accelerator: Accelerator,
    model: CompletionLogprobs,
    config: RLOOConfig,
    load_again: Callable[[], Policy] | None = None,
    *,
    continues_adapter: bool = False,
) -> Reference | None:
    """Return log-probabilities under the policy that the run begins with; None where beta is 0.

    With a new adapter that policy is the model without it and costs no memory; with an adapter that the run continues,
    or with `lora.bias`, which trains the model's own biases, it is the model with a copy of all that is trained.
    Otherwise it is a copy of the policy, or under ZeRO-3, where a copy would be of shards, the result of `load_again`,
    sharded likewise. It computes in the policy's arithmetic, so that rounding is no KL.
    """
    if config.beta == 0:
        return None
    policy = model.policy
    initial: nn.Module
    if isinstance(policy, PeftModel):
        initial = model
    elif load_again is not None and zero_stage(accelerator) == 3:
        second = load_again()
        if config.cast_lm_head_to_fp32:
            compute_head_in_float32(second)
        again = CompletionLogprobs(
            second, temperature=model.temperature, num_tokens=model.num_tokens, fused_lm_head=model.fused_lm_head
        )
        initial = frozen(accelerator, again)
    else:
        initial = frozen(accelerator, copy.deepcopy(model))

    first = None
    if continues_adapter or (isinstance(policy, PeftModel) and vars(policy.peft_config["default"])["bias"] != "none"):
        first = {name: parameter.detach().clone() for name, parameter in trained_of(policy)}

    # A prepared model autocasts its own forward; this call does not go through it. DeepSpeed has cast the weights.
    arithmetic = nullcontext if zero_stage(accelerator) else accelerator.autocast

    def as_initial() -> AbstractContextManager[None]:
        if first is not None:
            return replaced(trained_of(policy), first)
        return policy.disable_adapter() if isinstance(policy, PeftModel) else nullcontext()

    def reference_logprobs(packed: PackedCompletions) -> Tensor:
        with torch.no_grad(), as_initial(), arithmetic():
            scored: Tensor = initial(replace(packed, cutoffs=None))  # over every token, whatever the sampler filtered
            return scored

    return reference_logprobs
