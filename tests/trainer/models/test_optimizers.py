"""The key `optim`: updates equal those of torch, in all stages and after a resume; launches without it are rejected."""

import copy
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.optim import AdamW, Muon

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.models.loraplus import is_fast, split_groups
from rekatrain.trainer.models.optimizers import check_optim_here, is_matrix, keep_kernels, make_optimizer
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.optimizers import check_optim
from tests.conftest import tiny_llama
from tests.helpers.exports import write_sft_recipe

RATE = 1e-2
SETTINGS: dict[str, Any] = {"lr": RATE, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}
RLOO = {"prompts_per_step": 2, "num_generations": 8, "max_completion_length": 12}
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def update(weights: dict[str, torch.nn.Parameter], *optimizers: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Take three updates with gradients that are drawn, at three rates."""
    torch.manual_seed(0)
    for factor in (1.0, 0.5, 2.0):
        for weight in weights.values():
            weight.grad = torch.randn_like(weight)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * factor
            optimizer.step()
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_muon_updates_matrices_and_adamw_the_rest(tokenizer, is_lora: bool) -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(1)
        model = tiny_llama(tokenizer)
        return get_peft_model(model, LoraConfig(**LORA, modules_to_save=["lm_head"])) if is_lora else model

    model, other = make(), make()
    expected, ours = trained(other), trained(model)
    others = ["lm_head", "embed_tokens", "norm"]
    matrices = [weight for name, weight in expected.items() if not any(part in name for part in others)]
    rest = [weight for name, weight in expected.items() if any(part in name for part in others)]
    assert len(matrices) == (8 if is_lora else 14) and len(rest) == (1 if is_lora else 7)
    rate, decay = SETTINGS["lr"], SETTINGS["weight_decay"]
    muon = Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    directly = update(expected, muon, AdamW(rest, **SETTINGS, fused=True))
    optimizer = make_optimizer("muon", model, [{"params": [*ours.values()]}], **SETTINGS)
    through = update(ours, optimizer)
    assert all(torch.equal(through[name], tensor) for name, tensor in directly.items())
    # Three more updates after a save and a load are those of an optimizer that was never saved.
    saved = copy.deepcopy(optimizer.state_dict())  # it refers to the live tensors
    again = make_optimizer("muon", model, [{"params": [*ours.values()]}], **SETTINGS)
    again.load_state_dict(saved)
    before = {name: weight.detach().clone() for name, weight in ours.items()}
    resumed = update(ours, again)
    for name, weight in ours.items():
        weight.data.copy_(before[name])
    unbroken = update(ours, optimizer)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_adamw_equals_torchs_and_keeps_its_kernel(tokenizer, optim: Any) -> None:
    model, other = tiny_llama(tokenizer), tiny_llama(tokenizer)
    is_fused = optim == "adamw_torch_fused"
    directly = update(trained(other), AdamW(other.parameters(), **SETTINGS, fused=is_fused))
    optimizer = make_optimizer(optim, model, [{"params": [*model.parameters()]}], **SETTINGS)
    through = update(trained(model), optimizer)
    assert all(torch.equal(through[name], tensor) for name, tensor in directly.items())
    # A state that the other kernel has saved does not bring that kernel along.
    another = AdamW(model.parameters(), fused=not is_fused)
    keep_kernels(another)
    another.load_state_dict(optimizer.state_dict())
    (group,) = another.param_groups
    assert group["fused"] is not is_fused and group["betas"] == SETTINGS["betas"]


def write_recipe(folder: Path, tokenizer, stage: str, optim: str, lora: dict[str, Any] | None) -> Path:
    path = write_sft_recipe(folder, tokenizer)
    recipe = json.loads(path.read_text()) | {"stage": stage, "lora": lora}
    settings = {"learning_rate": RATE, "max_steps": 4, "save_steps": 2, "optim": optim, "weight_decay": 0.1}
    del recipe["sft"]
    if stage == "rloo":
        recipe |= {"rloo": settings | RLOO, "rewards": {"regex": {"pattern": "[a-m]"}}}
    else:
        recipe[stage] = settings | {"lr_scheduler_type": "constant"}
    if stage == "reward":
        pairs = [{"prompt": f"{n} + {n} =", "chosen": f"It is {2 * n}.", "rejected": f"{2 * n}"} for n in range(1, 5)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        recipe["dataset"] = {"path": str(folder / "pairs.jsonl"), "format": "preference"}
    path.write_text(json.dumps(recipe))
    return path


@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
@pytest.mark.parametrize(("optim", "lora"), [("muon", None), ("muon", LORA), ("adamw_torch", None)])
def test_resumed_run_equals_the_unbroken_one(
    tmp_path: Path, tokenizer, stage: str, optim: str, lora: dict[str, Any] | None
) -> None:
    path = write_recipe(tmp_path, tokenizer, stage, optim, lora)
    main(["train", str(path)])
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "checkpoint-4")
    main(["train", str(path), f"output_dir={tmp_path / 'again'}", "--resume"])
    runs = [tmp_path / name / "checkpoints" / "checkpoint-4" for name in ("run", "again")]
    name = "model.safetensors" if lora is None else "adapter_model.safetensors"
    unbroken, resumed = (load_file(run / name) for run in runs)
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)
    # Muon has one moment per matrix, AdamW two per weight.
    state = torch.load(next(runs[0].glob("optimizer.*")), weights_only=True)["state"].values()
    numbers = [len(each) for each in state]
    num_matrices = (8 if lora else 14) if optim == "muon" else 0
    assert numbers.count(1) == num_matrices and set(numbers) <= {1, 3}


@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_first_step_of_a_run_is_muons(tmp_path: Path, tokenizer, stage: str) -> None:
    path = write_recipe(tmp_path, tokenizer, stage, "muon", None)
    options = ["max_steps=1", "weight_decay=0", "lr_scheduler_type=constant"]
    main(["train", str(path), *(f"{stage}.{option}" for option in options)])
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "model.safetensors")
    for name, tensor in after.items():
        moved = tensor - before[name]
        if is_matrix(name, tensor):
            # Singular values of about 1, by the matched RMS: rate x 0.2 x the root of the larger side.
            scale = RATE * 0.2 * max(tensor.shape) ** 0.5
            largest = torch.linalg.matrix_norm(moved, 2) / scale
            assert 0.6 < largest < 1.3, name
        else:
            assert moved.abs().max() == pytest.approx(RATE, rel=1e-2), name  # AdamW's first update is the rate


def test_loraplus_gives_both_kinds_of_groups_its_rate(tokenizer) -> None:
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(**LORA, modules_to_save=["lm_head"]))
    optimizer = make_optimizer("muon", model, [{"params": [*trained(model).values()]}], **SETTINGS)
    split_groups(optimizer, model.named_parameters(), 4.0)
    rates = {weight: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert all(rates[weight] == RATE * (4 if is_fast(name, weight) else 1) for name, weight in trained(model).items())
    first = {name: weight.detach().clone() for name, weight in trained(model).items()}
    for weight in trained(model).values():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert all(not torch.equal(weight, first[name]) for name, weight in trained(model).items())


@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit"])
@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="shows the message where bitsandbytes is missing")
def test_8bit_moments_need_bitsandbytes(tmp_path: Path, tokenizer, capsys, stage: str, optim: str) -> None:
    path = write_recipe(tmp_path, tokenizer, stage, optim, LORA)
    with pytest.raises(SystemExit):
        main(["train", str(path)])
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.endswith(f"{stage}.optim {optim} needs the package bitsandbytes: pip install bitsandbytes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the message of a machine without a GPU")
def test_8bit_moments_need_a_kernel_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a bitsandbytes that has the optimizer for GPUs alone.
    monkeypatch.setattr("rekatrain.trainer.models.optimizers.find_spec", lambda name: object())
    monkeypatch.setattr("rekatrain.trainer.models.optimizers._has_8bit_on_cpu", lambda: False)
    recipe = Recipe(stage="sft", output_dir="", model={}, dataset={}, sft={"optim": "adamw_8bit"})
    with pytest.raises(InputError, match="needs a GPU, or a bitsandbytes with this optimizer for a CPU"):
        check_optim_here(recipe, is_deepspeed=False)


def test_8bit_updates_are_close_to_adamws(tokenizer) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    model, other = (tiny_llama(tokenizer, hidden_size=64, intermediate_size=128) for _ in range(2))
    before = {name: weight.detach().clone() for name, weight in trained(model).items()}
    exact = update(trained(other), AdamW(other.parameters(), **SETTINGS))
    optimizer = make_optimizer("adamw_8bit", model, [{"params": [*model.parameters()]}], **SETTINGS)
    ours = update(trained(model), optimizer)
    for name, weight in trained(model).items():
        is_small = weight.numel() < 4096 or "embed_tokens" in name
        assert optimizer.state[weight]["state1"].dtype == (torch.float32 if is_small else torch.uint8), name
        error = (ours[name] - exact[name]).norm() / (exact[name] - before[name]).norm()
        assert error < (1e-3 if is_small else 0.1), name


@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
def test_8bit_moments_resume_bit_for_bit(tmp_path: Path, tokenizer, stage: str) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    path = write_recipe(tmp_path, tokenizer, stage, "adamw_8bit", None)
    tiny_llama(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    main(["train", str(path)])
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "checkpoint-4")
    main(["train", str(path), f"output_dir={tmp_path / 'again'}", "--resume"])
    first, unbroken, resumed = (
        load_file(tmp_path / run / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
        for run, step in (("run", 2), ("run", 4), ("again", 4))
    )
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)
    assert any(not torch.equal(unbroken[key], first[key]) for key in unbroken)


@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
@pytest.mark.parametrize("optim", ["muon", "adamw_8bit", "adamw_bnb_8bit"])
def test_optimizers_of_whole_weights_reject_zero(stage: Any, optim: str) -> None:
    recipe = Recipe(stage=stage, output_dir="", model={}, dataset={}, **{stage: {"optim": optim}})  # type: ignore[arg-type]
    check_optim(recipe, is_deepspeed=False)
    with pytest.raises(InputError, match=rf"^{stage}\.optim {optim} .*launch without DeepSpeed"):
        check_optim(recipe, is_deepspeed=True)


@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_muon_without_a_matrix_is_rejected_before_loading(tmp_path: Path, tokenizer, capsys, stage: str) -> None:
    path = write_recipe(tmp_path, tokenizer, stage, "muon", {"r": 4, "target_modules": ["embed_tokens"]})
    with pytest.raises(SystemExit):
        main(["train", str(path)])
    assert "optim muon updates matrices in the layers, and none of them is trained" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
