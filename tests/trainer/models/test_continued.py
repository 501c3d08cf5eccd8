"""SFT and RLOO go on with an adapter that was trained before; the reference is the model with it, as it was loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.api import check_recipe
from rekatrain.trainer.cli import main
from rekatrain.trainer.models.continued import continue_adapter
from rekatrain.trainer.models.load import load_policy
from rekatrain.trainer.models.probe import find_difference, read_probe, run_probe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, make_reference, pack_completions
from tests.helpers.exports import write_sft_recipe

REWARDS = {"regex": {"pattern": "[a-m]"}}
RLOO = {"prompts_per_step": 2, "num_generations": 8, "max_completion_length": 12, "learning_rate": 1e-2}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT run with an adapter, with patterns and dropout, and the recipe of an RLOO run that continues it."""
    folder = tmp_path_factory.mktemp("continued")
    path = write_sft_recipe(folder, tokenizer)
    main(["train", str(path), "sft.max_steps=5", "lora.lora_dropout=0.1", "lora.modules_to_save=[norm]"])
    recipe = json.loads(path.read_text()) | {"stage": "rloo", "rloo": {"max_steps": 2, **RLOO}, "rewards": REWARDS}
    recipe |= {"output_dir": str(folder / "rloo"), "model": {"pretrained_model_name_or_path": str(folder / "run")}}
    recipe["model"]["dtype"] = "float32"
    del recipe["lora"], recipe["sft"]
    (folder / "rloo.yaml").write_text(json.dumps(recipe))
    return folder


def test_rloo_starts_from_the_adapter_with_a_kl_of_zero(folder: Path) -> None:
    main(["train", str(folder / "rloo.yaml")])
    records = [json.loads(line) for line in (folder / "rloo" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["kl"] == 0 and records[1]["kl"] != 0
    before = load_file(next((folder / "run" / "checkpoints").iterdir()) / WEIGHTS)
    after = load_file(next((folder / "rloo" / "checkpoints").iterdir()) / WEIGHTS)
    assert before.keys() == after.keys()  # one adapter on the same base: the run has gone on with it
    assert all(0 < (after[name] - before[name]).abs().max() < 0.1 for name in before)


def test_continued_adapter_resumes_and_exports(folder: Path, tmp_path: Path) -> None:
    override = f"output_dir={tmp_path / 'rloo'}"
    main(["train", str(folder / "rloo.yaml"), override, "rloo.max_steps=1"])
    main(["train", str(folder / "rloo.yaml"), override, "rloo.max_steps=2", "--resume"])
    main(["train", str(folder / "rloo.yaml"), f"output_dir={tmp_path / 'unbroken'}", "rloo.max_steps=2"])
    runs = [tmp_path / name / "checkpoints" / "checkpoint-2" / WEIGHTS for name in ("rloo", "unbroken")]
    resumed, unbroken = map(load_file, runs)
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    main(["export", str(tmp_path / "rloo"), str(tmp_path / "merged")])  # held against the training process
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_reference_is_the_model_with_the_loaded_adapter(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = continue_adapter(check_recipe(folder / "rloo.yaml"))
    policy = load_policy(recipe)
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    training = read_probe(checkpoint)
    assert training is not None
    assert find_difference(training, run_probe(policy, [ids.tolist() for ids in training.ids])) is None
    model = CompletionLogprobs(policy, temperature=1.0, num_tokens=len(tokenizer)).eval()
    packed = pack_completions([[5, 6, 7], [9, 10]], [[[11, 12], [13]], [[14, 15, 16]]], torch.device("cpu"))
    reference = make_reference(Accelerator(cpu=True), model, RLOOConfig(max_steps=1), continues_adapter=True)
    assert reference is not None
    with torch.no_grad():
        expected = model(packed)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        kept = [parameter.normal_(std=0.1).clone() for parameter in trained]
        moved = model(packed)
        assert torch.equal(reference(packed), expected)
        assert (moved - expected).abs().max() > 0.01
        with policy.disable_adapter():
            assert (model(packed) - expected).abs().max() > 0.01  # the base is another reference
        assert all(torch.equal(parameter, values) for parameter, values in zip(trained, kept, strict=True))


def test_section_of_the_adapter_is_the_recipes(folder: Path) -> None:
    recipe = continue_adapter(check_recipe(folder / "rloo.yaml"))
    assert recipe.lora is not None
    assert recipe.lora["r"] == 4 and recipe.lora["rank_pattern"] == {"q_proj": 8} and recipe.lora["lora_dropout"] == 0.0
    assert continue_adapter(recipe) == recipe  # as a resumed run reads it
    sft = continue_adapter(
        check_recipe(folder / "recipe.yaml", f"model={{pretrained_model_name_or_path: {folder}/run}}", "lora=null")
    )
    assert sft.lora is not None and sft.lora["lora_dropout"] == 0.1


@pytest.fixture
def adapter(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """An adapter that PEFT has written, and in recipe.yaml beside it a run that continues it."""
    path = write_sft_recipe(tmp_path, tokenizer)
    recipe = json.loads(path.read_text()) | {"model": {"pretrained_model_name_or_path": str(tmp_path / "adapter")}}
    del recipe["lora"]
    path.write_text(json.dumps(recipe))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"init_lora_weights": kind}, f"has init_lora_weights {kind}, which moves a part of the base's weights")
            for kind in ("pissa", "pissa_niter_4", "olora", "lora_ga")
        ),
        ({"base_model_name_or_path": "adapter"}, "which is an adapter or a run itself: merge that one first"),
        ({"r": 4}, "it belongs to another base"),
        ({"use_dora": True}, "lacks the tensor base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"target_modules": ["v_proj"]}, "lacks the tensor base_model.model.model.layers.0.self_attn.v_proj"),
        ({"peft_type": "PROMPT_TUNING"}, "adapter, not LoRA"),
        (
            {"use_tomorrow": True, "ranks_of_tomorrow": [4], "peft_version": "9.9.0"},
            "has ranks_of_tomorrow [4], use_tomorrow true, which PEFT",
        ),
        ({"tomorrow_scale": 0.5, "peft_version": "9.9.0"}, "(the adapter was saved by PEFT 9.9.0)"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "has layer_replication, which is not supported"),
        (None, "holds the weights of an adapter and no adapter_config.json"),
    ],
)
def test_adapter_of_another_model_is_refused(
    adapter: Path, no_weights: None, capsys: pytest.CaptureFixture[str], change: dict | None, message: str
) -> None:
    config_file = adapter / "adapter_config.json"
    if change is None:
        config_file.unlink()
    else:
        if "base_model_name_or_path" in change:
            change = {"base_model_name_or_path": str(shutil.copytree(adapter, adapter.parent / "first"))}
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | change))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(adapter.parent / "recipe.yaml"), "--dry-run"])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and message in line and line.count("\n") == 1, line


def test_keys_of_a_newer_peft_that_are_off_change_nothing(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file = adapter / "adapter_config.json"
    off = {"use_tomorrow": False, "ranks_of_tomorrow": None, "patterns_of_tomorrow": {}}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | off))
    main(["train", str(adapter.parent / "recipe.yaml"), "--dry-run"])
    assert "# the first row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("rloo.yaml", ["lora={r: 16, target_modules: [q_proj]}"], "is an adapter with its own settings: remove"),
        ("rloo.yaml", ["rloo.vllm_server_base_url=http://127.0.0.1:9"], "lora.modules_to_save is not supported"),
        ("rloo.yaml", ["stage=reward"], "a reward model has another head"),
    ],
)
def test_adapter_that_cannot_go_on_is_refused(
    folder: Path, tmp_path: Path, no_weights: None, capsys, recipe: str, overrides: list[str], message: str
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(folder / recipe), f"output_dir={tmp_path / 'none'}", *overrides])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and message in line and line.count("\n") == 1, line
