"""Sharded checkpoints whose files run code when they are unpickled: no code runs, and whole ones resume."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from rekatrain.data.errors import InputError
from rekatrain.trainer.resume.safe_load import FORCED, tensors_only
from rekatrain.trainer.run.checkpoints import read_manifest, seal
from tests.end_to_end.small_runs import rloo_recipe, write_data, write_recipe
from tests.helpers.forks import Launch, start_forked


class Attack:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_tensors_only_runs_no_code_of_a_file(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    torch.save({"scaler": LossScaler(1.0), "weights": torch.ones(2)}, tmp_path / "good.pt")
    torch.save({"weights": torch.ones(2), "attack": Attack(tmp_path / "attacked")}, tmp_path / "bad.pt")
    with tensors_only():
        assert torch.load(tmp_path / "good.pt", weights_only=False)["scaler"].cur_scale == 1.0
    with pytest.raises(InputError, match="holds an object other than tensors, which could run code"), tensors_only():
        torch.load(tmp_path / "bad.pt", weights_only=False)
    assert not (tmp_path / "attacked").exists() and FORCED not in os.environ
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "attacked").exists()  # the file does run code when it is read


@pytest.mark.slow
@pytest.mark.launched
@pytest.mark.parametrize(("stage", "zero"), [("rloo", 2), ("sft", 3)])
def test_resume_runs_no_code_of_a_sharded_checkpoint(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, zero: int
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    if stage == "rloo":
        recipe = rloo_recipe(tmp_path, "run", model_folder, rloo={"max_steps": 1})
    else:
        dataset = {"path": str(tmp_path / "sft.jsonl"), "format": "prompt_answer"}
        sft = {"max_steps": 1, "per_device_train_batch_size": 2, "save_steps": 1}
        recipe = write_recipe(tmp_path, "run", model_folder, stage="sft", dataset=dataset, sft=sft)

    def train(*options: str) -> tuple[int, str]:
        launch = Launch(num_processes=1, file=f"zero{zero}.yaml")
        process = start_forked(tmp_path, "-m", "rekatrain", "train", str(recipe), *options, launch=launch)
        return process.wait(300), process.output()

    assert train()[0] == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    whole = shutil.copytree(checkpoint, tmp_path / "whole")
    for path in checkpoint.rglob("*_optim_states.pt"):
        state = torch.load(path, weights_only=False)
        torch.save({"attack": Attack(tmp_path / "attacked"), **state}, path)
    seal(checkpoint, step=1, stage=stage, launch=read_manifest(checkpoint)["launch"])  # as an attacker would
    code, errors = train("--resume", f"{stage}.max_steps=2")
    assert code != 0 and "holds an object other than tensors, which could run code" in errors, errors[-3000:]
    assert not (tmp_path / "attacked").exists()

    shutil.rmtree(checkpoint)
    whole.rename(checkpoint)
    code, errors = train("--resume", f"{stage}.max_steps=2")
    assert code == 0, errors[-3000:]
    assert checkpoint.with_name("checkpoint-2").exists()
