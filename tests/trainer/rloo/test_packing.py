"""Micro-batches hold every completion once, within their budget, at the lower of two costs."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from rekatrain.trainer.rloo.kernels.cpu import PassCost, num_tokens
from rekatrain.trainer.rloo.microbatch import GroupPart, pack

GROUPS = st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(0, 30), min_size=1, max_size=5)), max_size=12)
COSTS = st.builds(PassCost, token=st.floats(0, 100), pair=st.floats(0, 10), join=st.floats(0, 10))


def size(groups: list[tuple[int, list[int]]], piece: GroupPart) -> int:
    prompt, completions = groups[piece.group]
    return num_tokens(prompt, [completions[place] for place in piece.members], piece.is_shared)


@given(GROUPS, st.integers(1, 300), COSTS)
def test_micro_batches_hold_each_completion_once_in_order_within_the_budget(
    groups: list[tuple[int, list[int]]], budget: int, cost: PassCost
) -> None:
    batches = pack(groups, budget, cost)
    members = [(piece.group, place) for batch in batches for piece in batch for place in piece.members]
    assert members == [(group, place) for group, (_, rows) in enumerate(groups) for place in range(len(rows))]
    for batch in batches:
        is_one_row = len(batch) == 1 and len(batch[0].members) == 1
        assert is_one_row or sum(size(groups, piece) for piece in batch) <= budget
        for piece in batch:
            assert piece.is_shared == cost.shares_prompt(*groups[piece.group])


@given(GROUPS, st.integers(1, 300), COSTS)
def test_micro_batches_are_full(groups: list[tuple[int, list[int]]], budget: int, cost: PassCost) -> None:
    for batch, following in itertools.pairwise(pack(groups, budget, cost)):
        assert sum(size(groups, piece) for piece in [*batch, following[0]]) > budget


@given(GROUPS, st.integers(1, 300), COSTS)
def test_a_group_is_split_only_where_it_is_above_the_budget(
    groups: list[tuple[int, list[int]]], budget: int, cost: PassCost
) -> None:
    for piece in itertools.chain(*pack(groups, budget, cost)):
        prompt, completions = groups[piece.group]
        is_whole = len(piece.members) == len(completions)
        assert is_whole or num_tokens(prompt, completions, piece.is_shared) > budget


@pytest.mark.parametrize(
    ("prompt", "completions", "is_shared"),
    [
        # Run again, the prompt costs 100 * 50 + 50^2 / 2 = 6250; joining costs 10 for each of 20 tokens.
        (50, [10, 10], True),
        # One completion saves nothing.
        (50, [10], False),
        # 100.5 for the prompt once more, 20,000 to join.
        (1, [1000, 1000], False),
    ],
)
def test_a_prompt_is_shared_where_that_costs_less(prompt: int, completions: list[int], is_shared: bool) -> None:
    assert PassCost(token=100.0, pair=1.0, join=10.0).shares_prompt(prompt, completions) == is_shared


@given(st.integers(1, 100), st.lists(st.integers(0, 100), min_size=1, max_size=6), st.floats(0, 100), st.floats(0, 10))
def test_where_joining_costs_nothing_sharing_is_never_dearer(
    prompt: int, completions: list[int], token: float, pair: float
) -> None:
    assert PassCost(token=token, pair=pair, join=0.0).shares_prompt(prompt, completions)


@given(st.integers(1, 50), st.lists(st.integers(0, 50), min_size=1, max_size=5), COSTS)
def test_the_rule_is_the_difference_of_all_that_is_computed(
    prompt: int, completions: list[int], cost: PassCost
) -> None:
    def pairs(first: int, last: int) -> float:
        """Of tokens at places first to last with those before them, half of a token's own."""
        return (last**2 - first**2) / 2

    shared = cost.token * (prompt + sum(completions)) + cost.join * sum(completions)
    shared += cost.pair * (pairs(0, prompt) + sum(pairs(prompt, prompt + own) for own in completions))
    plain = sum(cost.token * (prompt + own) + cost.pair * pairs(0, prompt + own) for own in completions)
    if shared != pytest.approx(plain):
        assert cost.shares_prompt(prompt, completions) == (shared < plain)


def test_the_cost_of_a_decoder_is_its_weights_and_its_heads(model: LlamaForCausalLM) -> None:
    cost = PassCost.of(model.model)
    per_layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48  # q, k and v, o, the three of the MLP
    assert cost == PassCost(token=2 * per_layer, pair=2 * 2 * 4 * 8, join=64 * 2 * 4 * 8)


def test_the_cost_of_a_sharded_decoder_is_that_of_the_whole_one(model: LlamaForCausalLM) -> None:
    whole = PassCost.of(model.model)
    for parameter in model.parameters():  # as ZeRO-3 leaves them between passes
        parameter.data = torch.empty(0)
    assert PassCost.of(model.model) == whole


@given(COSTS, st.integers(1, 100), st.integers(2, 8), st.integers(1, 200))
def test_the_stated_length_is_where_sharing_stops_to_pay(cost: PassCost, prompt: int, num: int, cap: int) -> None:
    longest = cost.longest_shared(prompt, num, cap)
    shares = [cost.shares_prompt(prompt, [length] * num) for length in range(1, cap + 1)]
    assert shares == [True] * longest + [False] * (cap - longest)
    assert f"up to {longest}" in cost.describe(prompt, num, cap)
