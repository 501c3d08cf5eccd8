"""Tests of trainer/rloo/loss.py: values worked out by hand, brute force, and sums over any split."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rekatrain.trainer.rloo.loss import (
    clipped_surrogates,
    kl_penalized_rewards,
    leave_one_out_advantages,
    sequence_sums,
    sequence_weights,
    truncated_importance_weights,
)
from tests.helpers.loss import centered, doubles, gradient, loss_on_policy

NAN = math.nan


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
def test_leave_one_out_advantages_worked_out_by_hand(rewards: list[float], advantages: list[float]) -> None:
    actual = leave_one_out_advantages(doubles([rewards]))
    torch.testing.assert_close(actual, doubles([advantages]), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1, NAN, 0, NAN], [1, 0, -1, 0]),
        ([1, 0, NAN, 0], [1, -0.5, 0, -0.5]),
        ([NAN, 5, NAN, NAN], [0, 0, 0, 0]),
        ([NAN, NAN, NAN, NAN], [0, 0, 0, 0]),
    ],
)
def test_leave_one_out_advantages_skip_unscorable_completions(rewards: list[float], advantages: list[float]) -> None:
    assert leave_one_out_advantages(doubles([rewards])).tolist() == [advantages]


def test_leave_one_out_advantages_compare_within_a_group() -> None:
    both = leave_one_out_advantages(doubles([[1, 0, NAN], [10, 20, 60]]))
    assert both.tolist() == [[1, -1, 0], [-30, -15, 45]]


def test_kl_penalized_rewards_stay_nan_where_unscorable() -> None:
    rewards = kl_penalized_rewards(doubles([[1, NAN, 0]]), doubles([[2, 3, -4]]), 0.5)
    torch.testing.assert_close(rewards, doubles([[0, NAN, 2]]), rtol=0, atol=0, equal_nan=True)


numbers = st.floats(-100, 100)
groups_of = st.integers(1, 8).flatmap(
    lambda size: st.lists(
        st.lists(st.one_of(numbers, st.just(NAN)), min_size=size, max_size=size), min_size=1, max_size=4
    )
)


@given(groups_of)
def test_leave_one_out_advantages_equal_brute_force(groups: list[list[float]]) -> None:
    expected = []
    for group in groups:
        advantages = []
        for index, reward in enumerate(group):
            others = [other for at, other in enumerate(group) if at != index and not math.isnan(other)]
            is_compared = others and not math.isnan(reward)
            advantages.append(reward - math.fsum(others) / len(others) if is_compared else 0.0)
        expected.append(advantages)
    torch.testing.assert_close(leave_one_out_advantages(doubles(groups)), doubles(expected), rtol=0, atol=1e-12)


@given(st.lists(numbers, min_size=2, max_size=8))
def test_leave_one_out_advantages_are_scaled_centered_rewards(group: list[float]) -> None:
    rewards = doubles([group])
    expected = centered(rewards) * len(group) / (len(group) - 1)
    torch.testing.assert_close(leave_one_out_advantages(rewards), expected, rtol=0, atol=1e-12)


def test_policy_loss_and_gradient_worked_out_by_hand() -> None:
    logprobs = doubles([-1, -2, -3, -5]).requires_grad_()
    loss = loss_on_policy(logprobs, doubles([2, 0, -1]), torch.tensor([1, 1, 2]), num_completions=2)
    assert loss.item() == -(2 * 1 + -1 * 1) / 2  # every ratio is 1
    loss.backward()
    assert logprobs.grad.tolist() == [-1, 0, 0.5, 0.5]


def test_policy_loss_averages_over_scorable_completions() -> None:
    logprobs = doubles([-1, -2, -4, -8]).requires_grad_()
    rewards = doubles([[1, NAN, 0, 0]])
    advantages = leave_one_out_advantages(rewards).flatten()
    num_scorable = int((~rewards.isnan()).sum())
    actual = gradient(loss_on_policy(logprobs, advantages, num_completions=num_scorable), logprobs)
    torch.testing.assert_close(actual, doubles([-1 / 3, 0, 0.5 / 3, 0.5 / 3]), rtol=0, atol=1e-15)


def test_policy_loss_is_zero_without_a_scorable_completion() -> None:
    logprobs = doubles([-1, -2]).requires_grad_()
    advantages = leave_one_out_advantages(doubles([[NAN, NAN]])).flatten()
    loss = loss_on_policy(logprobs, advantages, num_completions=0)
    assert loss.item() == 0
    assert gradient(loss, logprobs).tolist() == [0, 0]


@pytest.mark.parametrize("loss_type", ["sequence_sum", "sequence_mean", "token_mean"])
@pytest.mark.parametrize("level", ["sequence", "token"])
@given(sequences=st.lists(st.tuples(numbers, st.integers(1, 4)), min_size=1, max_size=8), data=st.data())
def test_sequence_weights_let_micro_batches_sum_to_the_whole(
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
        (1.0, 1.5, 1.2, 0.0),  # clipped at 1 + epsilon: the completion is more likely already
        (1.0, 0.5, 0.5, 0.5),  # never clipped on the side that has to come back
        (-1.0, 1.0, -1.0, -1.0),
        (-1.0, 0.5, -0.8, 0.0),
        (-1.0, 1.5, -1.5, -1.5),
        (-2.0, 0.25, -1.6, 0.0),
        (0.0, 3.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_clipped_surrogates_worked_out_by_hand(
    level: str, advantage: float, ratio: float, surrogate: float, slope: float
) -> None:
    log_ratio = doubles([math.log(ratio)]).requires_grad_()
    actual, is_clipped = clipped_surrogates(
        log_ratio, doubles([advantage]), torch.tensor([1]), level=level, epsilon=0.2
    )
    assert actual.item() == pytest.approx(surrogate, rel=1e-12)
    assert gradient(actual.sum(), log_ratio).item() == pytest.approx(slope, rel=1e-12)
    assert is_clipped.item() == (slope == 0 and advantage != 0)


def test_clipped_surrogates_clip_by_sequence_or_by_token() -> None:
    log_ratios, lengths = doubles([0.15, 0.15, -0.5, 0.5]).requires_grad_(), torch.tensor([2, 2])
    advantages = doubles([1, 1])
    sequences, is_clipped = clipped_surrogates(log_ratios, advantages, lengths, level="sequence", epsilon=0.2)
    torch.testing.assert_close(sequences, doubles([1.2, 1.0]))
    assert is_clipped.tolist() == [True, False]
    tokens, is_clipped = clipped_surrogates(log_ratios, advantages, lengths, level="token", epsilon=0.2)
    torch.testing.assert_close(tokens, doubles([math.exp(0.15)] * 2 + [math.exp(-0.5), 1.2]))
    assert is_clipped.tolist() == [False, False, False, True]


def test_truncated_importance_weights_are_capped_and_detached() -> None:
    log_ratios = doubles([-1, 0, 0.5, 3]).requires_grad_()
    weights = truncated_importance_weights(log_ratios, cap=2.0)
    torch.testing.assert_close(weights, doubles([math.exp(-1), 1, math.exp(0.5), 2]))
    assert not weights.requires_grad


def test_sequence_weights_worked_out_by_hand() -> None:
    lengths = torch.tensor([1, 4, 0])

    def weights(loss_type: str) -> list[float]:
        return sequence_weights(lengths, loss_type, num_completions=10, num_tokens=40).tolist()

    assert weights("sequence_sum") == pytest.approx([0.1, 0.1, 0.1])
    # Without a trained token the sum is empty, whatever its weight.
    assert weights("sequence_mean") == pytest.approx([0.1, 0.025, 0.1])
    assert weights("token_mean") == pytest.approx([0.025] * 3)


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
