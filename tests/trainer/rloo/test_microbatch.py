"""Tests of trainer/rloo/microbatch.py: each completion once, within the budget, in few parts; processes balanced."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekatrain.trainer.rloo.kernels.cpu import PassCost, num_tokens
from rekatrain.trainer.rloo.microbatch import GroupPart, assign, pack

GROUPS = st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(0, 30), min_size=1, max_size=5)), max_size=12)
COSTS = st.builds(PassCost, token=st.floats(0, 100), pair=st.floats(0, 10), join=st.floats(0, 10))


def size(groups: list[tuple[int, list[int]]], part: GroupPart) -> int:
    """Number of tokens that a part runs."""
    prompt, completions = groups[part.group]
    return num_tokens(prompt, [completions[index] for index in part.members], part.is_shared)


@given(GROUPS, st.integers(1, 300), COSTS)
def test_pack_holds_each_completion_once_within_the_budget(
    groups: list[tuple[int, list[int]]], budget: int, cost: PassCost
) -> None:
    batches = pack(groups, budget, cost)
    members = [(part.group, index) for batch in batches for part in batch for index in part.members]
    assert members == [(group, index) for group, (_, own) in enumerate(groups) for index in range(len(own))]
    for batch in batches:
        is_single = len(batch) == 1 and len(batch[0].members) == 1
        assert is_single or sum(size(groups, part) for part in batch) <= budget
        for part in batch:
            assert part.is_shared == cost.shares_prompt(*groups[part.group])


@given(GROUPS, st.integers(1, 300), COSTS)
def test_pack_fills_each_micro_batch(groups: list[tuple[int, list[int]]], budget: int, cost: PassCost) -> None:
    for batch, following in itertools.pairwise(pack(groups, budget, cost)):
        assert sum(size(groups, part) for part in [*batch, following[0]]) > budget


@given(GROUPS, st.integers(1, 300), COSTS)
def test_pack_splits_only_groups_above_the_budget(
    groups: list[tuple[int, list[int]]], budget: int, cost: PassCost
) -> None:
    for part in itertools.chain(*pack(groups, budget, cost)):
        prompt, completions = groups[part.group]
        is_whole = len(part.members) == len(completions)
        assert is_whole or num_tokens(prompt, completions, part.is_shared) > budget


COST_LISTS = st.lists(st.lists(st.floats(0, 1e6), max_size=6), min_size=1, max_size=8)


@given(COST_LISTS)
def test_assign_gives_each_item_to_one_process(costs: list[list[float]]) -> None:
    assigned = [item for items in assign(costs) for item in items]
    assert len(assign(costs)) == len(costs)
    assert sorted(assigned) == [(rank, index) for rank, owned in enumerate(costs) for index in range(len(owned))]


@given(COST_LISTS)
def test_assign_bounds_the_largest_sum(costs: list[list[float]]) -> None:
    sums = [sum(costs[rank][index] for rank, index in items) for items in assign(costs)]
    flat = [cost for owned in costs for cost in owned]
    rounding = 1 + 1e-9
    assert max(sums) <= max(sum(owned) for owned in costs) * rounding  # no worse than before
    # The last item of a process came to it when it had the least: its sum without that item is at most the mean.
    assert max(sums) <= (sum(flat) / len(costs) + max(flat, default=0.0)) * rounding


@pytest.mark.parametrize(
    ("num_processes", "num_groups", "before", "after"),
    [(8, 8, 1.3, 1.02), (8, 4, 1.5, 1.06), (2, 4, 1.15, 1.03)],
)
def test_assign_balances_groups_of_uneven_length(
    num_processes: int, num_groups: int, before: float, after: float
) -> None:
    # Means over 200 steps of the slowest process over the mean; 8 completions per group, of log-normal lengths.
    rng = np.random.default_rng(0)
    cost = PassCost(token=2.0e10, pair=5.4e5, join=0.0)  # Reka Flash 3 on a GPU
    unbalanced, balanced = [], []
    for _ in range(200):
        costs = [[cost.of_group(100, uneven_lengths(rng)) for _ in range(num_groups)] for _ in range(num_processes)]
        sums = [sum(costs[rank][index] for rank, index in items) for items in assign(costs)]
        unbalanced.append(max(map(sum, costs)) / np.mean(sums))
        balanced.append(max(sums) / np.mean(sums))
    assert np.mean(unbalanced) > before
    assert np.mean(balanced) < after


def uneven_lengths(rng: np.random.Generator) -> list[int]:
    """Draw the lengths of a group: hard prompts have longer completions, all at most 16,384 tokens."""
    middle = rng.lognormal(np.log(2500), 0.7)
    return np.minimum(rng.lognormal(np.log(middle), 0.5, size=8), 16384).astype(int).tolist()
