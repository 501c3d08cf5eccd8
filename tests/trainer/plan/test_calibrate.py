"""`rekatrain plan --calibrate` measures this machine, and the plan's times are then those of the measured passes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.plan.calibrate import read_rates
from rekatrain.trainer.plan.cost import Rates, estimate
from rekatrain.trainer.plan.machine import current_launch
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.recipe.load import load_recipe

SECTIONS: dict[str, dict[str, Any]] = {
    "sft": {"sft": {"max_steps": 1, "max_length": 64, "per_device_train_batch_size": 2}},
    "rloo": {
        "rloo": {
            "max_steps": 1,
            "prompts_per_step": 2,
            "num_generations": 4,
            "max_completion_length": 40,
            "per_device_generation_batch_size": 4,
            "micro_batch_tokens": 120,
        },
        "rewards": {"reasoning_format": None},
        "lora": {"r": 2, "target_modules": "all-linear"},
    },
}


def write_recipe(stage: str, model_folder: Path, folder: Path) -> str:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "2 + 2 =", "answer": "4"}) + "\n")
    tree = {
        "stage": stage,
        "output_dir": str(folder / "run"),
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": {"path": str(folder / "rows.jsonl"), "format": "prompt_answer"},
        **SECTIONS[stage],
    }
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize("stage", SECTIONS)
def test_calibrate_makes_the_plan_give_the_measured_times(
    stage: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, file = write_recipe(stage, model_folder, tmp_path), tmp_path / "rates.json"
    with pytest.raises(SystemExit) as ended:
        main(["plan", recipe, "--calibrate", str(file)])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU with"
    assert "one step on one GPU" in printed and f"--calibrate measured on {machine}" in printed
    report, rates = json.loads(file.read_text()), read_rates(file)
    assert rates != Rates() and 1e8 < rates.flops < 1e16 and 1e8 < rates.memory < 1e14

    plan = make_plan(load_recipe(recipe), current_launch())
    cost = estimate(plan, rates)
    pass_seconds = report["measured"]["training pass, seconds"]
    num_passes = cost.train_tokens / plan.workload.micro_batch_tokens
    assert cost.seconds["train"] == pytest.approx(pass_seconds * num_passes)
    if stage == "rloo":
        num_tokens = 2 * plan.rloo.max_completion_length  # two batches of one group
        step = report["measured"]["decoding step, seconds"]
        alone = report["measured"]["decoding one completion, seconds per layer"] * plan.shape.num_layers
        # Reading the cache is added to what was measured with a short one.
        assert max(step, alone) * num_tokens <= cost.seconds["sample"] < 2 * max(step, alone) * num_tokens

    with pytest.raises(SystemExit):
        main(["plan", recipe, "--rates", str(file)])
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rates": {"flops": 1}}', '{"rates": {"flops": "fast"}}'])
def test_read_rates_rejects_other_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(InputError, match="no file of rates: write one with rekatrain plan --calibrate FILE"):
        read_rates(tmp_path / "rates.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_rates(tmp_path / "none.json")


def test_calibrate_needs_a_folder_that_exists(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe("sft", model_folder, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["plan", recipe, "--calibrate", str(tmp_path / "none" / "rates.json")])
    assert ended.value.code == 2
    assert "--calibrate" in capsys.readouterr().err
