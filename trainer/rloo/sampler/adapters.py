"""LoRA layers while sampling: copies of the adapter in the dtype of the arithmetic, added by one fused product.

Of a bfloat16 model PEFT keeps adapters in float32, so that each decoding step casts inputs and results of every layer;
with scaling and sum that is seven kernels for a layer which needs one without an adapter. Here it is three: the base's
product, inputs A^T, and a product with B^T * scaling that adds to the base's result, rounded once.

The adapter is not merged into the weights. Where W is in bfloat16, steps of W + B A * scaling are as large as a young
adapter's whole change: the sampler would draw from another policy than the trained one. A merged copy also takes
the memory of the weights again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@contextmanager
def decoding_adapters(model: nn.Module) -> Iterator[None]:
    """Let a model's LoRA layers use fused products within the context, without gradients; parameters stay untouched.

    Layers that compute more than W x + B A x * scaling (DoRA, a bias of B, several adapters), and layers whose adapter
    is switched off or merged, stay as they are.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    try:
        for layer in layers:
            layer.forward = _fused(layer)  # until the context ends
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_plain(layer: LoraLayer) -> bool:
    if not isinstance(layer.base_layer, nn.Linear):
        return False
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None


def _fused(layer: LoraLayer) -> Callable[[Tensor], Tensor]:
    (name,) = layer.active_adapters
    base, scaling = layer.base_layer, layer.scaling[name]
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(base, nn.Linear) and isinstance(down, Tensor) and isinstance(up, Tensor)
    copies: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def forward(inputs: Tensor) -> Tensor:
        result: Tensor = base(inputs)
        dtype = result.dtype
        if dtype not in copies:
            copies[dtype] = down.detach().t().to(dtype), (up.detach().t() * scaling).to(dtype)
        down_t, up_t = copies[dtype]
        # The base's result is new memory: nothing else reads it.
        result.view(-1, result.shape[-1]).addmm_(inputs.reshape(-1, inputs.shape[-1]).to(dtype) @ down_t, up_t)
        return result

    return forward
