"""RLOO recipes that ZeRO-3 cannot train get one line, from a plan, a dry run and a run, before a weight is loaded."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from rekatrain.trainer.cli import main
from rekatrain.trainer.models.continued import continue_adapter
from rekatrain.trainer.plan.cost import Rates
from rekatrain.trainer.plan.machine import GB
from rekatrain.trainer.plan.rollout_step import simulate_step
from rekatrain.trainer.recipe.load import load_recipe
from tests.conftest import tiny_llama
from tests.end_to_end.small_runs import LORA, PROJECT, rloo_recipe, write_data
from tests.helpers.forks import Launch, Process, start_forked

# For each key that ZeRO-3 does not go with: sections of a recipe, the beginning of the line, and an override with which
# ZeRO-3 can train it.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "bias": ({"lora": {**LORA, "bias": "all"}}, "lora.bias trains biases of the model itself", "rloo.beta=0"),
    "adapter": ({}, "a run that continues an adapter has no reference under ZeRO-3", "rloo.beta=0"),
    "head": ({"rloo": {"fused_lm_head": True}}, "rloo.fused_lm_head reads the weight", "rloo.fused_lm_head=false"),
    "bf16": ({"rloo": {"bf16": True}}, "rloo.bf16 under ZeRO-3 needs model.dtype bfloat16", "model.dtype=bfloat16"),
}


@pytest.fixture
def recipes(tmp_path: Path, model_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The recipes of `REFUSED` by name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    adapted = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(model_folder)
    adapted.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    models = {"adapter": tmp_path / "stored"}
    return {
        name: rloo_recipe(tmp_path, name, models.get(name, model_folder), **sections)
        for name, (sections, _, _) in REFUSED.items()
    }


@pytest.mark.parametrize("name", REFUSED)
def test_plan_refuses_what_zero3_cannot_train(
    name: str, recipes: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, words, allowed = REFUSED[name]

    def plan(stage: int, *options: str) -> tuple[object, str]:
        launch = PROJECT / "recipes" / "accelerate" / f"zero{stage}.yaml"
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(recipes[name]), "--launch", str(launch), "--gpus", "2", *options])
        return ended.value.code, capsys.readouterr().err

    assert plan(2)[0] == plan(3, allowed)[0] == 0
    status, line = plan(3)
    assert status == 2 and line.count("\n") == 1 and f"error: {words}" in line
    # The estimate for many GPUs shards what it can.
    recipe = continue_adapter(load_recipe(recipes[name], ["rloo.vllm_server_base_url=http://127.0.0.1:9"]))
    assert simulate_step(recipe, 2, 2, 2, 80 * GB, 30, Rates()).training > 0


@pytest.mark.slow
@pytest.mark.launched
def test_train_refuses_what_zero3_cannot_train(recipes: dict[str, Path], tmp_path: Path) -> None:
    def start(stage: int, name: str, *options: str) -> Process:
        launch = Launch(num_processes=1, file=f"zero{stage}.yaml")
        return start_forked(tmp_path, "-m", "rekatrain", "train", str(recipes[name]), *options, launch=launch)

    for name, (_, words, allowed) in REFUSED.items():
        for options in ((), ("--dry-run",)):
            process = start(3, name, *options)
            status, output = process.wait(200), process.output()
            ours = [line for line in output.splitlines() if line.startswith("rekatrain")]
            assert status == 2 and len(ours) == 1 and f"error: {words}" in ours[0], output[-3000:]
            assert "Traceback" not in output and "engine: " not in output  # which is logged of loaded weights
        assert not (tmp_path / name / "metrics.jsonl").exists()
        for stage, options in ((2, ("--dry-run",)), (3, ("--dry-run", allowed))):
            process = start(stage, name, *options)
            assert process.wait(200) == 0, process.output()[-3000:]
