"""Make the optimizer that a recipe's key `optim` names (../recipe/optimizers.py)."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.optimizers import ADAMW_8BIT, DEFAULT, MUON, Optim, check_optim, optim_of

MIN_8BIT_SIZE = 4096  # bitsandbytes' default of `min_8bit_size`
Group = dict[str, Any]  # torch's group of parameters: `params`, and options that differ from the optimizer's


class MuonAndAdamW(Optimizer):
    """Muon for the groups with `use_muon`, fused AdamW for the others, as one optimizer with one state.

    Muon's update is scaled to the RMS of AdamW's (Moonshot, arXiv 2502.16982, section 2.2), so that one learning rate
    and one weight decay fit both. Its momentum is torch's default, 0.95 with Nesterov.
    """

    def __init__(
        self, groups: Iterable[Group], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        matrices = [group for group in groups if group["use_muon"]]
        others = [group for group in groups if not group["use_muon"]]
        self._muon = Muon(matrices, **shared, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(others, **shared, betas=betas, eps=eps, fused=True) if others else None
        super().__init__(self._muon.param_groups + (self._adamw.param_groups if self._adamw else []), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no caller evaluates the loss again
        """Update all weights."""
        assert closure is None
        # Schedules, LoRA+ and checkpoints change this object's groups and state, never those of its parts.
        for optimizer in (self._muon, self._adamw):
            if optimizer is not None:
                is_muon = optimizer is self._muon
                optimizer.state = self.state
                optimizer.param_groups = [group for group in self.param_groups if group["use_muon"] == is_muon]
                optimizer.step()


def make_optimizer(
    optim: Optim,
    model: nn.Module,
    groups: Iterable[Group],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Optimizer:
    """Make an optimizer over groups of a model's parameters, which may have a `weight_decay` each.

    Raises InputError if Muon finds no matrix among them.
    """
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    groups = [group for group in groups if group["params"]]
    if optim == MUON:
        return MuonAndAdamW(split_matrices(model, groups), **settings)
    if optim in ADAMW_8BIT:
        return _make_8bit(model, groups, settings)
    optimizer = AdamW(groups, **settings, fused=optim == "adamw_torch_fused")
    keep_kernels(optimizer)
    return optimizer


def keep_kernels(optimizer: Optimizer) -> None:
    """Keep the kernels that the recipe names when a saved state is loaded, which names those of its run."""

    def replace_kernels(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        own = ({key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups)
        return {**state, "param_groups": [group | kernels for group, kernels in zip(state["param_groups"], own)]}  # noqa: B905  # torch rejects another number of groups

    optimizer.register_load_state_dict_pre_hook(replace_kernels)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Return True for a weight that Muon updates: a matrix in a numbered layer, of the model or of an adapter there.

    Embeddings and heads are no part of a numbered layer; norms, biases and stacked experts are no matrices.

    >>> is_matrix("model.layers.3.mlp.up_proj.weight", torch.zeros(8, 4))
    True
    >>> is_matrix("lm_head.weight", torch.zeros(8, 4))
    False
    """
    return parameter.ndim == 2 and re.search(r"\.\d+\.", name) is not None


def is_8bit(parameter: torch.Tensor) -> bool:
    """Return True for a weight whose moments bitsandbytes keeps in 8 bits, unless it is an embedding."""
    return parameter.numel() >= MIN_8BIT_SIZE


def split_matrices(model: nn.Module, groups: Iterable[Group]) -> list[Group]:
    """Split each group in two, of which the first has the matrices and `use_muon`; drop groups that are then empty."""
    check_matrices(model)
    matrices = {parameter for name, parameter in model.named_parameters() if is_matrix(name, parameter)}
    split = [
        {
            **group,
            "params": [parameter for parameter in group["params"] if (parameter in matrices) == use_muon],
            "use_muon": use_muon,
        }
        for group in groups
        for use_muon in (True, False)
    ]
    return [group for group in split if group["params"]]


def check_matrices(model: nn.Module) -> None:
    """Raise InputError if no trained weight of a model is a matrix that Muon updates."""
    if not any(parameter.requires_grad and is_matrix(name, parameter) for name, parameter in model.named_parameters()):
        raise InputError(
            "optim muon updates matrices in the layers, and none of them is trained: set it to adamw_torch_fused, or "
            "name layers in lora.target_modules"
        )


def check_optim_here(recipe: Recipe, *, is_deepspeed: bool) -> None:
    """Raise InputError if this process, as it was launched, cannot use the recipe's optimizer."""
    check_optim(recipe, is_deepspeed=is_deepspeed)
    if optim_of(recipe) not in ADAMW_8BIT:
        return
    name = f"{recipe.stage}.optim {optim_of(recipe)}"
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{name} needs the package bitsandbytes: pip install bitsandbytes")
    if not torch.cuda.is_available() and not _has_8bit_on_cpu():
        raise InputError(
            f"{name} needs a GPU, or a bitsandbytes with this optimizer for a CPU, such as 0.50.2: pip install -U "
            f"bitsandbytes, or set it to {DEFAULT}"
        )


def _has_8bit_on_cpu() -> bool:
    """Return True if the installed bitsandbytes has a kernel of 8-bit AdamW for a CPU."""
    import bitsandbytes  # noqa: F401  # it registers its kernels

    name = "bitsandbytes::optimizer_update_8bit_blockwise"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def _make_8bit(model: nn.Module, groups: list[Group], settings: dict[str, Any]) -> Optimizer:
    """Make it as transformers' Trainer does: embeddings, whose gradients are sparse, keep moments in 32 bits."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: Optimizer = bitsandbytes.optim.AdamW(groups, **settings, optim_bits=8)
    return optimizer
