"""FlexAttention on a GPU: compiled as one graph, and the pattern of packed groups as blocks, computed from the spans.

`create_block_mask` evaluates the pattern for every pair of tokens: 10 bytes per pair, 10.7 GB at 32,768 tokens. Here
the visible pairs of each block are counted instead, so that memory grows with the number of blocks, squared.

Shapes: T tokens, B blocks of `BLOCK_SIZE` tokens.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK_SIZE = 128
# Lengths are unknown when the kernel is compiled: without IS_DIVISIBLE it checks each key of each block against the
# length. One kernel serves all lengths: the one for decoding, which few queries would take, has no tiles for these
# blocks.
KERNEL_OPTIONS = {"IS_DIVISIBLE": True, "FORCE_USE_FLEX_ATTENTION": True}
# Tiles of the forward pass in 16 bits. PyTorch's own for a Hopper GPU and heads of 64 do not fit into its registers,
# and those for heads of 96 are smaller: 10.8 and 5.7 ms on an H200 where these take 1.8 and 3.7.
TILES = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8}
MAX_TILED_HEAD_SIZE = 128
# Smallest size of a head in FlexAttention's kernels.
MIN_HEAD_SIZE = 16
# Graphs of FlexAttention in one process: about 7 in a run with an adapter and an evaluation; torch's default is 8.
RECOMPILE_LIMIT = 32


def make_block_mask(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> BlockMask:
    """Return the pattern of groups laid end to end; it equals that of `create_block_mask`.

    The last block is filled up with padding, which no token sees.

    groups: for each, the length of its prompt and of its completions, as in `PackedGroups`
    """
    pairs_BB = torch.from_numpy(count_pairs(groups))
    is_full_BB = pairs_BB == BLOCK_SIZE**2
    lengths = [length for prompt, completions in groups for length in (prompt, *completions)]
    lengths.append(-sum(lengths) % BLOCK_SIZE)
    group_of = [index for index, (_, completions) in enumerate(groups) for _ in range(1 + len(completions))] + [-1]
    is_prompt = [at == 0 for _, completions in groups for at in range(1 + len(completions))] + [False]
    repeats = torch.tensor(lengths)
    group_T = torch.tensor(group_of, dtype=torch.int32).repeat_interleave(repeats).to(device)
    span_T = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(repeats).to(device)
    is_prompt_T = torch.tensor(is_prompt).repeat_interleave(repeats).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_in_view = (span_T[key] == span_T[query]) | (is_prompt_T[key] & (group_T[key] == group_T[query]))
        return (query >= key) & is_in_view

    blocks = BlockMask.from_kv_blocks(
        *_ordered((pairs_BB > 0) & ~is_full_BB),
        *_ordered(is_full_BB),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=sees,
        seq_lengths=(len(span_T), len(span_T)),
    )
    return blocks.to(device)


def block_mask_bytes(num_tokens: int) -> int:
    """Bytes of a block mask on its device: four [B, B] tables of indices, and three numbers per token or padding."""
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    return 4 * 4 * num_blocks * (num_blocks + 1) + (4 + 4 + 1) * num_blocks * BLOCK_SIZE


def count_pairs(groups: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
    """Count the pairs of a query and a key that it sees, by block of queries and block of keys -> [B, B].

    >>> count_pairs([(100, [60])]).tolist()  # 128 queries, then 32 that see the prompt and 28 tokens of their own
    [[8256, 0], [4096, 528]]
    """
    num_tokens = sum(prompt + sum(completions) for prompt, completions in groups)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    pairs_BB = np.zeros((num_blocks, num_blocks), dtype=np.int64)
    first = 0
    for prompt, completions in groups:
        for span in _spans(first, prompt, completions):
            _add_triangle(pairs_BB, *span)
        end = first + prompt + sum(completions)
        queries, keys = _Overlap(first + prompt, end), _Overlap(first, first + prompt)
        pairs_BB[queries.blocks, keys.blocks] += np.outer(queries.counts, keys.counts)
        first = end
    return pairs_BB


class _Overlap:
    """The blocks that the tokens from `first` to `end` are in, and the number of these tokens in each."""

    def __init__(self, first: int, end: int) -> None:
        self.blocks = slice(first // BLOCK_SIZE, max(first // BLOCK_SIZE, -(-end // BLOCK_SIZE)))
        starts = np.arange(self.blocks.start, self.blocks.stop) * BLOCK_SIZE
        self.counts = np.maximum(0, np.minimum(starts + BLOCK_SIZE, end) - np.maximum(starts, first))


def _spans(first: int, prompt: int, completions: Sequence[int]) -> Iterator[tuple[int, int]]:
    for length in (prompt, *completions):
        yield first, first + length
        first += length


def _add_triangle(pairs_BB: np.ndarray, first: int, end: int) -> None:
    """Add the pairs of a causal span: a query sees the keys of the span up to its own index."""
    span = _Overlap(first, end)
    pairs = np.tril(np.outer(span.counts, span.counts), -1)
    pairs_BB[span.blocks, span.blocks] += pairs + np.diag(span.counts * (span.counts + 1) // 2)


def _ordered(is_set_BB: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each block of queries the number of its blocks of keys, [1, 1, B], and their indices first."""
    order = torch.argsort(is_set_BB.to(torch.int8), dim=1, descending=True, stable=True)
    return is_set_BB.sum(dim=1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scaling: float) -> Tensor:
    """Attend by FlexAttention: query [1, H, T, D], key and value [1, K, T, D] -> [1, H, T, D].

    Tokens are padded to whole blocks, and heads that are smaller than those of its kernels with zeros, which change no
    score.
    """
    num_tokens, head_size = query.shape[2:]
    more = (0, max(0, MIN_HEAD_SIZE - head_size), 0, -num_tokens % BLOCK_SIZE)
    if any(more):
        query, key, value = (nn.functional.pad(states, more) for states in (query, key, value))
    is_tiled = query.dtype != torch.float32 and head_size <= MAX_TILED_HEAD_SIZE
    options = KERNEL_OPTIONS | (TILES if is_tiled else {})
    output: Tensor = _compiled_flex()(
        query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=True, kernel_options=options
    )
    return output[:, :, :num_tokens, :head_size]


@cache
def _compiled_flex() -> Any:  # torch.compile loses the signature
    """Return FlexAttention as one compiled graph.

    Uncompiled it is dense attention with a score for each pair of tokens. `fullgraph` makes an error of what would
    otherwise fall back to that without a message: a graph break, or more graphs than `recompile_limit`. Lengths share a
    graph; one more is compiled for each of: less than two blocks, a single token, no gradient, another dtype.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
