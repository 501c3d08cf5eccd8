"""Tensors and the default loss, for tests of trainer/rloo/loss.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.loss import LossDenominators, LossInputs, policy_loss


def doubles(values: Sequence[float | Sequence[float]]) -> Tensor:
    """Return a float64 tensor of the values."""
    return torch.tensor(values, dtype=torch.float64)


def gradient(objective: Tensor, parameter: Tensor) -> Tensor:
    """Differentiate, and keep the graph."""
    return torch.autograd.grad(objective, parameter, retain_graph=True)[0]


def centered(rewards_PG: Tensor) -> Tensor:
    """Subtract the mean of each group."""
    return rewards_PG - rewards_PG.mean(dim=1, keepdim=True)


def loss_on_policy(
    logprobs_T: Tensor, advantages_N: Tensor, lengths_N: Tensor | None = None, num_completions: int | None = None
) -> Tensor:
    """Compute the loss of the default config on policy, where every ratio is 1; by default each length is 1."""
    lengths_N = torch.ones(len(advantages_N), dtype=torch.long) if lengths_N is None else lengths_N
    num_completions = len(advantages_N) if num_completions is None else num_completions
    batch = LossInputs(
        lengths=lengths_N,
        rewards=torch.full_like(advantages_N, torch.nan),  # the loss reads the advantages only
        is_in_loss=torch.ones_like(lengths_N, dtype=torch.bool),
        loss_mask=torch.ones_like(logprobs_T, dtype=torch.bool),
        sampler_logprobs=logprobs_T.detach(),
        old_logprobs=logprobs_T.detach(),
        advantages=advantages_N,
    )
    denominators = LossDenominators(num_completions=num_completions, num_tokens=0)
    loss, _ = policy_loss(batch, logprobs_T, RLOOConfig(max_steps=1), denominators)
    return loss
