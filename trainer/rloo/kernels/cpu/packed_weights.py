"""Linear layers with their weights made ready once for the many small products of decoding.

Under autocast every product casts its weight anew, which for a decoding step is most of the work: layers that compute
in another dtype than their weights' use a copy in it, and give what autocast gives.

On a CPU, MKL lays the second operand of a product out for its inner kernel at every call, which for the 8 to 128 rows
of a decoding step costs a quarter to a half of the product. Laid out beforehand, SmolLM2's layers run at 1.2 to 1.5
times the rate of `torch.nn.functional.linear` (tests/benchmarks/sampler.py).

The copies take the memory of the weights for as long as sampling lasts, when there is neither gradient nor activation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def decoding_weights(model: nn.Module, num_rows: int, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within it, a model's linear layers multiply by ready copies; its parameters are not touched.

    num_rows: rows of a usual product, by which a layout is chosen; any number may be multiplied
    dtype:    what the layers compute in; None: in their weights'
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    try:
        for layer in layers:
            if dtype not in (None, layer.weight.dtype):
                layer.forward = _cast(layer, dtype)  # type: ignore[assignment,method-assign]  # its own, for a while
            elif _can_pack(layer.weight):
                layer.forward = _packed(layer, num_rows)  # type: ignore[assignment,method-assign]  # likewise
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


def _packed(layer: nn.Linear, num_rows: int) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), layer.bias
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, num_rows)

    def forward(inputs: Tensor) -> Tensor:
        # torch takes the plain weight where the number of rows is not the one that it is told was packed for.
        outputs = torch.ops.mkl._mkl_linear(inputs, packed, weight, bias, inputs.numel() // inputs.shape[-1])
        assert isinstance(outputs, Tensor)
        return outputs

    return forward
