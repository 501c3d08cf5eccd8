"""The objective gives the gradient of the expected reward; policies small enough are enumerated, in float64."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.rloo.objective import (
    clipped_surrogates,
    k2_loss,
    leave_one_out_advantages,
    overlong_penalty,
    regularised_rewards,
    sequence_sums,
    sequence_weights,
    truncated_importance_weights,
)

NAN = math.nan
BETA = 0.1
GROUP_SIZES = [2, 3, 4]


def doubles(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


REWARDS = doubles([1, 0, 0.5, 2, -1])
REFERENCE_LOGPROBS = torch.log_softmax(doubles([0.1, 0.1, -0.3, 0.4, 0]), dim=0)


@pytest.fixture
def theta() -> Tensor:
    """Logits of a policy over five actions."""
    return doubles([0.3, -0.2, 0.5, 0, -0.7]).requires_grad_()


def gradient(objective: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(objective, parameter, retain_graph=True)[0]


def loss_on_policy(
    logprobs_T: Tensor, advantages_N: Tensor, lengths_N: Tensor | None = None, num_completions: int | None = None
) -> Tensor:
    """The default loss, as a step makes it of the functions on the page; lengths are 1 unless given."""
    lengths_N = torch.ones(len(advantages_N), dtype=torch.long) if lengths_N is None else lengths_N
    surrogates_N, _ = clipped_surrogates(
        logprobs_T - logprobs_T.detach(), advantages_N, lengths_N, level="sequence", epsilon=torch.inf
    )
    num_completions = len(advantages_N) if num_completions is None else num_completions
    weights_N = sequence_weights(lengths_N, "sequence_sum", num_completions=num_completions, num_tokens=0)
    return -(surrogates_N * weights_N).sum()


def expected_gradient(
    theta: Tensor, rewards: Tensor, group_size: int, advantages: Callable[[Tensor], Tensor] = leave_one_out_advantages
) -> Tensor:
    """Mean ascent direction of a step on one group, over all 5^k groups that can be drawn."""
    logprobs = torch.log_softmax(theta, dim=0)
    draws_PG = torch.cartesian_prod(*[torch.arange(len(theta))] * group_size)
    chances_P1 = logprobs.detach()[draws_PG].sum(dim=1, keepdim=True).exp()
    # The loss is linear in the advantages, so a draw's chance can be put there.
    weighted_PG = advantages(rewards[draws_PG]) * chances_P1
    return -gradient(loss_on_policy(logprobs[draws_PG].flatten(), weighted_PG.flatten(), None, group_size), theta)


def centred(rewards_PG: Tensor) -> Tensor:
    return rewards_PG - rewards_PG.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_expected_gradient_is_that_of_the_expected_reward(theta: Tensor, group_size: int) -> None:
    exact = gradient((theta.softmax(dim=0) * REWARDS).sum(), theta)
    assert (expected_gradient(theta, REWARDS, group_size) - exact).abs().max() <= 5e-16


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_mean_baseline_shrinks_the_gradient_by_one_over_k(theta: Tensor, group_size: int) -> None:
    exact = gradient((theta.softmax(dim=0) * REWARDS).sum(), theta)
    shrunk = expected_gradient(theta, REWARDS, group_size, centred)
    torch.testing.assert_close(shrunk, exact * (group_size - 1) / group_size, rtol=0, atol=5e-16)


@pytest.mark.parametrize(("group_size", "cosine"), [(2, 0.965), (3, 0.973), (4, 0.982)])
def test_dividing_by_the_standard_deviation_turns_the_gradient(theta: Tensor, group_size: int, cosine: float) -> None:
    def normalised(rewards_PG: Tensor) -> Tensor:
        return (leave_one_out_advantages(rewards_PG) / rewards_PG.std(dim=1, keepdim=True)).nan_to_num(0.0)

    exact = gradient((theta.softmax(dim=0) * REWARDS).sum(), theta)
    turned = expected_gradient(theta, REWARDS, group_size, normalised)
    assert torch.cosine_similarity(turned, exact, dim=0).item() == pytest.approx(cosine, abs=5e-4)


def regularised_gradient(theta: Tensor) -> Tensor:
    """Gradient of E[r] - beta * KL, by differentiating the sum over the five actions."""
    logprobs = torch.log_softmax(theta, dim=0)
    return gradient((logprobs.exp() * (REWARDS - BETA * (logprobs - REFERENCE_LOGPROBS))).sum(), theta)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_log_ratio_in_the_reward_and_in_the_baseline_gives_the_gradient_of_the_kl(
    theta: Tensor, group_size: int
) -> None:
    exact = regularised_gradient(theta)
    stated = doubles([0.075987, -0.100282, -0.080938, 0.255769, -0.150536])
    torch.testing.assert_close(exact, stated, rtol=0, atol=5e-7)

    log_ratios = torch.log_softmax(theta, dim=0) - REFERENCE_LOGPROBS  # with gradient: the reward must detach it
    rewards = regularised_rewards(REWARDS, log_ratios, BETA)
    assert not rewards.requires_grad
    assert (expected_gradient(theta, rewards, group_size) - exact).abs().max() <= 1e-15


@pytest.mark.parametrize(
    ("estimate", "error"),
    [(lambda ratio: ratio**2 / 2, 0.0155), (lambda ratio: torch.expm1(-ratio) + ratio, 0.0174)],
    ids=["k2", "k3"],
)
def test_the_other_estimators_of_the_kl_do_not_belong_in_the_reward(
    theta: Tensor, estimate: Callable[[Tensor], Tensor], error: float
) -> None:
    kl = estimate(torch.log_softmax(theta, dim=0) - REFERENCE_LOGPROBS)
    found = expected_gradient(theta, regularised_rewards(REWARDS, kl, BETA), 4)
    assert (found - regularised_gradient(theta)).abs().max().item() == pytest.approx(error, abs=5e-5)


# A policy of two steps over the tokens a, b and stop. A completion that does not stop at once has two tokens, and its
# second token depends on its first. The published errors of the means (0.081, 0.064) are of a toy that is not
# specified; on this one they are larger, and the sum's error is the same: none.
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
    """Expected gradients on groups of two by the type of the loss, and the exact one."""
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
            chance = logprobs_Y[list(pair)].sum().exp().detach()
            losses.append(-chance * (surrogates_N * weights_N).sum())
        gradients[loss_type] = -gradient(torch.stack(losses).sum(), logits)
    return gradients


def test_only_the_sum_over_a_sequence_gives_the_gradient_where_lengths_vary() -> None:
    gradients = two_step_gradients()
    errors = {name: (found - gradients["exact"]).abs().max().item() for name, found in gradients.items()}
    assert errors["sequence_sum"] <= 1e-12
    assert errors["sequence_mean"] > 1e-2
    assert errors["token_mean"] > 1e-2


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ([1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        ([1, 1, 1, 0, 0, 0, 0, 0], [5 / 7] * 3 + [-3 / 7] * 5),  # +0.714286 and -0.428571
        ([0.5, 0.5], [0, 0]),
        ([3], [0]),
    ],
)
def test_advantages_worked_out_by_hand(rewards: list[float], advantages: list[float]) -> None:
    found = leave_one_out_advantages(doubles([rewards]))
    torch.testing.assert_close(found, doubles([advantages]), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1, NAN, 0, NAN], [1, 0, -1, 0]),
        ([1, 0, NAN, 0], [1, -0.5, 0, -0.5]),
        ([NAN, 5, NAN, NAN], [0, 0, 0, 0]),
        ([NAN, NAN, NAN, NAN], [0, 0, 0, 0]),
    ],
)
def test_an_unscorable_completion_is_in_nobodys_baseline_and_has_no_advantage(
    rewards: list[float], advantages: list[float]
) -> None:
    assert leave_one_out_advantages(doubles([rewards])).tolist() == [advantages]


def test_groups_are_compared_within_themselves_only() -> None:
    both = leave_one_out_advantages(doubles([[1, 0, NAN], [10, 20, 60]]))
    assert both.tolist() == [[1, -1, 0], [-30, -15, 45]]


def test_an_unscorable_reward_stays_so_under_the_kl_penalty() -> None:
    rewards = regularised_rewards(doubles([[1, NAN, 0]]), doubles([[2, 3, -4]]), 0.5)
    torch.testing.assert_close(rewards, doubles([[0, NAN, 2]]), rtol=0, atol=0, equal_nan=True)


numbers = st.floats(-100, 100)
groups_of = st.integers(1, 8).flatmap(
    lambda size: st.lists(
        st.lists(st.one_of(numbers, st.just(NAN)), min_size=size, max_size=size), min_size=1, max_size=4
    )
)


@given(groups_of)
def test_leave_one_out_equals_brute_force(groups: list[list[float]]) -> None:
    expected = []
    for group in groups:
        advantages = []
        for place, reward in enumerate(group):
            others = [other for at, other in enumerate(group) if at != place and not math.isnan(other)]
            is_compared = others and not math.isnan(reward)
            advantages.append(reward - math.fsum(others) / len(others) if is_compared else 0.0)
        expected.append(advantages)
    torch.testing.assert_close(leave_one_out_advantages(doubles(groups)), doubles(expected), rtol=0, atol=1e-12)


@given(st.lists(numbers, min_size=2, max_size=8))
def test_leave_one_out_is_centring_times_g_over_g_minus_one(group: list[float]) -> None:
    rewards = doubles([group])
    expected = centred(rewards) * len(group) / (len(group) - 1)
    torch.testing.assert_close(leave_one_out_advantages(rewards), expected, rtol=0, atol=1e-12)


def test_the_loss_and_its_gradient_worked_out_by_hand() -> None:
    logprobs = doubles([-1, -2, -3, -5]).requires_grad_()
    loss = loss_on_policy(logprobs, doubles([2, 0, -1]), torch.tensor([1, 1, 2]), num_completions=2)
    assert loss.item() == -(2 * 1 + -1 * 1) / 2  # every ratio is 1
    loss.backward()
    assert logprobs.grad.tolist() == [-1, 0, 0.5, 0.5]


def test_the_denominator_counts_scorable_completions_only() -> None:
    logprobs = doubles([-1, -2, -4, -8]).requires_grad_()
    rewards = doubles([[1, NAN, 0, 0]])
    advantages = leave_one_out_advantages(rewards).flatten()
    num_scorable = int((~rewards.isnan()).sum())
    found = gradient(loss_on_policy(logprobs, advantages, num_completions=num_scorable), logprobs)
    torch.testing.assert_close(found, doubles([-1 / 3, 0, 0.5 / 3, 0.5 / 3]), rtol=0, atol=1e-15)


def test_a_step_without_a_scorable_completion_has_loss_and_gradient_zero() -> None:
    logprobs = doubles([-1, -2]).requires_grad_()
    advantages = leave_one_out_advantages(doubles([[NAN, NAN]])).flatten()
    loss = loss_on_policy(logprobs, advantages, num_completions=0)
    assert loss.item() == 0
    assert gradient(loss, logprobs).tolist() == [0, 0]


@pytest.mark.parametrize("loss_type", ["sequence_sum", "sequence_mean", "token_mean"])
@pytest.mark.parametrize("level", ["sequence", "token"])
@given(sequences=st.lists(st.tuples(numbers, st.integers(1, 4)), min_size=1, max_size=8), data=st.data())
def test_micro_batches_with_one_denominator_sum_to_the_whole(
    level: str, loss_type: str, sequences: list[tuple[float, int]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sequences)))) | {0, len(sequences)})
    num_tokens = sum(length for _, length in sequences)
    ratios = data.draw(st.lists(st.floats(-1, 1), min_size=num_tokens, max_size=num_tokens))

    def terms(part: list[tuple[float, int]], log_ratios_T: Tensor) -> Tensor:
        lengths = torch.tensor([length for _, length in part])
        advantages = doubles([advantage for advantage, _ in part])
        surrogates, _ = clipped_surrogates(log_ratios_T, advantages, lengths, level=level, epsilon=0.2)
        surrogates_N = sequence_sums(surrogates, lengths) if level == "token" else surrogates
        weights_N = sequence_weights(lengths, loss_type, num_completions=7, num_tokens=29)
        return -(surrogates_N * weights_N).sum()

    whole = doubles(ratios).requires_grad_()
    loss = terms(sequences, whole)
    parts = whole.detach().clone().requires_grad_()
    losses = []
    for first, last in itertools.pairwise(cuts):
        at, end = (sum(length for _, length in sequences[:cut]) for cut in (first, last))
        part = terms(sequences[first:last], parts[at:end])
        part.backward()
        losses.append(part.item())
    assert math.fsum(losses) == pytest.approx(loss.item(), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(parts.grad, gradient(loss, whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "surrogate", "slope"),
    [
        (1.0, 1.0, 1.0, 1.0),
        (1.0, 1.1, 1.1, 1.1),
        (1.0, 1.5, 1.2, 0.0),  # held at 1 + epsilon: no more of what is already likelier
        (1.0, 0.5, 0.5, 0.5),  # never held on the side that has to come back
        (-1.0, 1.0, -1.0, -1.0),
        (-1.0, 0.5, -0.8, 0.0),
        (-1.0, 1.5, -1.5, -1.5),
        (-2.0, 0.25, -1.6, 0.0),
        (0.0, 3.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_clip_worked_out_by_hand(
    level: str, advantage: float, ratio: float, surrogate: float, slope: float
) -> None:
    log_ratio = doubles([math.log(ratio)]).requires_grad_()
    found, is_clipped = clipped_surrogates(log_ratio, doubles([advantage]), torch.tensor([1]), level=level, epsilon=0.2)
    assert found.item() == pytest.approx(surrogate, rel=1e-12)
    assert gradient(found.sum(), log_ratio).item() == pytest.approx(slope, rel=1e-12)
    assert is_clipped.item() == (slope == 0 and advantage != 0)


def test_a_sequence_is_clipped_by_its_product_and_a_token_by_itself() -> None:
    log_ratios, lengths = doubles([0.15, 0.15, -0.5, 0.5]).requires_grad_(), torch.tensor([2, 2])
    advantages = doubles([1, 1])
    sequences, is_clipped = clipped_surrogates(log_ratios, advantages, lengths, level="sequence", epsilon=0.2)
    torch.testing.assert_close(sequences, doubles([1.2, 1.0]))
    assert is_clipped.tolist() == [True, False]
    tokens, is_clipped = clipped_surrogates(log_ratios, advantages, lengths, level="token", epsilon=0.2)
    torch.testing.assert_close(tokens, doubles([math.exp(0.15)] * 2 + [math.exp(-0.5), 1.2]))
    assert is_clipped.tolist() == [False, False, False, True]


def test_weights_are_cut_off_at_the_cap_and_carry_no_gradient() -> None:
    log_ratios = doubles([-1, 0, 0.5, 3]).requires_grad_()
    weights = truncated_importance_weights(log_ratios, cap=2.0)
    torch.testing.assert_close(weights, doubles([math.exp(-1), 1, math.exp(0.5), 2]))
    assert not weights.requires_grad


def test_denominators_worked_out_by_hand() -> None:
    lengths = torch.tensor([1, 4, 0])

    def weights(loss_type: str) -> list[float]:
        return sequence_weights(lengths, loss_type, num_completions=10, num_tokens=40).tolist()

    assert weights("sequence_sum") == pytest.approx([0.1, 0.1, 0.1])
    assert weights("sequence_mean") == pytest.approx([0.1, 0.025, 0.1])  # without a trained token there is no sum
    assert weights("token_mean") == pytest.approx([0.025] * 3)


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0)]
)
def test_the_overlong_penalty_worked_out_by_hand(length: int, penalty: float) -> None:
    assert overlong_penalty(length, max_completion_length=100, buffer=20) == pytest.approx(penalty)


def log_ratios_to_reference(theta: Tensor) -> Tensor:
    return torch.log_softmax(theta, dim=0) - REFERENCE_LOGPROBS


def test_of_the_estimators_of_the_kl_only_k2_has_its_gradient_in_the_loss(theta: Tensor) -> None:
    chances = theta.softmax(dim=0).detach()
    logprobs = torch.log_softmax(theta, dim=0)
    exact = gradient(BETA * (logprobs.exp() * (logprobs - REFERENCE_LOGPROBS)).sum(), theta)
    assert exact.norm() > 0.01
    log_ratios = log_ratios_to_reference(theta)
    # Drawn actions are constants: the expectation is over the draws, and their log-ratios carry the gradient.
    k2 = gradient((chances * k2_loss(log_ratios, BETA)).sum(), theta)
    assert (k2 - exact).abs().max() <= 1e-16
    for estimate in (log_ratios, torch.expm1(-log_ratios) + log_ratios):
        assert (gradient(BETA * (chances * estimate).sum(), theta) - exact).abs().max() > 1e-3


def test_sequence_sums_worked_out_by_hand() -> None:
    values = doubles([1, 2, 4, 8, 16, 32]).requires_grad_()
    sums = sequence_sums(values, torch.tensor([1, 3, 2]))
    assert sums.tolist() == [1, 14, 48]
    assert gradient((sums * doubles([1, 10, 100])).sum(), values).tolist() == [1, 10, 10, 10, 100, 100]


@given(st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=6))
def test_sequence_sums_equal_brute_force(sequences: list[list[float]]) -> None:
    values = doubles([value for sequence in sequences for value in sequence])
    sums = sequence_sums(values, torch.tensor([len(sequence) for sequence in sequences]))
    torch.testing.assert_close(sums, doubles([math.fsum(sequence) for sequence in sequences]), rtol=0, atol=1e-12)
