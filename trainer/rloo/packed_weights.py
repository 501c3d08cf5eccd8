"""Linear layers on a CPU with their weights laid out once for many products of few rows.

MKL lays the second operand of a product out for its inner kernel at every call, which for the 8 to 128 rows of a
decoding step costs a quarter to a half of the product. Laid out beforehand, SmolLM2's layers run at 1.2 to 1.5 times
the rate of `torch.nn.functional.linear` (tests/benchmarks/sampler.py). The copies take the memory of the weights for as
long as sampling lasts, when there is neither a gradient nor an activation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def packed_weights(model: nn.Module, num_rows: int) -> Iterator[None]:
    """Within it, a model's float32 linear layers on a CPU multiply by packed copies; elsewhere nothing changes.

    num_rows: rows of a usual product, by which the layout is chosen; any number may be multiplied
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _can_pack(module.weight)]
    for layer in layers:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight.detach(), num_rows)
        layer.forward = partial(_linear, layer, packed)  # type: ignore[method-assign]  # of this instance, for a while
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_pack(weight: Tensor) -> bool:
    return torch.backends.mkl.is_available() and weight.device.type == "cpu" and weight.dtype == torch.float32


def _linear(layer: nn.Linear, packed: Tensor, inputs: Tensor) -> Tensor:
    # torch falls back on the plain weight where the number of rows is not the one that it is told was packed for.
    num_rows = inputs.numel() // inputs.shape[-1]
    outputs = torch.ops.mkl._mkl_linear(inputs, packed, layer.weight, layer.bias, num_rows)
    assert isinstance(outputs, Tensor)
    return outputs
