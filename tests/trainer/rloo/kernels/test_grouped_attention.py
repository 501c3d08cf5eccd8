"""Attention over packed groups and over a forked cache equals masked attention by its definition."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from rekatrain.trainer.rloo.kernels.block_mask import attend_blocks
from rekatrain.trainer.rloo.kernels.grouped_attention import FIRST_ROOM, ForkedCache, PackedGroups

CPU = torch.device("cpu")
NUM_HEADS, NUM_KEY_HEADS, SIZE, SCALING = 4, 2, 8, 0.3

LAYOUTS = {
    "variable lengths": [(5, [3, 7, 1]), (1, [2, 2, 6]), (9, [1, 4, 5])],
    "completions of no tokens": [(4, [0, 0]), (7, [0, 2, 0])],
    "prompts alone": [(3, []), (6, [])],
    "both": [(8, []), (2, [130]), (1, [1]), (4, [])],
    "above a block of FlexAttention": [(150, [20, 140]), (30, [3])],
}


def random_states(num_tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (NUM_HEADS, NUM_KEY_HEADS, NUM_KEY_HEADS)
    query, key, value = (torch.randn(1, H, num_tokens, SIZE, generator=generator, dtype=dtype) for H in heads)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def sees(groups: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Return the mask [T, T], pair by pair: a query attends to its group's prompt and its completion up to itself."""
    tokens = [
        (group, member)
        for group, (prompt, completions) in enumerate(groups)
        for member, length in enumerate([prompt, *completions])
        for _ in range(length)
    ]
    return torch.tensor(
        [
            [k <= q and tokens[k][0] == tokens[q][0] and tokens[k][1] in (0, tokens[q][1]) for k in range(len(tokens))]
            for q in range(len(tokens))
        ]
    )


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask_TT: Tensor) -> Tensor:
    """Compute softmax attention by its definition -> [1, T, H, D]."""
    key, value = (states.repeat_interleave(NUM_HEADS // NUM_KEY_HEADS, dim=1) for states in (key, value))
    scores = (query @ key.transpose(2, 3) * SCALING).masked_fill(~mask_TT, -torch.inf)
    return (scores.softmax(dim=3) @ value).transpose(1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_groups_attend_under_their_mask_with_gradients(layout: str) -> None:
    groups = LAYOUTS[layout]
    mask_TT = sees(groups)
    states = random_states(len(mask_TT))
    output, expected = PackedGroups(groups, CPU).attend(0, *states, SCALING), masked_attention(*states, mask_TT)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    for gradient, exact in zip(
        torch.autograd.grad((output * weights).sum(), states),
        torch.autograd.grad((expected * weights).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_mask_gives_flex_attention_the_same_pattern(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Uncompiled, FlexAttention runs on any device, without gradients there.
    monkeypatch.setattr("rekatrain.trainer.rloo.kernels.block_mask._compiled_flex", lambda: flex_attention)
    groups = LAYOUTS[layout]
    packed = PackedGroups(groups, CPU)
    states = [state.detach() for state in random_states(len(sees(groups)), torch.float32)]
    flex = attend_blocks(*states, packed.block_mask, SCALING).transpose(1, 2)
    torch.testing.assert_close(packed.attend(0, *states, SCALING), flex, rtol=0, atol=1e-5)


GROUPS = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(GROUPS)
def test_packed_groups_of_any_shape_attend_under_their_mask(groups: list[tuple[int, list[int]]]) -> None:
    mask_TT = sees(groups)
    states = random_states(len(mask_TT))
    packed = PackedGroups(groups, CPU)
    torch.testing.assert_close(
        packed.attend(0, *states, SCALING), masked_attention(*states, mask_TT), rtol=0, atol=1e-12
    )
    positions = [
        list(range(start, start + length))
        for prompt, completions in groups
        for start, length in [(0, prompt), *((prompt, length) for length in completions)]
    ]
    assert packed.position_ids.tolist() == [list(itertools.chain(*positions))]


# The cache of a batch being sampled


class Sampled:
    """Random keys and values of each token, as from a model, with attention over the whole text as the oracle."""

    def __init__(self, prompt_lengths: list[int], num_generations: int, max_length: int) -> None:
        self.cache = ForkedCache(prompt_lengths, num_generations, max_length, CPU)
        self.prompt_lengths = prompt_lengths
        self.live = list(range(len(prompt_lengths) * num_generations))  # completions in the order of the batch
        self.num_layers = 2
        states = [random_states(sum(prompt_lengths)) for _ in range(self.num_layers)]
        self.texts: list[list[tuple[Tensor, Tensor]]] = []  # by layer, by completion: keys and values so far
        for layer, (query, key, value) in enumerate(states):
            scaled = [state.detach() * (1 + layer) for state in (query, key, value)]
            output = self.cache.attend(layer, *scaled, SCALING)
            mask_TT = sees([(length, []) for length in prompt_lengths])
            torch.testing.assert_close(output, masked_attention(*scaled, mask_TT), rtol=0, atol=1e-12)
            prompts = zip(*(state.split(prompt_lengths, dim=2) for state in scaled[1:]), strict=True)
            self.texts.append([prompt for prompt in prompts for _ in range(num_generations)])
        self._generator = torch.Generator().manual_seed(1)
        self.length = 0

    def step(self) -> None:
        """Add one token to each live completion and compare with attention over its whole text."""
        N = len(self.live)
        of_prompt = len(self.texts[0]) // len(self.prompt_lengths)
        assert self.cache.position_ids.tolist() == [
            [self.prompt_lengths[member // of_prompt] + self.length] for member in self.live
        ]
        for layer in range(self.num_layers):
            query, key, value = (
                torch.randn(N, heads, 1, SIZE, generator=self._generator, dtype=torch.float64)
                for heads in (NUM_HEADS, NUM_KEY_HEADS, NUM_KEY_HEADS)
            )
            output = self.cache.attend(layer, query, key, value, SCALING)
            for index, member in enumerate(self.live):
                keys, values = (
                    torch.cat([old, new[index : index + 1]], dim=2)
                    for old, new in zip(self.texts[layer][member], (key, value), strict=True)
                )
                self.texts[layer][member] = keys, values
                every = torch.ones(1, keys.shape[2], dtype=torch.bool)
                expected = masked_attention(query[index : index + 1], keys, values, every)
                torch.testing.assert_close(output[index : index + 1], expected, rtol=0, atol=1e-12)
        self.cache.advance()
        self.length += 1

    def keep(self, indices: list[int]) -> None:
        old_indices = self.cache.keep(indices)
        assert sorted(old_indices) == indices
        self.live = [self.live[index] for index in old_indices]


@pytest.mark.parametrize(
    "kept",
    [
        [[0, 1, 2, 3, 4, 5]],
        [[1, 2, 3, 4, 5], [0, 2, 4], [0]],  # holes in front
        [[0, 1, 2], [2]],  # all completions of a prompt have ended
        [[0, 5], [0, 1], [1]],
        [[3]],
    ],
)
def test_forked_cache_attends_to_the_own_text_as_others_end(kept: list[list[int]]) -> None:
    sampled = Sampled([5, 2], 3, 20)
    sampled.step()
    for indices in kept:
        sampled.keep(indices)
        sampled.step()
        sampled.step()


@settings(deadline=None, max_examples=20)
@given(
    prompt_lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    num_generations=st.integers(1, 3),
    data=st.data(),
)
def test_forked_cache_lets_completions_end_in_any_order(
    prompt_lengths: list[int], num_generations: int, data: st.DataObject
) -> None:
    sampled = Sampled(prompt_lengths, num_generations, 8)
    for _ in range(6):
        sampled.step()
        size = len(sampled.live)
        indices = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=max(1, size - 2), max_size=size)))
        if len(indices) < size:
            sampled.keep(indices)


def test_forked_cache_grows_with_the_text() -> None:
    sampled = Sampled([3], 2, 3 * FIRST_ROOM)
    for _ in range(2 * FIRST_ROOM + 2):
        sampled.step()
    sampled.keep([1])
    sampled.step()
