"""Attention of packed groups on a CPU: a prompt's keys once for all its completions, no mask, nothing computed twice.

A completion's token sees the whole prompt and the part of its own completion before it. The two are attended to apart,
the prompt by all completions of the group in one call, and put together by their normalizers: with outputs o, p and
logs of sums of exponentials l, m

    softmax over both = o + sigmoid(m - l) (p - o)      its normalizer: log(exp l + exp m)

The gradient of a part is that of its own call, given the output and the normalizer of the whole (Dao et al., arXiv
2205.14135, section 3.1 and appendix B: probabilities are computed again from the normalizer).

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
    """Queries and the keys that they see: all of them, or those up to their own place."""

    queries: slice
    keys: slice
    is_causal: bool


def _parts(groups: Sequence[tuple[int, Sequence[int]]]) -> Iterator[_Part]:
    """The causal ones hold every token once, those of a group before its completions' common view of the prompt."""
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
    """query [1, H, T, D], key and value [1, K, T, D], groups as of `PackedGroups` -> [1, H, T, D]."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's own
        query: Tensor,
        key: Tensor,
        value: Tensor,
        groups: Sequence[tuple[int, Sequence[int]]],
        scaling: float,
    ) -> Tensor:
        """Attend part by part."""
        q, k, v = _by_key_head(query, key, value)
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        out = output[0].unflatten(0, q.shape[:2])
        lse = query.new_empty(q.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for part in _parts(groups):
            rows, seen = part.queries, part.keys
            o, normalizer = _flash(q[:, :, rows], k[:, :, seen], v[:, :, seen], 0.0, part.is_causal, scale=scaling)
            if part.is_causal:
                out[:, :, rows], lse[:, :, rows] = o, normalizer
            else:
                share = torch.sigmoid(normalizer - lse[:, :, rows])
                out[:, :, rows].lerp_(o, share[..., None].to(o.dtype))
                lse[:, :, rows] = torch.logaddexp(normalizer, lse[:, :, rows])
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.groups, ctx.scaling = groups, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, output, lse = ctx.saved_tensors
        q, k, v = _by_key_head(query, key, value)
        out, grad_out = (states[0].unflatten(0, q.shape[:2]) for states in (output, gradients[0]))
        grads = [torch.empty_like(states) for states in (query, key, value)]
        grad_q = grads[0][0].unflatten(0, q.shape[:2])
        grad_k, grad_v = grads[1][0], grads[2][0]
        for part in _parts(ctx.groups):
            rows, seen = part.queries, part.keys
            dq, dk, dv = _flash_backward(
                grad_out[:, :, rows],
                q[:, :, rows],
                k[:, :, seen],
                v[:, :, seen],
                out[:, :, rows],
                lse[:, :, rows],
                0.0,
                part.is_causal,
                scale=ctx.scaling,
            )
            if part.is_causal:
                grad_q[:, :, rows], grad_k[:, seen], grad_v[:, seen] = dq, dk.sum(dim=1), dv.sum(dim=1)
            else:
                grad_q[:, :, rows] += dq
                grad_k[:, seen] += dk.sum(dim=1)
                grad_v[:, seen] += dv.sum(dim=1)
        return *grads, None, None


def attend_groups(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[tuple[int, Sequence[int]]], scaling: float
) -> Tensor:
    """`GroupAttention`, with its type."""
    return cast(Tensor, GroupAttention.apply(query, key, value, groups, scaling))


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [K, h, T, D]: the heads that share a key-value head see it in one place of memory."""
    num_sharing = query.shape[1] // key.shape[1]
    q = query[0].unflatten(0, (key.shape[1], num_sharing))
    k, v = (states[0][:, None].expand(-1, num_sharing, -1, -1) for states in (key, value))
    return q, k, v
