"""Optimizer states that cannot be converted are one line, before a weight is loaded; files run no code."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Adagrad, AdamW, Optimizer, RMSprop

from rekatrain.data.errors import InputError
from rekatrain.trainer.resume.resharding import keys_in_weights, restore_converted
from rekatrain.trainer.resume.saved_optimizer import MOMENTS, Layout, check_convertible, read_optimizer, saved_layout

KEYS = {"weight": "weight", "bias": "bias"}


def save(folder: Path, optimizer_class: type[Optimizer], num_updates: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    """Save a small layer and its optimizer as one process does; return the layer and the optimizer's state."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    for _ in range(num_updates):
        model(torch.ones(3)).square().sum().backward()
        optimizer.step()
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return model, optimizer.state_dict()


def zero_shard(folder: Path, content: dict[str, Any]) -> None:
    """Save a file as a process under ZeRO does."""
    (folder / "global_step1").mkdir()
    torch.save(content, folder / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("optimizer_class", [RMSprop, Adagrad])
def test_optimizer_other_than_adamw_is_rejected(tmp_path: Path, optimizer_class: type[Optimizer]) -> None:
    save(tmp_path, optimizer_class)
    with pytest.raises(InputError, match="only AdamW's state"):
        check_convertible(tmp_path)


def test_unequal_numbers_of_updates_are_rejected(tmp_path: Path) -> None:
    _, state = save(tmp_path, AdamW)
    state["state"][1]["step"] += 1
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"have had \[1.0, 2.0\] updates"):
        check_convertible(tmp_path)


def test_state_of_another_model_is_rejected(tmp_path: Path) -> None:
    save(tmp_path, AdamW)
    with pytest.raises(InputError, match="state 0 is not that of 'bias'"):
        read_optimizer(tmp_path, dict(reversed(KEYS.items())))
    other = nn.Linear(3, 2, bias=False)
    with pytest.raises(InputError, match="another model: of 2 parameters, not of 1"):
        restore_converted(tmp_path, other, AdamW(other.parameters()))


@pytest.mark.parametrize("num_updates", [0, 3])
def test_restored_optimizer_takes_the_same_step(tmp_path: Path, num_updates: int) -> None:
    model, state = save(tmp_path, AdamW, num_updates)
    check_convertible(tmp_path)
    assert saved_layout(tmp_path) == Layout(zero_stage=0, num_shards=1)
    restored = nn.Linear(3, 2)
    optimizer, original = (AdamW(layer.parameters(), lr=0.1) for layer in (restored, model))
    restore_converted(tmp_path, restored, optimizer)
    original.load_state_dict(state)
    for layer, its in ((restored, optimizer), (model, original)):
        its.zero_grad()
        layer(torch.ones(3)).square().sum().backward()
        its.step()
    assert torch.equal(restored.weight, model.weight) and torch.equal(restored.bias, model.bias)
    assert all(state["step"] == num_updates + 1 for state in optimizer.state.values())


def test_read_joins_pieces_and_takes_ranges(tmp_path: Path) -> None:
    model, _ = save(tmp_path, AdamW)
    saved = read_optimizer(tmp_path, KEYS)
    whole = model.weight.detach().flatten()
    assert torch.equal(saved.read("fp32", "weight"), whole)
    assert torch.equal(saved.read("fp32", "weight", 2, 5), whole[2:5])
    assert torch.equal(saved.read("fp32", "weight", 4, 9), whole[4:])
    assert saved.read("fp32", "weight", 6, 9).numel() == 0 and saved.step == 1
    assert all(saved.read(key, "bias").shape == (2,) for key in MOMENTS)


@pytest.mark.parametrize(
    "lora",
    [
        None,
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
)
def test_keys_in_weights_are_those_of_a_saved_model(tmp_path: Path, model: Any, lora: dict[str, Any] | None) -> None:
    policy = get_peft_model(model, LoraConfig(**lora)) if lora else model
    policy.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    saved, named = load_file(file), dict(policy.named_parameters())
    keys = keys_in_weights(policy)
    assert set(keys.values()) <= saved.keys()
    assert set(keys) == {name for name, parameter in named.items() if parameter.requires_grad}
    assert all(torch.equal(saved[key], named[name]) for name, key in keys.items())
    part_of = nn.ModuleDict({"policy": policy})
    assert keys_in_weights(part_of) == {f"policy.{name}": key for name, key in keys.items()}


class Attack:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zero", [False, True])
def test_conversion_runs_no_code_of_a_checkpoint(tmp_path: Path, zero: bool) -> None:
    save(tmp_path, AdamW)
    made = tmp_path / "made"
    if zero:
        zero_shard(tmp_path, {"attack": Attack(made), "optimizer_state_dict": {"zero_stage": 2}})
    else:
        torch.save({"attack": Attack(made), "state": {}}, tmp_path / "optimizer.pt")
    for read in (check_convertible, *([saved_layout] if zero else []), lambda path: read_optimizer(path, KEYS)):
        with pytest.raises(InputError, match="could run code"):
            read(tmp_path)
    assert not made.exists()
    (file,) = tmp_path.rglob("*_optim_states.pt") if zero else tmp_path.glob("optimizer.pt")
    torch.load(file, weights_only=False)
    assert made.exists()  # the file does run code when it is unpickled
