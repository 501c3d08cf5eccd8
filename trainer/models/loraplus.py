"""LoRA+ (arXiv 2402.12354): the matrices B of an adapter learn `lora.loraplus_lr_ratio` times as fast as the rest.

At the start B is 0 and A is random: with one rate, B learns too slowly in wide models. The paper's ratio is 16, with a
smaller rate of A. As in the paper's code and in PEFT's `create_loraplus_optimizer`, all vectors (magnitudes of DoRA,
norms, biases) learn at the rate of B, and the other matrices (A, whole modules) at the stage's. An adapter on
embeddings has a third rate there, and is refused with LoRA+ (lora_targets.py).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer


def is_fast(name: str, parameter: nn.Parameter) -> bool:
    """Return True for a matrix B and for a vector; under ZeRO-3 by the shape of the whole parameter.

    >>> matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    >>> is_fast("q_proj.lora_B.default.weight", matrix), is_fast("q_proj.lora_A.default.weight", matrix)
    (True, False)
    >>> is_fast("norm.modules_to_save.default.weight", vector)
    True
    """
    return ".lora_B." in name or len(getattr(parameter, "ds_shape", parameter.shape)) == 1


def lr_ratio(lora: Mapping[str, Any] | None) -> float | None:
    """Return the ratio of a section `lora:`, or None if all weights learn at one rate."""
    ratio = (lora or {}).get("loraplus_lr_ratio")
    return None if ratio is None or ratio == 1 else float(ratio)


def split_groups(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]], ratio: float) -> None:
    """Move the fast parameters into groups with `ratio` times the rate, and drop groups that are then empty.

    The optimizer has no state yet, and no schedule.
    """
    fast = {parameter for name, parameter in named if is_fast(name, parameter)}
    old = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for is_group_fast in (False, True):
        for group in old:
            parameters = [parameter for parameter in group["params"] if (parameter in fast) == is_group_fast]
            if parameters:
                rate = group["lr"] * (ratio if is_group_fast else 1)
                optimizer.add_param_group({**group, "params": parameters, "lr": rate})
