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
from functools import cache, cached_property
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.rloo.kernels.block_mask import make_block_mask
from rekatrain.trainer.rloo.kernels.cpu import attend_groups

NAME = "rekatrain_groups"
# Tokens per completion that are allocated at first; the allocation doubles when it is full.
FIRST_ROOM = 64
# Graphs of FlexAttention in one process: about 7 in a run with an adapter and an evaluation; torch's default is 8.
RECOMPILE_LIMIT = 32


class Layout(Protocol):
    """An attention pattern: which tokens of a call of the model attend to which."""

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
        spans = [span for prompt, completions in self._groups for span in _positions(prompt, completions)]
        return torch.cat([torch.arange(*span, device=self._device) for span in spans])[None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend by FlexAttention on a GPU, skipping empty blocks, and by `attend_groups` on a CPU; both are exact."""
        if self._device.type == "cuda":
            output = compiled_flex()(query, key, value, block_mask=self.block_mask, scale=scaling, enable_gqa=True)
        else:
            output = attend_groups(query, key, value, self._groups, scaling)
        return output.transpose(1, 2)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The attention pattern of the groups as FlexAttention reads it."""
        return make_block_mask(self._groups, self._device)


def _positions(prompt: int, completions: Sequence[int]) -> list[tuple[int, int]]:
    return [(0, prompt), *((prompt, prompt + length) for length in completions)]


@cache
def compiled_flex() -> Any:  # torch.compile loses the signature
    """Return FlexAttention as one compiled graph.

    Uncompiled it is dense attention with a score for each pair of tokens. `fullgraph` makes an error of what would
    otherwise fall back to that without a message: a graph break, or more graphs than `recompile_limit`. Lengths share a
    graph; one more is compiled for each of: less than two blocks, a single token, no gradient, another dtype.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


class ForkedCache:
    """The layout of the prompts' call of the model, and then of each call with one new token per live completion.

    The states of completions lie in the order of the batch; `_members_N` says which completion each one is. When
    completions end, those at the end of the batch move to their indices, and nothing else moves.
    """

    def __init__(self, prompt_lengths: Sequence[int], num_generations: int, max_length: int, device: torch.device):
        self.prompts = PackedGroups([(length, []) for length in prompt_lengths], device)
        self._prompt_lengths = list(prompt_lengths)
        self._num_generations = num_generations
        self._max_length = max_length
        # For each completion of the batch: index of its prompt * G + its index in the group.
        self._members_N = torch.arange(len(prompt_lengths) * num_generations, device=device)
        self._length = 0
        self._prompt_states: list[tuple[Tensor, Tensor]] = []
        self._completion_states: list[tuple[Tensor, Tensor]] = []
        lengths = torch.tensor(self._prompt_lengths, device=device)
        is_padding = torch.arange(max(prompt_lengths), device=device) >= lengths[:, None]
        self._prompt_mask = torch.zeros(is_padding.shape, device=device).masked_fill_(is_padding, -torch.inf)

    @property
    def position_ids(self) -> Tensor:
        """Position of the next token of each live completion, [N, 1]."""
        lengths = torch.tensor(self._prompt_lengths, device=self._members_N.device)
        return (lengths[self._members_N // self._num_generations] + self._length)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the keys and values of the call, then attend to all that are stored for the same text."""
        if layer == len(self._prompt_states):
            self._prompt_states.append((self._padded(key), self._padded(value)))
            return self.prompts.attend(layer, query, key, value, scaling)
        return self._attend_live(layer, query[:, :, 0] * scaling, key[:, :, 0], value[:, :, 0])[:, None]

    def advance(self) -> None:
        """Count the new token, after every layer has stored its states."""
        self._length += 1

    def keep(self, live: Sequence[int]) -> list[int]:
        """Drop all completions but those at the batch indices `live` (ascending).

        Return the old index of each completion of the new batch: of 5 completions, keep([1, 3, 4]) -> [3, 1, 4].
        """
        order = list(live)
        holes = sorted(set(range(len(order))) - set(order))
        # Completions beyond the new end move into the holes that ended ones left; the others stay where they are.
        moved = [index for index in order if index >= len(order)]
        order = list(range(len(order)))
        for hole, index in zip(holes, moved, strict=True):
            order[hole] = index
            for keys, values in self._completion_states:
                keys[hole, :, : self._length] = keys[index, :, : self._length]
                values[hole, :, : self._length] = values[index, :, : self._length]
        self._members_N = self._members_N[torch.tensor(order, device=self._members_N.device)]
        return order

    def _padded(self, states: Tensor) -> Tensor:
        """Pad the prompts' keys or values, [1, K, all tokens, D] -> [P, K, L, D]."""
        chunks = [chunk.transpose(0, 1) for chunk in states[0].split(self._prompt_lengths, dim=1)]
        return torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True).transpose(1, 2).contiguous()

    def _room(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values of completions, with room for one more token each."""
        if layer == len(self._completion_states):
            room = min(FIRST_ROOM, self._max_length)
            shape = (len(key), key.shape[1], room, key.shape[2])
            self._completion_states.append((key.new_empty(shape), key.new_empty(shape)))
        keys, values = self._completion_states[layer]
        if self._length == keys.shape[2]:
            room = min(2 * self._length, self._max_length)
            keys, values = (_grown(states[: len(key)], room) for states in (keys, values))
            self._completion_states[layer] = keys, values
        return keys, values

    def _attend_live(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with query [N, H, D], key and value [N, K, D] -> [N, H, D]; heads that share keys are one product."""
        (N, H, D), K = query.shape, key.shape[1]
        keys, values = self._room(layer, key)
        keys[:N, :, self._length], values[:N, :, self._length] = key, value
        keys, values = keys[:N, :, : self._length + 1], values[:N, :, : self._length + 1]
        prompt_keys, prompt_values = self._prompt_states[layer]

        query = query.reshape(N, K, H // K, D)
        completion_scores = query @ keys.transpose(2, 3)
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
        if len(states) < P * G:
            states = states.new_zeros(P * G, *states.shape[1:]).index_copy_(0, self._members_N, states)
        return states.view(P, G, *states.shape[1:]).transpose(1, 2).flatten(2, 3)

    def _by_completion(self, states: Tensor) -> Tensor:
        """Invert `_by_prompt`, [P, K, G * h, X] -> [N, K, h, X]."""
        states = states.unflatten(2, (self._num_generations, -1)).transpose(1, 2).flatten(0, 1)
        return states if len(self._members_N) == len(states) else states[self._members_N]


def _grown(states: Tensor, room: int) -> Tensor:
    larger = states.new_empty(*states.shape[:2], room, states.shape[3])
    larger[:, :, : states.shape[2]] = states
    return larger
