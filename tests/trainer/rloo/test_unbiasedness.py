"""Tests of trainer/rloo/loss.py: RLOO gives the gradient of the expected reward.

The policies are small enough to enumerate everything that they can draw, in float64.
"""

import copy
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaForCausalLM

from rekatrain.data.chat import FinishReason
from rekatrain.data.rows import Row
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.group import Group
from rekatrain.trainer.rloo.kernels.cpu import PassCost
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs
from rekatrain.trainer.rloo.loss import (
    LossDenominators,
    clipped_surrogates,
    k2_loss,
    kl_penalized_rewards,
    leave_one_out_advantages,
    policy_loss,
    sequence_weights,
    set_advantages,
)
from rekatrain.trainer.rloo.microbatch import make_microbatches
from rekatrain.trainer.rloo.sampler.in_process import Completion
from tests.helpers.loss import centered, doubles, gradient, loss_on_policy
from tests.helpers.rloo import distance, perturb

BETA = 0.1
GROUP_SIZES = [2, 3, 4]

REWARDS = doubles([1, 0, 0.5, 2, -1])
REFERENCE_LOGPROBS = torch.log_softmax(doubles([0.1, 0.1, -0.3, 0.4, 0]), dim=0)


@pytest.fixture
def theta() -> Tensor:
    """Logits of a policy over five actions."""
    return doubles([0.3, -0.2, 0.5, 0, -0.7]).requires_grad_()


def expected_gradient(
    theta: Tensor, rewards: Tensor, group_size: int, advantages: Callable[[Tensor], Tensor] = leave_one_out_advantages
) -> Tensor:
    """Compute the mean ascent direction of a step on one group, over all 5^k groups that can be drawn."""
    logprobs = torch.log_softmax(theta, dim=0)
    draws_PG = torch.cartesian_prod(*[torch.arange(len(theta))] * group_size)
    probabilities_P1 = logprobs.detach()[draws_PG].sum(dim=1, keepdim=True).exp()
    # The loss is linear in the advantages, so they can be multiplied by the probability of a draw.
    weighted_PG = advantages(rewards[draws_PG]) * probabilities_P1
    return -gradient(loss_on_policy(logprobs[draws_PG].flatten(), weighted_PG.flatten(), None, group_size), theta)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_expected_gradient_is_that_of_the_expected_reward(theta: Tensor, group_size: int) -> None:
    exact = gradient((theta.softmax(dim=0) * REWARDS).sum(), theta)
    assert (expected_gradient(theta, REWARDS, group_size) - exact).abs().max() <= 5e-16


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_mean_baseline_shrinks_the_gradient_by_one_over_k(theta: Tensor, group_size: int) -> None:
    exact = gradient((theta.softmax(dim=0) * REWARDS).sum(), theta)
    shrunk = expected_gradient(theta, REWARDS, group_size, centered)
    torch.testing.assert_close(shrunk, exact * (group_size - 1) / group_size, rtol=0, atol=5e-16)


@pytest.mark.parametrize(("group_size", "cosine"), [(2, 0.965), (3, 0.973), (4, 0.982)])
def test_division_by_the_deviation_turns_the_gradient(theta: Tensor, group_size: int, cosine: float) -> None:
    def normalized(rewards_PG: Tensor) -> Tensor:
        return (leave_one_out_advantages(rewards_PG) / rewards_PG.std(dim=1, keepdim=True)).nan_to_num(0.0)

    exact = gradient((theta.softmax(dim=0) * REWARDS).sum(), theta)
    turned = expected_gradient(theta, REWARDS, group_size, normalized)
    assert torch.cosine_similarity(turned, exact, dim=0).item() == pytest.approx(cosine, abs=5e-4)


def regularized_gradient(theta: Tensor) -> Tensor:
    """Differentiate E[r] - beta * KL as the sum over the five actions."""
    logprobs = torch.log_softmax(theta, dim=0)
    return gradient((logprobs.exp() * (REWARDS - BETA * (logprobs - REFERENCE_LOGPROBS))).sum(), theta)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_kl_penalized_rewards_give_the_gradient_of_the_kl(theta: Tensor, group_size: int) -> None:
    exact = regularized_gradient(theta)
    stated = doubles([0.075987, -0.100282, -0.080938, 0.255769, -0.150536])
    torch.testing.assert_close(exact, stated, rtol=0, atol=5e-7)

    log_ratios = torch.log_softmax(theta, dim=0) - REFERENCE_LOGPROBS  # it has a gradient, which the reward must detach
    rewards = kl_penalized_rewards(REWARDS, log_ratios, BETA)
    assert not rewards.requires_grad
    assert (expected_gradient(theta, rewards, group_size) - exact).abs().max() <= 1e-15


@pytest.mark.parametrize(
    ("estimate", "error"),
    [(lambda ratio: ratio**2 / 2, 0.0155), (lambda ratio: torch.expm1(-ratio) + ratio, 0.0174)],
    ids=["k2", "k3"],
)
def test_kl_penalized_rewards_with_k2_or_k3_are_biased(
    theta: Tensor, estimate: Callable[[Tensor], Tensor], error: float
) -> None:
    kl = estimate(torch.log_softmax(theta, dim=0) - REFERENCE_LOGPROBS)
    actual = expected_gradient(theta, kl_penalized_rewards(REWARDS, kl, BETA), 4)
    assert (actual - regularized_gradient(theta)).abs().max().item() == pytest.approx(error, abs=5e-5)


# A policy of two steps over the tokens a, b and stop. A completion that does not stop at once has two tokens, and its
# second token depends on its first. The published errors of the means (0.081, 0.064) are for a toy policy that is not
# specified; for this one they are larger. The sum has no error in both.
# For each completion: its reward, and the index of each of its tokens among the nine log-probabilities of the policy.
TWO_STEPS = {
    "stop": (0.2, [2]),
    "aa": (1.0, [0, 3]),
    "ab": (-1.0, [0, 4]),
    "a.": (0.5, [0, 5]),
    "ba": (2.0, [1, 6]),
    "bb": (0.0, [1, 7]),
    "b.": (-0.5, [1, 8]),
}


def two_step_gradients() -> dict[str, Tensor]:
    """Return the expected gradient on groups of two for each type of the loss, and the exact one."""
    logits = doubles([[0.3, -0.2, 0.1], [0.6, -0.4, 0.0], [-0.5, 0.2, 0.4]]).requires_grad_()
    token_logprobs = torch.log_softmax(logits, dim=1).flatten()
    rewards_Y = doubles([reward for reward, _ in TWO_STEPS.values()])
    tokens_Y = [torch.tensor(tokens) for _, tokens in TWO_STEPS.values()]
    logprobs_Y = torch.stack([token_logprobs[tokens].sum() for tokens in tokens_Y])

    gradients = {"exact": gradient((logprobs_Y.exp() * rewards_Y).sum(), logits)}
    for loss_type in ("sequence_sum", "sequence_mean", "token_mean"):
        losses = []
        for pair in itertools.product(range(len(TWO_STEPS)), repeat=2):
            logprobs_T = token_logprobs[torch.cat([tokens_Y[y] for y in pair])]
            lengths_N = torch.tensor([len(tokens_Y[y]) for y in pair])
            surrogates_N, _ = clipped_surrogates(
                logprobs_T - logprobs_T.detach(),
                leave_one_out_advantages(rewards_Y[list(pair)][None])[0],
                lengths_N,
                level="sequence",
                epsilon=torch.inf,
            )
            weights_N = sequence_weights(lengths_N, loss_type, num_completions=2, num_tokens=int(lengths_N.sum()))
            probability = logprobs_Y[list(pair)].sum().exp().detach()
            losses.append(-probability * (surrogates_N * weights_N).sum())
        gradients[loss_type] = -gradient(torch.stack(losses).sum(), logits)
    return gradients


def test_sequence_weights_are_exact_for_sequence_sum_only() -> None:
    gradients = two_step_gradients()
    errors = {name: (actual - gradients["exact"]).abs().max().item() for name, actual in gradients.items()}
    assert errors["sequence_sum"] <= 1e-12
    assert errors["sequence_mean"] > 1e-2
    assert errors["token_mean"] > 1e-2


def log_ratios_to_reference(theta: Tensor) -> Tensor:
    """Return log pi - log ref of each action -> [5]."""
    return torch.log_softmax(theta, dim=0) - REFERENCE_LOGPROBS


def test_k2_loss_alone_has_the_gradient_of_the_kl(theta: Tensor) -> None:
    probabilities = theta.softmax(dim=0).detach()
    logprobs = torch.log_softmax(theta, dim=0)
    exact = gradient(BETA * (logprobs.exp() * (logprobs - REFERENCE_LOGPROBS)).sum(), theta)
    assert exact.norm() > 0.01
    log_ratios = log_ratios_to_reference(theta)
    # The probabilities of the draws are constants; only the log-ratios have a gradient.
    k2 = gradient((probabilities * k2_loss(log_ratios, BETA)).sum(), theta)
    assert (k2 - exact).abs().max() <= 1e-16
    for estimate in (log_ratios, torch.expm1(-log_ratios) + log_ratios):
        assert (gradient(BETA * (probabilities * estimate).sum(), theta) - exact).abs().max() > 1e-3


# A tiny Llama and the functions of a step. Two tokens and a stop make seven completions of one or two tokens; all pairs
# of them are enumerated.

PROMPT = [4, 5, 6]
COMPLETIONS = [[0], *([first, second] for first in (1, 2) for second in (0, 1, 2))]
LLAMA_REWARDS = [0.2, 1.0, -1.0, 0.5, 2.0, 0.0, -0.5]


def completion_logprobs(policy: LlamaForCausalLM) -> Tensor:
    """Compute log pi(y|x) of each completion by plain forward passes -> [7]."""
    sums = []
    for ids in COMPLETIONS:
        logits = policy(torch.tensor([PROMPT + ids]), use_cache=False).logits[0, len(PROMPT) - 1 : -1, :3]
        sums.append(logits.log_softmax(dim=1)[range(len(ids)), ids].sum())
    return torch.stack(sums)


def pair_group(pair: Sequence[int]) -> Group:
    """Make a group of two completions, given by their indices."""
    completions = [
        Completion(ids=COMPLETIONS[y], logprobs=[0.0] * len(COMPLETIONS[y]), finish_reason=FinishReason.STOP)
        for y in pair
    ]
    return Group(
        prompt_index=0,
        prompt=Prompt(text="", ids=PROMPT, row=Row(messages=[], where="")),
        completions=completions,
        texts=["", ""],
        rewards=[LLAMA_REWARDS[y] for y in pair],
        rewards_by_name={},
        reward_errors=[{}, {}],
        is_in_loss=[True, True],
    )


def expected_step(policy: LlamaForCausalLM, reference: LlamaForCausalLM, config: RLOOConfig) -> dict[str, Tensor]:
    """Compute the mean ascent direction of a step on one group, over all pairs that can be drawn."""
    scored, frozen = (CompletionLogprobs(each, temperature=1.0, num_tokens=3) for each in (policy, reference))
    probabilities = completion_logprobs(policy).detach().exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    policy.zero_grad()
    for pair in itertools.product(range(len(COMPLETIONS)), repeat=2):
        [batch] = make_microbatches(Accelerator(cpu=True), [pair_group(pair)], 10**6, PassCost.of(policy.model))
        logprobs_T = scored(batch.packed)
        batch.old_logprobs = logprobs_T.detach()
        batch.reference_logprobs = frozen(batch.packed).detach()
        set_advantages([batch], config)
        num_tokens = sum(len(COMPLETIONS[y]) for y in pair)
        denominators = LossDenominators(num_completions=2, num_tokens=num_tokens)
        loss, _ = policy_loss(batch, logprobs_T, config, denominators)
        (probabilities[list(pair)].prod() * loss).backward()
    return {name: -parameter.grad for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize(
    ("options", "is_exact"),
    [
        ({"beta": 0.0}, True),
        ({}, True),
        ({"kl_placement": "loss"}, True),
        ({"importance_sampling_level": "token"}, True),  # at ratio 1
        ({"loss_type": "sequence_mean"}, False),
        ({"loss_type": "token_mean"}, False),
    ],
    ids=["no kl", "k1", "k2", "token", "sequence mean", "token mean"],
)
def test_policy_loss_of_a_llama_has_the_exact_mean_gradient(
    model: LlamaForCausalLM, options: dict[str, object], is_exact: bool
) -> None:
    policy, reference = model.double(), copy.deepcopy(model).double()
    perturb(reference, scale=0.1)
    config = RLOOConfig(**{"max_steps": 1, "num_generations": 2, "beta": 0.3, **options})
    actual = expected_step(policy, reference, config)

    policy.zero_grad()
    logprobs_Y = completion_logprobs(policy)
    kl_Y = logprobs_Y - completion_logprobs(reference).detach()
    (logprobs_Y.exp() * (doubles(LLAMA_REWARDS) - config.beta * kl_Y)).sum().backward()
    exact = {name: parameter.grad for name, parameter in policy.named_parameters()}
    error = distance(actual, exact)
    # The log-probabilities of a float64 model are normalized in float32 too.
    assert error < 1e-5 if is_exact else error > 0.05
