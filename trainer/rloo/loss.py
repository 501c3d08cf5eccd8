"""The objective of RLOO, on one page (Ahmadian et al., "Back to Basics", arXiv 2402.14740).

For a prompt x with completions y_1 … y_k sampled from the policy, and r_i the reward of y_i,

    R_i = r_i - beta * KL_i                  KL_i = log pi(y_i|x) - log ref(y_i|x), a sum over tokens, detached
    A_i = R_i - mean of R_j over j != i      the leave-one-out baseline
    L   = - mean over i of s_i               s_i = rho_i * A_i      rho_i = pi(y_i|x) / old(y_i|x)

`old` is the policy that sampled. In the one update of a batch that is the default, pi is old: rho_i is 1 and the
gradient of rho_i is that of log pi(y_i|x), the sum over the completion's tokens. With variable lengths only the sum
gives the gradient of the expected reward. KL_i inside the reward is the k1 estimator; its gradient through the baseline
is that of beta * KL. What else there is on this page is an option of the recipe, and off by default.

Shapes: P prompts, G completions a prompt, N completions, T tokens of all completions laid end to end.
An unscorable completion has reward nan: it is in nobody's baseline, has advantage 0 and counts in no mean.
"""

from typing import Literal

import torch
from torch import Tensor

Level = Literal["sequence", "token"]
LossType = Literal["sequence_sum", "sequence_mean", "token_mean"]


def sequence_sums(values_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Sum a value per token over each completion -> [N]."""
    return values_T.new_zeros(len(lengths_N)).index_add(0, owners(lengths_N), values_T)


def owners(lengths_N: Tensor) -> Tensor:
    """The completion that each token belongs to -> [T]."""
    return torch.repeat_interleave(torch.arange(len(lengths_N), device=lengths_N.device), lengths_N)


def kl_penalized_rewards(rewards_PG: Tensor, kl_PG: Tensor, beta: float) -> Tensor:
    """Subtract the KL penalty from the rewards; `kl_PG` is a sequence sum and carries no gradient."""
    return rewards_PG - beta * kl_PG.detach()


def leave_one_out_advantages(rewards_PG: Tensor) -> Tensor:
    """Each reward minus the mean of the other scorable rewards of its group -> [P, G].

    >>> leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])

    A completion that is alone in being scorable has nothing to be compared with: its advantage is 0.
    """
    is_scorable = ~rewards_PG.isnan()
    rewards = rewards_PG.nan_to_num(0.0)
    num_others = is_scorable.sum(dim=1, keepdim=True) - 1
    baselines = (rewards.sum(dim=1, keepdim=True) - rewards) / num_others.clamp(min=1)
    return torch.where(is_scorable & (num_others > 0), rewards - baselines, 0.0)


def clipped_surrogates(
    log_ratios_T: Tensor, advantages_N: Tensor, lengths_N: Tensor, *, level: Level, epsilon: float
) -> tuple[Tensor, Tensor]:
    """What a completion adds to the objective when a batch is used again, and the share of it that is clipped.

        sequence:  s_i = min(rho_i A_i, clip(rho_i, 1 - epsilon, 1 + epsilon) A_i)        rho_i of the whole sequence
        token:     s_t = min(rho_t A_i, clip(rho_t, 1 - epsilon, 1 + epsilon) A_i)        rho_t of each token

    log_ratios_T: log pi - log old of each token, with gradient (PPO, arXiv 1707.06347; by sequence, arXiv 2507.18071)
    -> surrogates, [N] or [T] by level, and whether the clip holds, of the same shape
    """
    if level == "token":
        log_ratios, advantages = log_ratios_T, advantages_N[owners(lengths_N)]
    else:
        log_ratios, advantages = sequence_sums(log_ratios_T, lengths_N), advantages_N
    ratios = log_ratios.exp()
    free, held = ratios * advantages, ratios.clamp(1 - epsilon, 1 + epsilon) * advantages
    return torch.minimum(free, held), free > held


def truncated_importance_weights(log_ratios: Tensor, cap: float) -> Tensor:
    """min(pi / sampler, cap), detached: corrects for a sampler whose arithmetic is not the trainer's.

    log_ratios: log pi - log sampler, of tokens [T] or summed over sequences [N] (arXiv 2508.03351 caps at 2)
    """
    return log_ratios.detach().exp().clamp(max=cap)


def sequence_weights(lengths_N: Tensor, loss_type: LossType, *, num_completions: int, num_tokens: int) -> Tensor:
    """What each completion's sum over tokens counts for in the loss -> [N], float64 as counts are.

        sequence_sum:   1 / num_completions              the paper's
        sequence_mean:  1 / (length * num_completions)
        token_mean:     1 / num_tokens

    num_completions, num_tokens: those in the loss of the whole step, on all processes and in all micro-batches
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


def overlong_penalty(length: int, *, max_completion_length: int, buffer: int) -> float:
    """0 up to `buffer` tokens before the cap, then falling in a line to -1 at the cap (DAPO, arXiv 2503.14476, eq. 13).

    >>> overlong_penalty(90, max_completion_length=100, buffer=20)
    -0.5
    """
    return -max(0.0, (length - (max_completion_length - buffer)) / buffer)
