"""LoRA+: the matrices B learn faster by the recipe's ratio, in all stages, also in a run that is resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch.optim import SGD, AdamW

from rekatrain.trainer.cli import main
from rekatrain.trainer.models.loraplus import split_groups
from tests.conftest import tiny_llama
from tests.helpers.exports import write_sft_recipe

WEIGHTS = "adapter_model.safetensors"
RATIO = 8.0
RLOO = {"prompts_per_step": 2, "num_generations": 8, "max_completion_length": 12}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["norm", "lm_head"]},
        {"target_parameters": ["gate_proj.weight"], "use_rslora": True},
    ],
    ids=str,
)
def test_update_equals_pefts_optimizer(tokenizer, options: dict) -> None:
    results = []
    for make in ("ours", "peft"):
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options)
        model = get_peft_model(tiny_llama(tokenizer, attention_bias=True), lora)
        torch.manual_seed(0)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if make == "peft":
            optimizer = create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=RATIO, weight_decay=0.0)
        else:
            optimizer = AdamW([parameter for _, parameter in trained], lr=1e-3, weight_decay=0.0)
            split_groups(optimizer, model.named_parameters(), RATIO)
        for _ in range(3):
            for _, parameter in trained:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append({name: parameter.detach().clone() for name, parameter in trained})
    assert results[0].keys() == results[1].keys() and len(results[0]) >= 8
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_groups_keep_options_and_are_never_empty() -> None:
    names = ["x.lora_A.default.weight", "x.lora_B.default.weight", "norm.weight", "x.modules_to_save.default.weight"]
    shapes = [(1, 1), (1, 1), (1,), (1, 1)]
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in zip(names, shapes, strict=True)]
    parameters = [parameter for _, parameter in named]
    optimizer = SGD([{"params": parameters, "weight_decay": 0.1}, {"params": []}], lr=0.5)
    split_groups(optimizer, named, 4.0)
    slow, fast = optimizer.param_groups
    assert slow["params"] == [parameters[0], parameters[3]] and fast["params"] == parameters[1:3]
    assert (slow["lr"], fast["lr"], slow["weight_decay"], fast["weight_decay"]) == (0.5, 2.0, 0.1, 0.1)


@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
def test_first_update_moves_b_by_the_ratio(tmp_path: Path, tokenizer, stage: str) -> None:
    path = write_sft_recipe(tmp_path, tokenizer)
    recipe = json.loads(path.read_text()) | {"stage": stage}
    recipe["lora"] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "loraplus_lr_ratio": RATIO}
    settings = {"learning_rate": 1e-3, "max_steps": 1, "lr_scheduler_type": "constant"}
    del recipe["sft"]
    if stage == "rloo":
        recipe |= {"rloo": settings | RLOO, "rewards": {"regex": {"pattern": "[a-m]"}}}
    else:
        recipe[stage] = settings
    if stage == "reward":
        pairs = [{"prompt": f"{n} + {n} =", "chosen": f"It is {2 * n}.", "rejected": f"{2 * n}"} for n in range(1, 5)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        recipe["dataset"] = {"path": str(tmp_path / "pairs.jsonl"), "format": "preference"}
    path.write_text(json.dumps(recipe))
    main(["train", str(path)])
    weights = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-1" / WEIGHTS)
    moved = [tensor.abs().max().item() for name, tensor in weights.items() if ".lora_B." in name]
    # B starts at 0, and Adam's first update is the rate.
    assert len(moved) == 4 and all(abs(value - RATIO * 1e-3) < 1e-6 for value in moved)


def test_resumed_run_keeps_both_rates(tmp_path: Path, tokenizer) -> None:
    path = write_sft_recipe(tmp_path, tokenizer)
    options = ["sft.max_steps=4", "sft.save_steps=2", f"lora.loraplus_lr_ratio={RATIO}"]
    main(["train", str(path), *options])
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "checkpoint-4")
    main(["train", str(path), *options, f"output_dir={tmp_path / 'again'}", "--resume"])
    runs = [tmp_path / name / "checkpoints" / "checkpoint-4" for name in ("run", "again")]
    groups = torch.load(runs[1] / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-2, RATIO * 1e-2]
    unbroken, resumed = (load_file(run / WEIGHTS) for run in runs)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


@pytest.mark.parametrize("value", ["0.5", "-1", ".nan", "yes"])
def test_ratio_that_makes_no_sense_is_refused(tmp_path: Path, tokenizer, capsys, value: str) -> None:
    path = write_sft_recipe(tmp_path, tokenizer)
    with pytest.raises(SystemExit):
        main(["train", str(path), f"lora.loraplus_lr_ratio={value}"])
    assert "lora.loraplus_lr_ratio is " in capsys.readouterr().err


def test_ratio_with_an_adapter_on_embeddings_is_refused(tmp_path: Path, tokenizer, no_weights: None, capsys) -> None:
    path = write_sft_recipe(tmp_path, tokenizer)
    options = [f"lora={{r: 4, target_modules: [q_proj, embed_tokens], loraplus_lr_ratio: {RATIO}}}"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path), *options])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and "lora.loraplus_lr_ratio has no rate for an adapter on model.embed_tokens" in line
