"""The answers of the plan on hardware that people have do not contradict its own numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rekatrain.trainer.cli import main
from rekatrain.trainer.plan.advice import advise
from rekatrain.trainer.plan.checkpoints import plan_checkpoints
from rekatrain.trainer.plan.cost import Rates
from rekatrain.trainer.plan.machine import GB, PlannedLaunch, current_launch, read_launch_file
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.plan.report import render_plan
from rekatrain.trainer.recipe.load import load_recipe
from tests.helpers.hardware import FOLDER, contradictions, plan_of

ACCELERATE = FOLDER.parent / "accelerate"
FOUR_BY_24 = (4, 24, 128)


# All 49 combinations of seven kinds of hardware and seven recipes: python -m tests.helpers.hardware
@pytest.mark.parametrize(
    ("name", "overrides", "hardware"),
    [
        ("sft-qlora", ("sft.max_length=8192",), FOUR_BY_24),
        ("sft-full", ("sft.max_length=4096",), (4, 48, 256)),
        ("rloo-8k", ("rloo.per_device_generation_batch_size=16",), (8, 141, 1024)),
    ],
)
def test_advice_never_contradicts_the_plan(
    name: str, overrides: tuple[str, ...], hardware: tuple[int, int, int]
) -> None:
    assert list(contradictions(plan_of(name, overrides, hardware))) == []


def test_advise_finds_qlora_on_four_gpus_of_24_gb() -> None:
    changes = advise(plan_of("sft-lora", ("sft.max_length=4096",), FOUR_BY_24))
    (change,) = [change for change in changes if "load_in_4bit: true" in change.text]
    assert change.launch.num_gpus == 4 and change.launch.engine == "ddp"
    assert make_plan(change.recipe, change.launch).overfull == []


def test_advise_shortens_rows_where_no_method_fits_the_given_ones() -> None:
    (change,) = advise(plan_of("sft-qlora", ("sft.max_length=8192",), (1, 24, 64)))
    assert "sft.max_length=4096" in change.text
    assert make_plan(change.recipe, change.launch).overfull == []


def test_read_launch_file_takes_another_number_of_gpus() -> None:
    launch = read_launch_file(ACCELERATE / "zero3.yaml", gpu_memory=80 * GB, num_gpus=4)
    assert (launch.engine, launch.zero_stage, launch.num_gpus, launch.num_nodes) == ("deepspeed", 3, 4, 1)
    assert read_launch_file(ACCELERATE / "ddp.yaml", gpu_memory=80 * GB, num_gpus=1).engine == "single"


# Checkpoints


def test_plan_checkpoints_of_all_weights_and_of_an_adapter() -> None:
    served = "rloo.vllm_server_base_url=http://127.0.0.1:8000"
    launch = read_launch_file(ACCELERATE / "zero3-offload.yaml", gpu_memory=80 * GB, num_gpus=4)
    whole = plan_checkpoints(make_plan(load_recipe(FOLDER / "rloo-full.yaml", [served]), launch))
    num_weights = 20_905_482_240
    assert (whole.weights, whole.optimizer, whole.served) == (2 * num_weights, 12 * num_weights, 2 * num_weights)
    # The one that is kept, one that is being written, and the servers' weights.
    assert whole.num_kept == 2 and whole.disk == 2 * 14 * num_weights + 2 * num_weights
    assert whole.seconds(Rates()) == pytest.approx(14 * num_weights / 2e9)
    ddp = PlannedLaunch(engine="ddp", num_gpus=4)
    adapter = plan_checkpoints(make_plan(load_recipe(FOLDER / "rloo-8k.yaml", [served]), ddp))
    assert (adapter.weights, adapter.optimizer, adapter.served) == (4 * 81_506_304, 8 * 81_506_304, 0)
    kept = plan_checkpoints(make_plan(load_recipe(FOLDER / "sft-lora.yaml", ["sft.save_total_limit=null"]), ddp))
    assert kept.num_kept is None and kept.disk is None


def test_plan_prints_host_memory_disk_and_the_time_to_save() -> None:
    plan = make_plan(
        load_recipe(FOLDER / "sft-full.yaml"), read_launch_file(ACCELERATE / "zero3.yaml", gpu_memory=80 * GB)
    )
    text = render_plan(plan, rates=Rates())
    assert "a checkpoint: 292.7 GB (41.8 of weights, 250.9 of optimizer); at most 2 at a time, 585.4 GB of disk" in text
    assert "saving: 146 s at an assumed 2 GB/s per node, every 200 steps" in text
    assert "host memory: " in text and "estimates, fitted to: training: 608 tokens/s" in text


def test_plan_checkpoints_is_what_a_run_writes(tmp_path: Path, model_folder: Path) -> None:
    """Weights and optimizer of a tiny model that was trained on a CPU, in one process."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 + 2 =", "answer": "4"}\n' * 4)
    for name, lora in (("whole", None), ("adapter", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})):
        tree = {
            "stage": "sft",
            "output_dir": str(tmp_path / name),
            "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
            "dataset": {"path": str(tmp_path / "rows.jsonl"), "format": "prompt_answer"},
            "sft": {"max_steps": 1, "max_length": 128, "gradient_checkpointing": False, "save_total_limit": 1},
            **({"lora": lora} if lora else {}),
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(tree))
        main(["train", str(tmp_path / f"{name}.yaml")])
        planned = plan_checkpoints(make_plan(load_recipe(tmp_path / f"{name}.yaml"), current_launch()))
        (checkpoint,) = (tmp_path / name / "checkpoints").glob("checkpoint-1")
        weights = load_file(checkpoint / ("adapter_model.safetensors" if lora else "model.safetensors"))
        assert sum(tensor.nbytes for tensor in weights.values()) == planned.weights
        states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
        assert sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")) == planned.optimizer
