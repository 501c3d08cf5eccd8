"""Float32 weights for all that is trained on a bfloat16 model, as PEFT keeps the matrices of LoRA.

Near 1 a bfloat16 weight has steps of 1/128: an update of 1e-4 changes nothing. PEFT's `autocast_adapter_dtype` leaves
out modules that are trained whole (`modules_to_save`, the head of a classifier) and the base's biases (`bias: all`).
Here they are float32, too, and their modules go on computing with them rounded to bfloat16. So the policy that is
trained and sampled is the one that a bfloat16 export has, to the bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

LOW_PRECISION = (torch.bfloat16, torch.float16)


def train_in_float32(model: nn.Module) -> bool:
    """Keep the trained weights in float32 and round them where they are used -> False if all were float32 before."""
    rounded = {
        parameter: parameter.dtype
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.dtype in LOW_PRECISION
    }
    for module in model.modules():
        dtypes = {rounded[parameter] for parameter in module.parameters(recurse=False) if parameter in rounded}
        if dtypes:
            (dtype,) = dtypes  # a module has one dtype
            # The class and not the `forward` of the module, which wrappers replace.
            module.__class__ = _rounding(type(module), dtype)  # type: ignore[arg-type]  # classes are hashable
    for parameter in rounded:
        parameter.data = parameter.data.float()
    return bool(rounded)


def load_in_float32(model: PeftModel, adapter: str) -> None:
    """Load an adapter's weights again: those that the loader has rounded to the model's dtype become float32."""
    set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))


@cache
def _rounding(kind: type[nn.Module], dtype: torch.dtype) -> type[nn.Module]:
    """Return a class that computes as `kind` does, with its float32 parameters rounded to `dtype`."""
    compute: Callable[..., Any] = kind.forward

    def forward(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        with _rounded(self, dtype):
            return compute(self, *inputs, **options)

    def look_up(self: nn.Embedding, ids: Tensor) -> Tensor:
        rows: Tensor = compute(self, ids)  # rounding these rows is rounding the table, without a copy of it
        return rows.to(dtype)

    own = {"forward": look_up if kind is nn.Embedding else forward, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), own)  # libraries read the name


@contextmanager
def _rounded(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Context in which the attributes of a module's float32 parameters are rounded copies of them."""
    names = [name for name, each in module.named_parameters(recurse=False) if each.dtype == torch.float32]
    attributes = vars(module)  # looked up before the module's parameters
    try:
        for name in names:
            attributes[name] = getattr(module, name).to(dtype)
        yield
    finally:
        for name in names:
            attributes.pop(name, None)
