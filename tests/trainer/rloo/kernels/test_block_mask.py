"""The block mask of packed groups equals the one that PyTorch makes of all pairs, in memory that stays flat."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from rekatrain.trainer.rloo.kernels.block_mask import (
    BLOCK_SIZE,
    RECOMPILE_LIMIT,
    attend_blocks,
    block_mask_bytes,
    make_block_mask,
)
from tests.trainer.rloo.kernels.test_grouped_attention import LAYOUTS

CPU = torch.device("cpu")
TABLES = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
TABLES += ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
GROUPS = st.lists(st.tuples(st.integers(1, 300), st.lists(st.integers(0, 400), max_size=4)), min_size=1, max_size=4)


def sees(groups: list[tuple[int, list[int]]]) -> Tensor:
    """Return the mask [T, T] by definition: a query attends to its group's prompt and its completion up to itself."""
    tokens = [
        (group, member)
        for group, (prompt, completions) in enumerate(groups)
        for member, length in enumerate([prompt, *completions])
        for _ in range(length)
    ]
    group_T, member_T = torch.tensor(tokens).unbind(dim=1)
    is_visible_TT = (member_T == 0) | (member_T == member_T[:, None])
    return torch.ones(len(tokens), len(tokens)).tril().bool() & (group_T == group_T[:, None]) & is_visible_TT


def assert_equals_that_of_all_pairs(groups: list[tuple[int, list[int]]]) -> None:
    mask_TT = sees(groups)
    size = len(mask_TT)
    expected = create_block_mask(lambda batch, head, query, key: mask_TT[query, key], None, None, size, size, CPU)
    actual = make_block_mask(groups, CPU)
    padded = size + -size % BLOCK_SIZE
    assert actual.seq_lengths == (padded, padded) and actual.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in TABLES:
        table, exact = getattr(actual, name), getattr(expected, name)
        assert table.dtype == exact.dtype and torch.equal(table, exact), name
    every = torch.arange(padded)
    seen = actual.mask_mod(None, None, every[:, None], every[None])
    assert torch.equal(seen[:size, :size], mask_TT)
    assert not seen[:size, size:].any() and not seen[size:, :size].any()  # padding is seen by itself alone
    assert seen.diagonal().all()  # no row is empty


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_mask_of_a_layout_equals_that_of_all_pairs(layout: str) -> None:
    assert_equals_that_of_all_pairs(LAYOUTS[layout])


@pytest.mark.parametrize(
    "groups",
    [
        [(2 * BLOCK_SIZE, [BLOCK_SIZE, 2 * BLOCK_SIZE])],  # spans end where blocks end
        [(1, []), (BLOCK_SIZE - 1, [BLOCK_SIZE])],
        [(3 * BLOCK_SIZE + 5, [])],
        [(BLOCK_SIZE, [0, 2 * BLOCK_SIZE, 0])],
    ],
)
def test_block_mask_has_whole_blocks_at_their_edges(groups: list[tuple[int, list[int]]]) -> None:
    assert_equals_that_of_all_pairs(groups)


@settings(deadline=None, max_examples=12)
@given(GROUPS)
def test_block_mask_of_any_groups_equals_that_of_all_pairs(groups: list[tuple[int, list[int]]]) -> None:
    assert_equals_that_of_all_pairs(groups)


@pytest.mark.parametrize("num_tokens", [32_768, 65_536])
def test_block_mask_of_long_texts_takes_little_memory(num_tokens: int) -> None:
    # By `create_block_mask` it takes 10 bytes per pair of tokens: 10.7 and 43 GB.
    groups = [(512, [(num_tokens // 4 - 512) // 4] * 4)] * 4
    before = peak_memory(reset=True)
    mask = make_block_mask(groups, CPU)
    assert mask.seq_lengths == (num_tokens, num_tokens)
    # Temporaries of the CPU: a few tables of at most 512 x 512 numbers of 8 bytes.
    assert peak_memory() - before < 64e6
    kept = sum(getattr(mask, name).nbytes for name in TABLES) + 9 * num_tokens
    assert block_mask_bytes(num_tokens) == kept


def peak_memory(*, reset: bool = False) -> int:
    """Return the largest resident memory of this process, in bytes, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def test_compiled_flex_attention_never_falls_back_in_silence() -> None:
    # At the limit of graphs, dynamo would run dense attention.
    torch._dynamo.reset()
    states, mask = torch.randn(1, 1, 4, 8), make_block_mask([(4, [])], torch.device("cpu"))
    with torch.no_grad():
        output = attend_blocks(states, states, states, mask, 1.0)  # compiles the first graph
    exact = scaled_dot_product_attention(states, states, states, is_causal=True, scale=1.0)
    torch.testing.assert_close(output, exact)
    assert torch._dynamo.config.recompile_limit >= RECOMPILE_LIMIT
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=0), pytest.raises(Exception, match="fullgraph=True"):
        attend_blocks(states, states, states, mask, 1.0)
    torch._dynamo.reset()
