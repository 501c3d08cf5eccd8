"""Everything that only a CPU needs; on a GPU, read on in grouped_attention.py.

1. Attention of packed groups: a prompt's keys once for all its completions, no mask, nothing computed twice. A
   completion token attends to the whole prompt and to the completion tokens up to itself. These two parts are computed
   separately, the prompt part for all completions of the group in one call, and then merged by their normalizers. With
   output o and log-sum-exp l of the completion part, p and m of the prompt part:

       output over both = o + sigmoid(m - l) (p - o)      log-sum-exp over both = log(exp l + exp m)

   The backward pass of a part is the flash-attention backward of its call, given the merged output and log-sum-exp,
   because it recomputes probabilities from the normalizer (Dao et al., arXiv 2205.14135, section 3.1 and appendix B).
2. The cost rule: is a prompt run once for its group, or once with each completion?
3. Weights packed once for the many small matrix products of decoding.

Shapes: T tokens of a call, H heads, K key-value heads, h = H / K heads that share one, D size of a head.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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


# ---- The cost rule

# Cost of merging one attention output element from its prompt part and its completion part, in multiply-adds.
# Measured on one CPU: 1.8 ns, forward and backward, at 110 billion multiply-adds per second.
JOIN = 64.0


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Cost of one forward pass, in multiply-adds.

    token: per token, in the linear layers
    pair:  per pair of a query and a key, over all layers
    join:  per completion token that is run apart from its prompt: attention merges the two parts
    """

    token: float
    pair: float
    join: float

    @classmethod
    def of(cls, decoder: PreTrainedModel) -> "PassCost":
        """Return the cost of a decoder, adapters included."""
        config = decoder.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_hidden_layers * config.num_attention_heads * head_dim
        return cls(
            # By the layer's sizes: a weight sharded by ZeRO-3 is empty between passes, a 4-bit weight is packed.
            token=float(sum(m.in_features * m.out_features for m in decoder.modules() if isinstance(m, nn.Linear))),
            pair=2.0 * width,
            # On a GPU one kernel reads the keys of the prompt and of the completion: nothing is merged.
            join=0.0 if decoder.device.type == "cuda" else JOIN * width,
        )

    def shares_prompt(self, prompt: int, completions: Sequence[int]) -> bool:
        """Return True where running a prompt once for all its completions costs less than with each.

        >>> cost = PassCost(token=100.0, pair=1.0, join=10.0)
        >>> cost.shares_prompt(50, [10, 10]), cost.shares_prompt(1, [1000, 1000])
        (True, False)
        """
        return self.join * sum(completions) <= self._again(prompt, len(completions))

    def of_group(self, prompt: int, completions: Sequence[int]) -> float:
        """Cost of a prompt with its completions, run in the cheaper way.

        >>> PassCost(token=100.0, pair=1.0, join=10.0).of_group(50, [10, 10])
        9550.0
        """
        num_pairs = prompt**2 / 2 + sum(own * (prompt + own / 2) for own in completions)
        once = self.token * (prompt + sum(completions)) + self.pair * num_pairs
        return once + min(self.join * sum(completions), self._again(prompt, len(completions)))

    def _again(self, prompt: int, num_completions: int) -> float:
        # Running the prompt again costs its tokens and their attention to each other; the rest is the same either way.
        return (num_completions - 1) * (self.token * prompt + self.pair * prompt**2 / 2)

    def longest_shared(self, prompt: int, num_completions: int, max_length: int) -> int:
        """Length up to which completions of equal length share their prompt, at most `max_length` tokens.

        >>> PassCost(token=100.0, pair=1.0, join=10.0).longest_shared(50, 2, 1000)
        312
        """
        lengths = range(1, max_length + 1)
        return bisect_left(lengths, True, key=lambda own: not self.shares_prompt(prompt, [own] * num_completions))

    def describe(self, prompt: int, num_completions: int, max_length: int) -> str:
        """Describe the choice for a prompt of this length, for the log."""
        longest = self.longest_shared(prompt, num_completions, max_length)
        beyond = "" if longest == max_length else ", and with each of them above"
        return f"a prompt of {prompt} tokens is run once for {num_completions} completions of up to {longest}{beyond}"


def num_tokens(prompt: int, completions: Sequence[int], is_shared: bool) -> int:
    """Number of tokens that the model is run on for one part of a group."""
    return sum(completions) + prompt * (1 if is_shared else len(completions))


# ---- Weights for decoding


@contextmanager
def decoding_weights(model: nn.Module, num_inputs: int, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Let a model's linear layers use prepared copies of their weights within the context; parameters stay untouched.

    Under autocast every product casts its weight again, which is most of the work of a decoding step. Layers that
    compute in another dtype than that of their weights therefore use one cast copy, and give the result of autocast.
    MKL and oneDNN also pack the weight at every call, for the 8 to 128 inputs of a decoding step a quarter to a half of
    the product's time; here they do it once. Where the CPU has AVX-512, oneDNN's products are the faster ones: on an
    AMD EPYC about twice the rate of MKL's in float32, at 32 inputs (tests/benchmarks/sampler.py). The copies take as
    much memory as the weights while sampling lasts, when there are no gradients and no activations.

    num_inputs: usual number of input vectors per product, for which weights are packed; any other number works too
    dtype:      dtype in which the layers compute; None: the dtype of their weights
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    try:
        for layer in layers:
            weight = layer.weight.detach().to(dtype or layer.weight.dtype)
            multiply = _packed(weight, num_inputs)
            if multiply is not None or weight.dtype != layer.weight.dtype:
                # until the context ends
                layer.forward = _linear(weight, layer.bias, multiply)  # type: ignore[assignment,method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


Product = Callable[[Tensor, Tensor | None], Tensor]


def _linear(weight: Tensor, bias: Tensor | None, multiply: Product | None) -> Callable[[Tensor], Tensor]:
    dtype = weight.dtype
    bias = None if bias is None else bias.detach().to(dtype)
    if multiply is None:
        return lambda inputs: nn.functional.linear(inputs.to(dtype), weight, bias)
    return lambda inputs: multiply(inputs.to(dtype), bias)  # the unpacked weight is not kept


def _packed(weight: Tensor, num_inputs: int) -> Product | None:
    """Return the product with a packed weight; None where no library packs this one."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return _packed_by_onednn(weight, num_inputs)
    if torch.backends.mkl.is_available() and weight.dtype == torch.float32:
        return _packed_by_mkl(weight, num_inputs)
    return None


def _packed_by_onednn(weight: Tensor, num_inputs: int) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_inputs)

    def multiply(inputs: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], ""))

    return multiply


def _packed_by_mkl(weight: Tensor, num_inputs: int) -> Product:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, num_inputs)

    def multiply(inputs: Tensor, bias: Tensor | None) -> Tensor:
        # The last argument is the number of inputs that the weight was packed for. It is set to the actual number,
        # because torch uses the plain weight where the two differ.
        number = inputs.numel() // inputs.shape[-1]
        return cast(Tensor, torch.ops.mkl._mkl_linear(inputs, packed, weight, bias, number))

    return multiply
