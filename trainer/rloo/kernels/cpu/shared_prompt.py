"""Attention of packed groups on a CPU: a prompt's keys once for all its completions, no mask, nothing computed twice.

A completion token attends to the whole prompt and to the completion tokens up to itself. These two parts are computed
separately, the prompt part for all completions of the group in one call, and then merged by their normalizers. With
output o and log-sum-exp l of the completion part, p and m of the prompt part:

    output over both = o + sigmoid(m - l) (p - o)      log-sum-exp over both = log(exp l + exp m)

The backward pass of a part is the flash-attention backward of its call, given the merged output and log-sum-exp,
because it recomputes probabilities from the normalizer (Dao et al., arXiv 2205.14135, section 3.1 and appendix B).

Shapes: T tokens of a call, H heads, K key-value heads, h = H / K heads that share one, D size of a head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Queries and the keys that they attend to: all keys, or if `is_causal` the keys up to their own index."""

    queries: slice
    keys: slice
    is_causal: bool


def _parts(groups: Sequence[tuple[int, Sequence[int]]]) -> Iterator[_Part]:
    """Yield each group's parts: causal ones, with each token in exactly one, then the completions over the prompt."""
    first = 0
    for prompt, completions in groups:
        prompt_tokens = slice(first, first + prompt)
        yield _Part(queries=prompt_tokens, keys=prompt_tokens, is_causal=True)
        first += prompt
        for length in completions:
            if length:
                yield _Part(queries=slice(first, first + length), keys=slice(first, first + length), is_causal=True)
            first += length
        if first > prompt_tokens.stop:
            yield _Part(queries=slice(prompt_tokens.stop, first), keys=prompt_tokens, is_causal=False)


class GroupAttention(torch.autograd.Function):
    """Attention over packed groups as an autograd function; see `attend_groups`."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's own
        query: Tensor,
        key: Tensor,
        value: Tensor,
        groups: Sequence[tuple[int, Sequence[int]]],
        scaling: float,
    ) -> Tensor:
        """Compute the causal parts, then merge the prompt parts into them."""
        q, k, v = _by_key_head(query, key, value)
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        out = output[0].unflatten(0, q.shape[:2])
        lse = query.new_empty(q.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for part in _parts(groups):
            queries, keys = part.queries, part.keys
            o, part_lse = _flash(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, part.is_causal, scale=scaling)
            if part.is_causal:
                out[:, :, queries], lse[:, :, queries] = o, part_lse
            else:
                fraction = torch.sigmoid(part_lse - lse[:, :, queries])
                out[:, :, queries].lerp_(o, fraction[..., None].to(o.dtype))
                lse[:, :, queries] = torch.logaddexp(part_lse, lse[:, :, queries])
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.groups, ctx.scaling = groups, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value: sums over the parts."""
        query, key, value, output, lse = ctx.saved_tensors
        q, k, v = _by_key_head(query, key, value)
        out, grad_out = (states[0].unflatten(0, q.shape[:2]) for states in (output, gradients[0]))
        grads = [torch.empty_like(states) for states in (query, key, value)]
        grad_q = grads[0][0].unflatten(0, q.shape[:2])
        grad_k, grad_v = grads[1][0], grads[2][0]
        for part in _parts(ctx.groups):
            queries, keys = part.queries, part.keys
            dq, dk, dv = _flash_backward(
                grad_out[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
                0.0,
                part.is_causal,
                scale=ctx.scaling,
            )
            if part.is_causal:
                grad_q[:, :, queries], grad_k[:, keys], grad_v[:, keys] = dq, dk.sum(dim=1), dv.sum(dim=1)
            else:
                grad_q[:, :, queries] += dq
                grad_k[:, keys] += dk.sum(dim=1)
                grad_v[:, keys] += dv.sum(dim=1)
        return *grads, None, None


def attend_groups(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[tuple[int, Sequence[int]]], scaling: float
) -> Tensor:
    """Attend with query [1, H, T, D] to key and value [1, K, T, D] -> [1, H, T, D]; groups as in `PackedGroups`."""
    return cast(Tensor, GroupAttention.apply(query, key, value, groups, scaling))


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views [K, h, T, D]; heads that share a key-value head read the same memory."""
    num_sharing = query.shape[1] // key.shape[1]
    q = query[0].unflatten(0, (key.shape[1], num_sharing))
    k, v = (states[0][:, None].expand(-1, num_sharing, -1, -1) for states in (key, value))
    return q, k, v
