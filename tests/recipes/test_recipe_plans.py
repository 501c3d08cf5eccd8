"""Every 21B recipe fits its node by `rekatrain plan`, and the documentation has the plan's numbers."""

import runpy
from pathlib import Path

import pytest

from rekatrain.trainer.recipe.sections import check_sections

RECIPES = Path(__file__).parents[2] / "recipes"
PLANS = runpy.run_path(str(RECIPES / "reka-flash-3" / "plans.py"))


def test_every_21b_recipe_has_a_plan() -> None:
    assert set(PLANS["LAUNCHES"]) == {path.stem for path in (RECIPES / "reka-flash-3").glob("*.yaml")}


@pytest.mark.parametrize("name", PLANS["LAUNCHES"])
def test_21b_recipe_fits_as_its_documentation_says(name: str) -> None:
    plan = PLANS["make"](name)
    check_sections(plan.recipe)
    assert plan.overfull == []
    # The model is counted, on the GPU or on the host.
    assert plan.worst.gpu_bytes + max(phase.host_bytes for phase in plan.phases) > 12e9
    assert plan.samples_elsewhere == (plan.recipe.stage == "rloo")
    assert PLANS["line"](name) in (RECIPES / "README.md").read_text(encoding="utf-8").splitlines()
