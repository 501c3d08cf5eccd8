"""Micro-batches: completions laid out for the model, with what the first pass over them leaves for their loss.

Shapes: N completions of a micro-batch, T tokens of theirs laid end to end, k completions a prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.logprobs import PackedCompletions, pack_completions
from rekatrain.trainer.rloo.loss import (
    clipped_surrogates,
    k2_loss,
    kl_penalized_rewards,
    leave_one_out_advantages,
    sequence_sums,
    sequence_weights,
    truncated_importance_weights,
)
from rekatrain.trainer.rloo.packing import PassCost, pack
from rekatrain.trainer.rloo.rollouts import Group
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossDenominators:
    """Denominators of a step's loss, counted over all processes and micro-batches."""

    num_completions: int
    num_tokens: int


@dataclass(kw_only=True, eq=False)
class MicroBatch:
    """Completions of one forward and backward.

    members:          group and place of each completion, [N]
    is_split:         whether it holds a part of a group whose other part is elsewhere
    rewards:          [N], nan where unscorable
    is_in_loss:       [N]
    sampler_logprobs: [T], recorded when the tokens were drawn
    is_trained:       [T], false on tokens that were forced on the policy

    Set by the first pass, and the same for all updates of the batch:
    old_logprobs:     [T], of the policy that sampled, in the trainer's arithmetic
    reference_logprobs: [T], None without a reference
    advantages:       [N]
    clipped:          share of each completion that the clip held in the last update, [N]
    """

    members: list[tuple[Group, int]]
    is_split: bool
    rows: PackedCompletions
    rewards: Tensor
    is_in_loss: Tensor
    sampler_logprobs: Tensor
    is_trained: Tensor
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    clipped: Tensor = field(default_factory=lambda: torch.empty(0))

    def sums(self, values_T: Tensor) -> Tensor:
        """Sums over the trained tokens of each completion -> [N]."""
        return sequence_sums(values_T * self.is_trained, self.rows.lengths)

    @property
    def kl(self) -> Tensor | None:
        """log pi - log ref of each completion when it was sampled, [N]; None without a reference."""
        if self.old_logprobs is None or self.reference_logprobs is None:
            return None
        return self.sums(self.old_logprobs - self.reference_logprobs)


def make_microbatches(
    groups: Sequence[Group], budget: int, cost: PassCost, device: torch.device
) -> Iterator[MicroBatch]:
    """Lay groups out in micro-batches of at most `budget` tokens."""
    lengths = [(len(group.prompt.ids), [len(c.ids) - 1 for c in group.completions]) for group in groups]
    for pieces in pack(lengths, budget, cost):
        members = [(groups[piece.group], place) for piece in pieces for place in piece.members]
        completions = [group.completions[place] for group, place in members]
        is_trained = [place not in c.forced for c in completions for place in range(len(c.ids))]
        has_cutoffs = any(completion.cutoffs for completion in completions)
        yield MicroBatch(
            members=members,
            is_split=any(len(piece.members) < len(groups[piece.group].completions) for piece in pieces),
            rows=pack_completions(
                [groups[piece.group].prompt.ids for piece in pieces],
                [[groups[piece.group].completions[place].ids for place in piece.members] for piece in pieces],
                device,
                is_shared=[piece.is_shared for piece in pieces],
                cutoffs=[cutoff for completion in completions for cutoff in completion.cutoffs]
                if has_cutoffs
                else None,
            ),
            rewards=torch.tensor([group.rewards[place] for group, place in members], device=device),
            is_in_loss=torch.tensor([group.is_in_loss[place] for group, place in members], device=device),
            sampler_logprobs=torch.tensor([logprob for c in completions for logprob in c.logprobs], device=device),
            is_trained=torch.tensor(is_trained, device=device),
        )


def equal_passes(accelerator: Accelerator, batches: Sequence[MicroBatch], some_token: int) -> list[MicroBatch]:
    """As many micro-batches on every process, in as many pieces each: under ZeRO their passes are exchanges.

    What a process has too few of is filled up with single tokens that are in no loss.
    """
    numbers: list[list[int]] = gather_object([[batch.rows.num_chunks for batch in batches]])
    most = [max(of_place) for of_place in zip_longest(*numbers, fillvalue=1)]
    filled = [*batches, *(_filler(some_token, accelerator.device) for _ in most[len(batches) :])]
    for batch, num_chunks in zip(filled, most, strict=True):
        batch.rows = replace(batch.rows, num_chunks=num_chunks)
    return filled


def _filler(token: int, device: torch.device) -> MicroBatch:
    return MicroBatch(
        members=[],
        is_split=False,
        rows=pack_completions([[token]], [[[token]]], device),
        rewards=torch.full((1,), torch.nan, device=device),
        is_in_loss=torch.zeros(1, dtype=torch.bool, device=device),
        sampler_logprobs=torch.zeros(1, device=device),
        is_trained=torch.zeros(1, dtype=torch.bool, device=device),
        advantages=torch.zeros(1, device=device),
    )


def set_advantages(batches: Sequence[MicroBatch], config: RLOOConfig) -> None:
    """Advantages of batches that hold their groups whole between them, with the KL where it belongs in the reward."""
    if not batches:
        return
    rewards_PG = torch.cat([batch.rewards for batch in batches]).view(-1, config.num_generations)
    if config.beta and config.kl_placement == "reward":
        kl_N = torch.cat([batch.kl for batch in batches if batch.kl is not None])
        rewards_PG = kl_penalized_rewards(rewards_PG, kl_N.view_as(rewards_PG), config.beta)
    advantages = leave_one_out_advantages(rewards_PG).flatten().split([len(batch.members) for batch in batches])
    for batch, advantages_N in zip(batches, advantages, strict=True):
        batch.advantages = torch.where(batch.is_in_loss, advantages_N, 0.0)


def batch_loss(batch: MicroBatch, logprobs_T: Tensor, config: RLOOConfig, totals: LossDenominators) -> Tensor:
    """The part of a step's loss that lies in a micro-batch; `logprobs_T` are the policy's, with gradient."""
    assert batch.old_logprobs is not None
    lengths_N = batch.rows.lengths
    log_ratios_T = (logprobs_T - batch.old_logprobs) * batch.is_trained
    surrogates, is_clipped = clipped_surrogates(
        log_ratios_T,
        batch.advantages,
        lengths_N,
        level=config.importance_sampling_level,
        epsilon=config.epsilon if config.num_iterations > 1 else torch.inf,
    )
    mismatch_T = batch.old_logprobs - batch.sampler_logprobs
    if config.importance_sampling_correction == "token_truncate":
        surrogates = surrogates * truncated_importance_weights(mismatch_T, config.importance_sampling_cap)
    trained_N = batch.sums(torch.ones_like(logprobs_T))
    if config.importance_sampling_level == "token":
        surrogates, is_clipped = batch.sums(surrogates), batch.sums(is_clipped.float()) / trained_N.clamp(min=1)
    if config.importance_sampling_correction == "sequence_truncate":
        surrogates = surrogates * truncated_importance_weights(batch.sums(mismatch_T), config.importance_sampling_cap)
    weights_N = sequence_weights(
        trained_N, config.loss_type, num_completions=totals.num_completions, num_tokens=totals.num_tokens
    )
    batch.clipped = is_clipped.float()
    loss = -(surrogates * weights_N).sum()
    if config.beta and config.kl_placement == "loss":
        assert batch.reference_logprobs is not None
        penalties_N = k2_loss(batch.sums(logprobs_T - batch.reference_logprobs), config.beta)
        loss = loss + (penalties_N * batch.is_in_loss).sum() / max(totals.num_completions, 1)
    return loss
