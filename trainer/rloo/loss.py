"""The objective of RLOO: everything that is differentiated (Ahmadian et al., "Back to Basics", arXiv 2402.14740).

For a prompt x with completions y_1 … y_k sampled from the policy, and r_i the reward of y_i,

    R_i = r_i - beta * KL_i                  KL_i = log pi(y_i|x) - log ref(y_i|x), a sum over tokens, detached
    A_i = R_i - mean of R_j over j != i      the leave-one-out baseline
    L   = - mean over i of s_i               s_i = rho_i * A_i      rho_i = pi(y_i|x) / old(y_i|x)

`old` is the policy that sampled. By default a batch is used for one update, so pi is old: rho_i is 1 and its gradient
is that of log pi(y_i|x), the sum over the completion's tokens. With variable lengths only the sum gives the gradient of
the expected reward. KL_i inside the reward is the k1 estimator; its gradient through the baseline is that of beta * KL.
Everything else in this file is an option of the recipe and off by default.

Shapes: P prompts, G completions per prompt, N completions, T tokens of all completions laid end to end.
An unscorable completion has reward nan: it is in no baseline, has advantage 0 and counts in no mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rekatrain.trainer.rloo.config import RLOOConfig

Level = Literal["sequence", "token"]
LossType = Literal["sequence_sum", "sequence_mean", "token_mean"]


@dataclass(frozen=True, kw_only=True)
class LossDenominators:
    """Completions and tokens in the loss of a whole step, counted over all processes and micro-batches."""

    num_completions: int
    num_tokens: int


@dataclass(kw_only=True, eq=False)
class LossInputs:
    """Tensors of some completions that their loss is computed from.

    lengths:            tokens of each completion, [N]
    rewards:            [N], nan where unscorable
    is_in_loss:         [N]
    loss_mask:          [T], False on tokens that were forced on the policy
    sampler_logprobs:   [T], recorded when the tokens were drawn

    Set once, and the same for all updates of the batch:
    reference_logprobs: [T], None without a reference
    old_logprobs:       [T], of the policy that sampled, in the trainer's arithmetic
    advantages:         [N]

    Set by each update:
    clip_ratio:         fraction of each completion's importance ratios that were clipped, [N]
    """

    lengths: Tensor
    rewards: Tensor
    is_in_loss: Tensor
    loss_mask: Tensor
    sampler_logprobs: Tensor
    reference_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    clip_ratio: Tensor | None = None

    def sums(self, values_T: Tensor) -> Tensor:
        """Sum over the trained tokens of each completion -> [N]."""
        return sequence_sums(values_T * self.loss_mask, self.lengths)

    @property
    def kl(self) -> Tensor | None:
        """KL_i, the k1 estimate at the time of sampling, in nats per completion -> [N]; None without a reference."""
        if self.old_logprobs is None or self.reference_logprobs is None:
            return None
        return self.sums(self.old_logprobs - self.reference_logprobs)


# ---- Advantages


def set_advantages(batches: Sequence[LossInputs], config: RLOOConfig) -> None:
    """Set the advantages of batches that together hold whole groups, in order; after the KL is known."""
    rewards_PG = torch.cat([batch.rewards for batch in batches]).view(-1, config.num_generations)
    if config.beta and config.kl_placement == "reward":
        kl_N = torch.cat([batch.kl for batch in batches if batch.kl is not None])
        rewards_PG = kl_penalized_rewards(rewards_PG, kl_N.view_as(rewards_PG), config.beta)
    advantages = leave_one_out_advantages(rewards_PG).flatten().split([len(batch.rewards) for batch in batches])
    for batch, advantages_N in zip(batches, advantages, strict=True):
        batch.advantages = torch.where(batch.is_in_loss, advantages_N, 0.0)


def kl_penalized_rewards(rewards_PG: Tensor, kl_PG: Tensor, beta: float) -> Tensor:
    """R = r - beta * KL; `kl_PG` is a sum over the sequence and carries no gradient."""
    return rewards_PG - beta * kl_PG.detach()


def leave_one_out_advantages(rewards_PG: Tensor) -> Tensor:
    """Each reward minus the mean of the other scorable rewards of its group -> [P, G].

    >>> leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])

    Where only one completion of a group is scorable there is nothing to compare it with: its advantage is 0.
    """
    is_scorable = ~rewards_PG.isnan()
    rewards = rewards_PG.nan_to_num(0.0)
    num_others = is_scorable.sum(dim=1, keepdim=True) - 1
    baselines = (rewards.sum(dim=1, keepdim=True) - rewards) / num_others.clamp(min=1)
    return torch.where(is_scorable & (num_others > 0), rewards - baselines, 0.0)


# ---- The loss


def policy_loss(
    batch: LossInputs, logprobs_T: Tensor, config: RLOOConfig, denominators: LossDenominators
) -> tuple[Tensor, Tensor]:
    """Return a micro-batch's part of the step's loss, and the clipped fraction of each completion [N].

    logprobs_T: of the policy in training, with gradient; `batch` holds all that has none

    Summed over the micro-batches of all processes, the losses give L of the head of this file.
    """
    assert batch.old_logprobs is not None and batch.advantages is not None
    # s_i: the importance ratios to the policy that sampled, times the advantage; clipped from the second update on.
    surrogates, is_clipped = clipped_surrogates(
        (logprobs_T - batch.old_logprobs) * batch.loss_mask,
        batch.advantages,
        batch.lengths,
        level=config.importance_sampling_level,
        epsilon=config.epsilon if config.num_iterations > 1 else torch.inf,
    )
    # Weights for a sampler whose arithmetic, or whose weights, differ from the trainer's; by token or by sequence.
    correction, weights = config.importance_sampling_correction or "", importance_weights(batch, config)
    if weights is not None and correction.startswith("token"):
        surrogates = surrogates * weights
    num_trained_N = batch.sums(torch.ones_like(logprobs_T))
    if config.importance_sampling_level == "token":
        surrogates, is_clipped = batch.sums(surrogates), batch.sums(is_clipped.float()) / num_trained_N.clamp(min=1)
    if weights is not None and correction.startswith("sequence"):
        surrogates = surrogates * weights
    # The mean over the step, by the loss type.
    weights_N = sequence_weights(
        num_trained_N,
        config.loss_type,
        num_completions=denominators.num_completions,
        num_tokens=denominators.num_tokens,
    )
    loss = -(surrogates * weights_N).sum()
    if config.beta and config.kl_placement == "loss":
        assert batch.reference_logprobs is not None
        penalties_N = k2_loss(batch.sums(logprobs_T - batch.reference_logprobs), config.beta)
        loss = loss + (penalties_N * batch.is_in_loss).sum() / max(denominators.num_completions, 1)
    return loss, is_clipped.float()


def clipped_surrogates(
    log_ratios_T: Tensor, advantages_N: Tensor, lengths_N: Tensor, *, level: Level, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return what each ratio adds to the objective, and whether the clip decides it; both [N] or [T], by level.

        sequence:  s_i = min(rho_i A_i, clip(rho_i, 1 - epsilon, 1 + epsilon) A_i)        rho_i of the whole sequence
        token:     s_t = min(rho_t A_i, clip(rho_t, 1 - epsilon, 1 + epsilon) A_i)        rho_t of each token

    log_ratios_T: log pi - log old of each token, with gradient (PPO, arXiv 1707.06347; by sequence, arXiv 2507.18071)
    """
    if level == "token":
        log_ratios, advantages = log_ratios_T, advantages_N[completion_of_token(lengths_N)]
    else:
        log_ratios, advantages = sequence_sums(log_ratios_T, lengths_N), advantages_N
    ratios = log_ratios.exp()
    free, clipped = ratios * advantages, ratios.clamp(1 - epsilon, 1 + epsilon) * advantages
    return torch.minimum(free, clipped), free > clipped


def importance_weights(batch: LossInputs, config: RLOOConfig) -> Tensor | None:
    """Return the weights of the correction for the sampler, by token [T] or by sequence [N]; None without one."""
    correction, cap = config.importance_sampling_correction, config.importance_sampling_cap
    if correction is None:
        return None
    assert batch.old_logprobs is not None
    mismatch = batch.old_logprobs - batch.sampler_logprobs
    if correction.startswith("sequence"):
        mismatch = batch.sums(mismatch)
    weights = truncated_importance_weights(mismatch, cap)
    if correction.endswith("mask"):  # what the policy now finds that much likelier is left out, not cut to the cap
        weights = torch.where(mismatch > math.log(cap), 0.0, weights)
    return weights


def truncated_importance_weights(log_ratios: Tensor, cap: float) -> Tensor:
    """min(pi / sampler, cap), detached: corrects for a sampler whose probabilities are not the trainer's.

    log_ratios: log pi - log sampler, of tokens [T] or summed over sequences [N] (arXiv 2508.03351 caps at 2)
    """
    return log_ratios.detach().exp().clamp(max=cap)


def sequence_weights(lengths_N: Tensor, loss_type: LossType, *, num_completions: int, num_tokens: int) -> Tensor:
    """Weight of each completion's sum over tokens in the loss -> [N], float64 as counts are.

        sequence_sum:   1 / num_completions              the paper's
        sequence_mean:  1 / (length * num_completions)
        token_mean:     1 / num_tokens

    num_completions, num_tokens: those in the loss of the whole step, over all processes and micro-batches
    """
    if loss_type == "token_mean":
        return torch.full_like(lengths_N, 1 / max(num_tokens, 1), dtype=torch.float64)
    weights_N = torch.full_like(lengths_N, 1 / max(num_completions, 1), dtype=torch.float64)
    return weights_N / lengths_N.clamp(min=1) if loss_type == "sequence_mean" else weights_N


def k2_loss(log_ratios_N: Tensor, beta: float) -> Tensor:
    """beta / 2 * (log pi(y|x) - log ref(y|x))^2, whose expected gradient on policy is that of beta * KL -> [N].

    The log-ratio is the sum over the sequence, and the step's loss takes the mean over completions, by any loss type.
    """
    return beta / 2 * log_ratios_N.square()


# ---- Sums over tokens


def sequence_sums(values_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Sum a value per token over each completion -> [N]."""
    return values_T.new_zeros(len(lengths_N)).index_add(0, completion_of_token(lengths_N), values_T)


def completion_of_token(lengths_N: Tensor) -> Tensor:
    """Index of the completion that each token belongs to -> [T]."""
    return torch.repeat_interleave(torch.arange(len(lengths_N), device=lengths_N.device), lengths_N)
