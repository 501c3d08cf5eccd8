"""The objective of RLOO, on one page (Ahmadian et al., "Back to Basics", arXiv 2402.14740).

For a prompt x with completions y_1 … y_k sampled from the policy, and R_i the reward of y_i,

    R_i = r(x, y_i) - beta * KL_i            KL_i = log pi(y_i|x) - log ref(y_i|x), a sum over tokens, detached
    A_i = R_i - mean of R_j over j != i      the leave-one-out baseline
    L   = - mean over i of A_i * log pi(y_i|x)

log pi(y|x) is the sum over the completion's tokens: with variable lengths only the sum gives the gradient of the
expected reward. KL_i inside the reward is the k1 estimator; its gradient through the baseline is that of beta * KL.

Shapes: P prompts, G completions a prompt, N = P * G completions, T tokens of all completions laid end to end.
An unscorable completion has reward nan: it is in nobody's baseline, has advantage 0 and counts in no mean.
"""

import torch
from torch import Tensor


def sequence_sums(values_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Sum a value per token over each completion -> [N]."""
    owners_T = torch.repeat_interleave(torch.arange(len(lengths_N), device=values_T.device), lengths_N)
    return values_T.new_zeros(len(lengths_N)).index_add(0, owners_T, values_T)


def regularised_rewards(rewards_PG: Tensor, kl_PG: Tensor, beta: float) -> Tensor:
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


def policy_gradient_loss(logprobs_N: Tensor, advantages_N: Tensor, num_scorable: int) -> Tensor:
    """Loss whose gradient is the REINFORCE estimate.

    logprobs_N:   log pi(y|x), summed over the sequence, with gradient
    num_scorable: scorable completions of the whole step, on all processes and in all micro-batches; the denominator
    """
    return -(advantages_N.detach() * logprobs_N).sum() / max(num_scorable, 1)
