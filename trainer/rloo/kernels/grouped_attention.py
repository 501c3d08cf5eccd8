"""Attention over packed groups: tokens end to end, no padding, each prompt once for all its completions.

transformers' attention interface passes a layer's queries, keys and values to `grouped_attention`. The `layout`, an
argument of the model's call, says which tokens attend to which. All other layers of a decoder work on one token at a
time and need no layout. A call without a layout (from `generate`, for example) uses transformers' sdpa attention.

There are two layouts: `PackedGroups` for training and prefill, and `ForkedCache` (forked_cache.py) for decoding.

Shapes: T tokens of a call, H heads, K key-value heads, D size of a head.
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
from rekatrain.trainer.rloo.kernels.block_mask import compiled_flex, make_block_mask
from rekatrain.trainer.rloo.kernels.cpu import attend_groups

NAME = "rekatrain_groups"


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
            output = compiled_flex()(query, key, value, block_mask=self.block_mask, scale=scaling, enable_gqa=True)
        else:
            output = attend_groups(query, key, value, self._groups, scaling)
        return output.transpose(1, 2)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The attention pattern of the groups as FlexAttention reads it."""
        return make_block_mask(self._groups, self._device)
