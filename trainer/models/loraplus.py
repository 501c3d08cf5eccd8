"""LoRA+ (arXiv 2402.12354): the matrices B of an adapter learn `lora.loraplus_lr_ratio` times as fast as the rest.

At the start B is 0 and A is random: with one rate, B learns too slowly in wide models. The paper's ratio is 16, with a
smaller rate of A. Everything that is not a B (A, magnitudes of DoRA, whole modules, biases) has the stage's rate.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer


def is_fast(name: str) -> bool:
    """Return True for the name of a matrix B.

    >>> is_fast("base_model.model.lm_head.lora_B.default.weight"), is_fast("base_model.model.lm_head.lora_A.weight")
    (True, False)
    """
    return ".lora_B." in name or ".lora_embedding_B." in name


def lr_ratio(lora: Mapping[str, Any] | None) -> float | None:
    """Return the ratio of a section `lora:`, or None if all weights learn at one rate."""
    ratio = (lora or {}).get("loraplus_lr_ratio")
    return None if ratio is None or ratio == 1 else float(ratio)


def split_groups(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]], ratio: float) -> None:
    """Move the matrices B into groups with `ratio` times the rate, and drop groups that are then empty.

    The optimizer has no state yet, and no schedule.
    """
    fast = {parameter for name, parameter in named if is_fast(name)}
    old = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for is_group_fast in (False, True):
        for group in old:
            parameters = [parameter for parameter in group["params"] if (parameter in fast) == is_group_fast]
            if parameters:
                rate = group["lr"] * (ratio if is_group_fast else 1)
                optimizer.add_param_group({**group, "params": parameters, "lr": rate})
