"""Prepare the weights of linear layers once for the many small matrix products of decoding.

Under autocast every product casts its weight again, which is most of the work of a decoding step. Layers that compute
in another dtype than that of their weights therefore use one cast copy, and give the same result as autocast.

On a CPU, MKL packs the second operand of a product for its inner kernel at every call. For the 8 to 128 inputs of a
decoding step that takes a quarter to a half of the product's time. Packed in advance, SmolLM2's layers run at 1.2 to
1.5 times the rate of `torch.nn.functional.linear` (tests/benchmarks/sampler.py).

The copies take as much memory as the weights while sampling lasts; gradients and activations do not exist then.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def decoding_weights(model: nn.Module, num_inputs: int, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Let a model's linear layers use prepared copies of their weights within the context; parameters stay untouched.

    num_inputs: usual number of input vectors per product, for which MKL packs; any other number works too
    dtype:      dtype in which the layers compute; None: the dtype of their weights
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    try:
        for layer in layers:
            if dtype not in (None, layer.weight.dtype):
                layer.forward = _cast(layer, dtype)  # type: ignore[assignment,method-assign]  # until the context ends
            elif _can_pack(layer.weight):
                layer.forward = _packed(layer, num_inputs)  # type: ignore[assignment,method-assign]  # likewise
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _cast(layer: nn.Linear, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.detach().to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return lambda inputs: nn.functional.linear(inputs.to(dtype), weight, bias)


def _can_pack(weight: Tensor) -> bool:
    return torch.backends.mkl.is_available() and weight.device.type == "cpu" and weight.dtype == torch.float32


def _packed(layer: nn.Linear, num_inputs: int) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), layer.bias
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, num_inputs)

    def forward(inputs: Tensor) -> Tensor:
        # The last argument is the number of inputs that the weight was packed for. It is set to the actual number,
        # because torch uses the plain weight where the two differ.
        outputs = torch.ops.mkl._mkl_linear(inputs, packed, weight, bias, inputs.numel() // inputs.shape[-1])
        assert isinstance(outputs, Tensor)
        return outputs

    return forward
