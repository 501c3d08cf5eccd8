"""Attention over packed groups: tokens end to end, no padding, each prompt once for all its completions.

transformers' attention interface passes a layer's queries, keys and values to `grouped_attention`. The `layout`, an
argument of the model's call, says which tokens attend to which. All other layers of a decoder work on one token at a
time and need no layout. A call without a layout (from `generate`, for example) uses transformers' sdpa attention.

There are two layouts: `PackedGroups` for training and prefill, and `ForkedCache` for decoding, whose key-value cache
holds a prompt's states once per group and each completion's own beside them.

Shapes: T tokens of a call, H heads, K key-value heads, h = H / K heads that share one, D size of a head; P prompts,
G completions per prompt, N completions that have not ended yet, L tokens of the longest prompt.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.rloo.kernels.block_mask import attend_blocks, make_block_mask
from rekatrain.trainer.rloo.kernels.cpu import attend_groups

NAME = "rekatrain_groups"
# Tokens per completion that are allocated at first; the allocation doubles when it is full.
FIRST_ROOM = 64


class Layout(Protocol):
    """An attention pattern: which tokens of a call of the model attend to which."""

    @property
    def position_ids(self) -> Tensor:
        """Positions of the tokens, [B, T]."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend with query [B, H, T, D] to key and value [B, K, T, D] -> [B, T, H, D]."""
        ...


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    **kwargs: Any,  # the other arguments that a model passes to its attention function
) -> tuple[Tensor, None]:
    """Attend under `layout`; this is the signature with which transformers calls attention functions."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Under bfloat16 autocast over float32 weights, the rotary embedding returns float32 queries and keys.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return layout.attend(cast(int, module.layer_idx), query, key, value, kwargs["scaling"]), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def decoder_and_head(policy: Policy) -> tuple[PreTrainedModel, nn.Module]:
    """Return the two halves of a policy, with the adapter where it has one."""
    causal_lm = cast(PreTrainedModel, policy.get_base_model() if isinstance(policy, PeftModel) else policy)
    return causal_lm.get_decoder(), cast(nn.Module, causal_lm.get_output_embeddings())


def run_decoder(decoder: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Run a decoder under a layout: ids and positions [B, T] -> last hidden states [B, T, hidden size]."""
    if decoder.config._attn_implementation != NAME:
        decoder.set_attn_implementation(NAME)
    # transformers passes a mask of four dimensions on unchanged; without one it would build a mask that nobody reads.
    no_mask = input_ids.new_empty(1, 1, 1, 1)
    return decoder(
        input_ids=input_ids, position_ids=position_ids, attention_mask=no_mask, use_cache=False, layout=layout
    ).last_hidden_state


class PackedGroups:
    """Groups end to end: a prompt, then its completions, which attend to the prompt and themselves only."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        """Take for each group the length of its prompt and of its completions, in the order of the tokens."""
        self._groups = groups
        self._device = device

    @property
    def position_ids(self) -> Tensor:
        """Positions of the tokens, [1, T]; each completion's positions continue from the end of its prompt."""
        spans = [span for prompt, each in self._groups for span in [(0, prompt), *((prompt, prompt + n) for n in each)]]
        return torch.cat([torch.arange(*span, device=self._device) for span in spans])[None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend by FlexAttention on a GPU, skipping empty blocks, and by `attend_groups` on a CPU; both are exact."""
        if self._device.type == "cuda":
            output = attend_blocks(query, key, value, self.block_mask, scaling)
        else:
            output = attend_groups(query, key, value, self._groups, scaling)
        return output.transpose(1, 2)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The attention pattern of the groups as FlexAttention reads it."""
        return make_block_mask(self._groups, self._device)


class ForkedCache:
    """The layout of prompts' calls of the model, and of calls with one new token per live completion.

    The states of completions lie in the order of the batch; `_members` says which completion each one is. When
    completions end, those at the end of the batch move to their indices, and nothing else moves. Later groups are
    admitted to the rows behind; their completions are shorter than the earlier ones'.
    """

    def __init__(self, prompt_lengths: Sequence[int], num_generations: int, max_length: int, device: torch.device):
        self._num_generations = num_generations
        self._max_length = max_length
        self._device = device
        # Prompts lie in slots. The first call of each layer after an admission is that of the new prompts.
        self._prompt_lengths: list[int] = []
        self._new_slots: list[int] = []
        self._filled: set[int] = set()  # layers
        self._prompt_states: dict[int, tuple[Tensor, Tensor]] = {}
        self._completion_states: list[tuple[Tensor, Tensor]] = []
        # For each completion of the batch: slot of its prompt * G + its index in the group; tokens decoded before it.
        self._members: list[int] = []
        self._starts: list[int] = []
        self._num_decoded = 0
        # Rows that admissions may use: no fewer are kept in memory.
        self._num_rows = len(prompt_lengths) * num_generations
        self.admit(prompt_lengths)

    def close(self) -> None:
        """Allow no more admissions: the memory of completions that have ended is not kept when the others grow."""
        self._num_rows = 0

    def admit(self, prompt_lengths: Sequence[int]) -> None:
        """Add groups at the end of the batch. The next call of the model is that of their prompts, in `prompts`.

        The batch never has more completions than at first.
        """
        used = {member // self._num_generations for member in self._members}
        free = [slot for slot in range(len(self._prompt_lengths)) if slot not in used]
        self._new_slots = []
        for length in prompt_lengths:
            slot = free.pop(0) if free else len(self._prompt_lengths)
            self._prompt_lengths[slot : slot + 1] = [length]
            self._new_slots.append(slot)
            self._members += range(slot * self._num_generations, (slot + 1) * self._num_generations)
            self._starts += [self._num_decoded] * self._num_generations
        self.prompts = PackedGroups([(length, []) for length in prompt_lengths], self._device)
        self._filled.clear()
        self._index_prompts()
        self._index_batch()

    def _index_prompts(self) -> None:
        lengths = torch.tensor(self._prompt_lengths, device=self._device)
        is_padding = torch.arange(max(self._prompt_lengths), device=self._device) >= lengths[:, None]
        self._prompt_mask = torch.zeros(is_padding.shape, device=self._device).masked_fill_(is_padding, -torch.inf)

    def _index_batch(self) -> None:
        """Send what changes with the batch to the device: nothing of it is sent for a token."""
        # Of each live completion: slot of its prompt * G + its index in the group; tokens stored, as in `lengths`.
        self.members_N = torch.tensor(self._members, device=self._device)
        starts_N = torch.tensor(self._starts, device=self._device)
        self.lengths_N = self._num_decoded - starts_N
        lengths = [self._prompt_lengths[member // self._num_generations] for member in self._members]
        self._offsets_N = torch.tensor(lengths, device=self._device) - starts_N
        self._is_whole = self._members == list(range(len(self._prompt_lengths) * self._num_generations))
        self._is_even = len(set(self._starts)) <= 1

    @property
    def position_ids(self) -> Tensor:
        """Position of the next token of each live completion, [N, 1]."""
        return (self._offsets_N + self._num_decoded)[:, None]

    @property
    def num_groups(self) -> int:
        """Number of groups with a live completion."""
        return len({member // self._num_generations for member in self._members})

    @property
    def lengths(self) -> list[int]:
        """Tokens of each live completion that are stored."""
        return [self._num_decoded - start for start in self._starts]

    @property
    def _length(self) -> int:
        """Tokens of the longest live completion."""
        return self._num_decoded - min(self._starts)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the keys and values of the call, then attend to all that are stored for the same text."""
        if layer not in self._filled:
            self._filled.add(layer)
            keys, values = self._prompt_states.get(layer, (None, None))
            self._prompt_states[layer] = self._with_new_prompts(keys, key), self._with_new_prompts(values, value)
            return self.prompts.attend(layer, query, key, value, scaling)
        return self._attend_live(layer, query[:, :, 0] * scaling, key[:, :, 0], value[:, :, 0])[:, None]

    def advance(self) -> None:
        """Count the new token, after every layer has stored its states."""
        self._num_decoded += 1
        self.lengths_N = self.lengths_N + 1

    def keep(self, live: Sequence[int]) -> list[int]:
        """Drop all completions but those at the batch indices `live` (ascending).

        Return the old index of each completion of the new batch: of 5 completions, keep([1, 3, 4]) -> [3, 1, 4].
        """
        order = list(live)
        holes = sorted(set(range(len(order))) - set(order))
        # Completions beyond the new end move into the holes that ended ones left; the others stay where they are.
        moved = [index for index in order if index >= len(order)]
        order = list(range(len(order)))
        length = self._length
        for hole, index in zip(holes, moved, strict=True):
            order[hole] = index
            for keys, values in self._completion_states:
                keys[hole, :, :length] = keys[index, :, :length]
                values[hole, :, :length] = values[index, :, :length]
        self._members = [self._members[index] for index in order]
        self._starts = [self._starts[index] for index in order]
        self._index_batch()
        return order

    def _with_new_prompts(self, old: Tensor | None, states: Tensor) -> Tensor:
        """Put the new prompts' keys or values, [1, K, all tokens, D], into their slots -> [P, K, L, D]."""
        shape = (len(self._prompt_lengths), states.shape[1], max(self._prompt_lengths), states.shape[3])
        stored = states.new_zeros(shape)
        if old is not None:
            room = min(old.shape[2], shape[2])
            stored[: len(old), :, :room] = old[:, :, :room]
        lengths = [self._prompt_lengths[slot] for slot in self._new_slots]
        for slot, length, chunk in zip(self._new_slots, lengths, states[0].split(lengths, dim=1), strict=True):
            stored[slot, :, :length] = chunk
        return stored

    def _room(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values of completions, with room for one more token each."""
        if layer == len(self._completion_states):
            room = min(FIRST_ROOM, self._max_length)
            shape = (max(len(key), self._num_rows), key.shape[1], room, key.shape[2])
            self._completion_states.append((key.new_zeros(shape), key.new_zeros(shape)))
        keys, values = self._completion_states[layer]
        length = self._length
        if length == keys.shape[2]:
            room = min(2 * length, self._max_length)
            num_rows = max(len(key), self._num_rows)
            keys, values = (nn.functional.pad(states[:num_rows], (0, 0, 0, room - length)) for states in (keys, values))
            self._completion_states[layer] = keys, values
        return keys, values

    def _attend_live(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with query [N, H, D], key and value [N, K, D] -> [N, H, D]; heads that share keys are one product."""
        (N, H, D), K = query.shape, key.shape[1]
        keys, values = self._room(layer, key)
        length = self._length
        if self._is_even:
            keys[:N, :, length], values[:N, :, length] = key, value
        else:
            rows_N, own_N = torch.arange(N, device=self._device), self.lengths_N
            keys[rows_N, :, own_N], values[rows_N, :, own_N] = key, value
        keys, values = keys[:N, :, : length + 1], values[:N, :, : length + 1]
        prompt_keys, prompt_values = self._prompt_states[layer]

        query = query.reshape(N, K, H // K, D)
        completion_scores = query @ keys.transpose(2, 3)
        if not self._is_even:
            is_later_NT = torch.arange(length + 1, device=self._device) > self.lengths_N[:, None]
            completion_scores = completion_scores.masked_fill(is_later_NT[:, None, None], -torch.inf)
        prompt_scores = self._by_prompt(query) @ prompt_keys.transpose(2, 3)
        prompt_scores += self._prompt_mask[:, None, None].to(query.dtype)
        scores = torch.cat([self._by_completion(prompt_scores), completion_scores], dim=3)
        weights = torch.softmax(scores, dim=3, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        L = prompt_keys.shape[2]
        from_prompt = self._by_completion(self._by_prompt(weights[..., :L]) @ prompt_values)
        return (from_prompt + weights[..., L:] @ values).reshape(N, H, D)

    def _by_prompt(self, states: Tensor) -> Tensor:
        """Collect live completions [N, K, h, X] by prompt, with zeros for those that ended -> [P, K, G * h, X]."""
        P, G = len(self._prompt_lengths), self._num_generations
        if not self._is_whole:
            states = states.new_zeros(P * G, *states.shape[1:]).index_copy_(0, self.members_N, states)
        return states.view(P, G, *states.shape[1:]).transpose(1, 2).flatten(2, 3)

    def _by_completion(self, states: Tensor) -> Tensor:
        """Invert `_by_prompt`, [P, K, G * h, X] -> [N, K, h, X]."""
        states = states.unflatten(2, (self._num_generations, -1)).transpose(1, 2).flatten(0, 1)
        return states if self._is_whole else states[self.members_N]
