"""Tests of pack in trainer/rloo/microbatch.py: each completion once, within the budget, as few parts as possible."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rekatrain.trainer.rloo.kernels.cpu import PassCost, num_tokens
from rekatrain.trainer.rloo.microbatch import GroupPart, pack

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
