"""Attention over packed groups: tokens end to end, no padding, each prompt once for all its completions.

transformers' attention interface hands a layer's queries, keys and values to `grouped_attention`; the `layout` that
went into the model's call says who sees whom. Everything else in a decoder is one token at a time and needs no layout.
A call without one (by `generate`, say) is transformers' own sdpa attention.

Shapes: T tokens of a call, H heads, K key-value heads, D size of a head.
"""

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, Protocol, cast

import torch
from rekatrain.trainer.rloo.kernels.cpu.shared_prompt import attend_groups
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rekatrain_groups"


class Layout(Protocol):
    """Who sees whom in a call of the model."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of query [B, H, T, D] over key and value [B, K, T, D] -> [B, T, H, D]."""
        ...


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    **kwargs: Any,  # whatever a model hands to its attention function
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # In bfloat16 arithmetic over float32 weights, the rotation of queries and keys leaves them in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return layout.attend(cast(int, module.layer_idx), query, key, value, kwargs["scaling"]), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def run_decoder(decoder: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Hidden states of a call under a layout; ids and positions are [B, T] -> [B, T, D]."""
    if decoder.config._attn_implementation != NAME:
        decoder.set_attn_implementation(NAME)
    # transformers hands on a mask of four dimensions as it is, and so builds none that nobody reads.
    no_mask = input_ids.new_empty(1, 1, 1, 1)
    return decoder(
        input_ids=input_ids, position_ids=position_ids, attention_mask=no_mask, use_cache=False, layout=layout
    ).last_hidden_state


class PackedGroups:
    """Groups end to end: a prompt, then its completions, which see the prompt and themselves but not each other."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        """`groups`: for each, the prompt's length and those of its completions, in the order of the tokens."""
        self._groups = groups
        self._device = device

    @property
    def position_ids(self) -> Tensor:
        """[1, T]: a completion's positions go on where its prompt ends."""
        spans = [span for prompt, completions in self._groups for span in _positions(prompt, completions)]
        return torch.cat([torch.arange(*span, device=self._device) for span in spans])[None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Exact on either device: FlexAttention over the blocks that matter on a GPU, part by part without one."""
        if self._device.type == "cuda":
            output = _compiled_flex()(query, key, value, block_mask=self.block_mask, scale=scaling, enable_gqa=True)
        else:
            output = attend_groups(query, key, value, self._groups, scaling)
        return output.transpose(1, 2)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same for FlexAttention."""
        device = self._device
        group_of = [place for place, (prompt, rows) in enumerate(self._groups) for _ in range(prompt + sum(rows))]
        row_of = [
            row
            for prompt, rows in self._groups
            for row, length in enumerate([prompt, *rows])  # row 0 is the prompt
            for _ in range(length)
        ]
        group_T, row_T = torch.tensor(group_of, device=device), torch.tensor(row_of, device=device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_in_view = (row_T[key] == 0) | (row_T[key] == row_T[query])
            return (query >= key) & (group_T[query] == group_T[key]) & is_in_view

        return create_block_mask(sees, None, None, len(group_of), len(group_of), device=device)


def _positions(prompt: int, completions: Sequence[int]) -> list[tuple[int, int]]:
    return [(0, prompt), *((prompt, prompt + length) for length in completions)]


@cache
def _compiled_flex() -> Any:  # torch.compile loses the signature
    return torch.compile(flex_attention, dynamic=True)
