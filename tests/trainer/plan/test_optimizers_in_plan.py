"""An optimizer's memory and arithmetic, as `plan` counts them, are those of the optimizer that a run makes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rekatrain.trainer.models.optimizers import make_optimizer
from rekatrain.trainer.plan.cost import Rates, estimate
from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.memory import Plan, make_plan
from rekatrain.trainer.plan.model_size import build, measure_shape
from rekatrain.trainer.plan.states import moment_bytes
from rekatrain.trainer.recipe.load import Recipe, load_recipe
from rekatrain.trainer.recipe.optimizers import Optim
from tests.trainer.plan.test_plan_memory import LORA, llama

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def recipe_of(optim: Optim, lora: dict[str, Any] | None, dtype: str) -> Recipe:
    model = {"pretrained_model_name_or_path": "unused", "dtype": dtype}
    return Recipe(stage="rloo", output_dir="", model=model, dataset={}, lora=lora, rloo={"optim": optim})


def first_update(recipe: Recipe, optim: Optim) -> tuple[torch.optim.Optimizer, int]:
    """Take one update of a real model; return the optimizer, and its products' FLOPs as torch counts them."""
    policy = build(llama(2), recipe)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(optim, policy, [{"params": trained}], **SETTINGS)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return optimizer, counter.get_total_flops()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the moments: not of counts of updates and of the table of 8-bit values, which all share."""
    left_out = ("step", "qmap1", "qmap2")
    return sum(
        each.nbytes for state in optimizer.state.values() for name, each in state.items() if name not in left_out
    )


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "muon", "adamw_8bit"])
def test_moments_have_the_planned_bytes(optim: Optim, lora: dict[str, Any] | None) -> None:
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    recipe = recipe_of(optim, lora, "float32")
    optimizer, _ = first_update(recipe, optim)
    planned = moment_bytes(recipe, measure_shape(llama(2), recipe), 4)
    # The last block of 256 of a tensor may be part of one.
    assert state_bytes(optimizer) == pytest.approx(planned, rel=1e-3 if optim == "adamw_8bit" else 0)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_products_of_muon_have_the_planned_flops(lora: dict[str, Any] | None) -> None:
    recipe = recipe_of("muon", lora, "float32")
    _, counted = first_update(recipe, "muon")
    assert counted == measure_shape(llama(2), recipe).newton_schulz > 0


@pytest.fixture
def planned(model_folder: Path, tmp_path: Path) -> Callable[[str], Plan]:
    """Plan a run of SFT on one GPU with an optimizer."""
    text = {
        "stage": "sft",
        "output_dir": str(tmp_path / "run"),
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": {"path": "unused.jsonl"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(text))
    launch = PlannedLaunch(engine="single", num_gpus=1)
    return lambda optim: make_plan(load_recipe(path, [f"sft.optim={optim}"]), launch)


def test_plan_counts_the_update_of_muon(planned: Callable[[str], Plan]) -> None:
    muon, adamw = (estimate(planned(optim), Rates()) for optim in ("muon", "adamw_torch_fused"))
    rates = Rates()
    assert muon.flops == {**adamw.flops, "update": planned("muon").shape.newton_schulz}
    assert muon.seconds["update"] == muon.flops["update"] / (rates.flops * rates.training_fraction)


def test_plan_of_each_optimizer_differs_by_its_state(planned: Callable[[str], Plan]) -> None:
    plans = {optim: planned(optim) for optim in ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "muon")}
    states = {optim: plan.states for optim, plan in plans.items()}
    shape = plans["muon"].shape
    assert states["adamw_torch"].optimizer == states["adamw_torch_fused"].optimizer == 8 * shape.num_trained
    assert states["muon"].optimizer == 8 * shape.num_trained - 4 * shape.num_matrices
    # Without the fused kernel, torch makes a square root of all second moments at once.
    assert states["adamw_torch"].temporary == 4 * shape.num_trained
    assert states["adamw_torch_fused"].temporary == 0
