"""The optimizers that the key `optim` of a stage names, and the launches that can use them. Imports no torch.

adamw_torch_fused        torch.optim.AdamW in one kernel per update (the default)
adamw_torch              torch.optim.AdamW without it, for devices and builds that lack the kernel
adamw_8bit               bitsandbytes' AdamW with moments in 8 bits (arXiv 2110.02861); also named adamw_bnb_8bit
muon                     torch.optim.Muon for matrices in the layers, AdamW for all other weights

Names are those of `transformers.TrainingArguments`, which has no Muon yet.
"""

from typing import Any, Final, Literal

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import Recipe

Optim = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "muon"]
DEFAULT: Optim = "adamw_torch_fused"
TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit")
MUON: Final = "muon"


def optim_of(recipe: Recipe) -> Optim:
    """Return the optimizer of the recipe's stage."""
    section: dict[str, Any] = getattr(recipe, recipe.stage)
    optim: Optim = section.get("optim", DEFAULT)
    return optim


def check_optim(recipe: Recipe, *, is_deepspeed: bool) -> None:
    """Raise InputError if a launch with this engine cannot use the recipe's optimizer."""
    optim = optim_of(recipe)
    name = f"{recipe.stage}.optim {optim}"
    # ZeRO hands an optimizer flat pieces of all weights together. A piece is no matrix, and blocks of 8-bit moments
    # would fall otherwise on another number of processes.
    if optim in (MUON, *ADAMW_8BIT) and is_deepspeed:
        reason = "orthogonalizes whole matrices" if optim == MUON else "quantizes the moments of each weight in blocks"
        raise InputError(
            f"{name} {reason}, and DeepSpeed gives an optimizer flat pieces of all weights: launch without DeepSpeed "
            f"(one process, or ddp.yaml), or set it to {DEFAULT}"
        )
