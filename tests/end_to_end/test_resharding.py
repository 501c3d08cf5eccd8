"""Resuming under another launch keeps the optimizer: from one process to shards of ZeRO-3, of ZeRO-2, and back.

The table of all pairs of layouts is made by resharding.py.
"""

import itertools
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from torch.optim import AdamW

from rekatrain.trainer.cli import main
from rekatrain.trainer.resume.resharding import restore_converted
from rekatrain.trainer.resume.saved_optimizer import MOMENTS, read_optimizer, saved_layout
from tests.end_to_end.resharded_states import NAMES, STEP, Model, groups, write_plain
from tests.end_to_end.resharding import launch, trained_keys
from tests.end_to_end.small_runs import LORA, records, rloo_recipe, weights, write_data, write_recipe
from tests.helpers.forks import Launch, start_forked

ROWS = 6
KINDS = {"rloo-lora": LORA, "sft-full": None, "sft-lora": LORA}


def recipe(folder: Path, name: str, model: Path, kind: str, num_processes: int) -> str:
    """Write a recipe of two steps, whose schedule does not depend on their number."""
    settings = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-3, "warmup_steps": 5}
    settings |= {"lr_scheduler_type": "constant_with_warmup"}
    if kind.startswith("rloo"):
        rloo = {"prompts_per_step": ROWS, "grad_norm_quantile": 0.5, "num_iterations": 2, **settings}
        return str(rloo_recipe(folder, name, model, rloo=rloo, lora=KINDS[kind]))
    settings |= {"per_device_train_batch_size": ROWS // num_processes, "logging_steps": 1, "weight_decay": 0.1}
    dataset = {"path": str(folder / "sft.jsonl"), "format": "prompt_answer"}
    return str(write_recipe(folder, name, model, stage="sft", lora=KINDS[kind], dataset=dataset, sft=settings))


@pytest.mark.slow
@pytest.mark.launched
def test_resume_under_other_launches_keeps_the_optimizer(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)

    def resume(kind: str, step: int, num_processes: int) -> list[str]:
        stage = kind.split("-")[0]
        path = recipe(tmp_path, f"{kind}-moved", model_folder, kind, num_processes)
        return ["train", path, "--resume", f"{stage}.max_steps={step}"]

    for kind in KINDS:
        main(["train", recipe(tmp_path, kind, model_folder, kind, 1), f"{kind.split('-')[0]}.max_steps=5"])
        main(["train", recipe(tmp_path, f"{kind}-moved", model_folder, kind, 1)])
    logged = launch(tmp_path, [(3, resume(kind, 3, 2)) for kind in KINDS], 2)
    assert logged.count("the optimizer is converted from one piece to 2 shards of ZeRO-3") == len(KINDS)
    logged = launch(tmp_path, [(2, resume(kind, 4, 3)) for kind in KINDS], 3)
    assert logged.count("the optimizer is converted from 2 shards of ZeRO-3 to 3 shards of ZeRO-2") == len(KINDS)
    for kind in KINDS:
        main(resume(kind, 5, 1))
        one, moved = tmp_path / kind, tmp_path / f"{kind}-moved"
        ours, theirs = weights(one, 5), weights(moved, 5)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in ours), kind
        keys = trained_keys(kind, model_folder)
        last = [read_optimizer(run / "checkpoints" / "checkpoint-5", keys) for run in (one, moved)]
        assert last[0].step == last[1].step == (10 if kind.startswith("rloo") else 5)
        for moment, name in itertools.product(MOMENTS, keys):
            mine, its = (optimizer.read(moment, name) for optimizer in last)
            assert torch.allclose(mine, its, rtol=0, atol=1e-5 * float(mine.abs().max())), (kind, moment, name)
        for mine_record, its_record in zip(records(one), records(moved), strict=True):
            assert its_record["learning_rate"] == pytest.approx(mine_record["learning_rate"], rel=1e-12)
    (file,) = (tmp_path / "rloo-lora-moved" / "checkpoints" / "checkpoint-4").rglob("mp_rank_00_model_states.pt")
    saved = torch.load(file, weights_only=False)["module"]
    assert saved and all("lora" in name for name in saved)  # the frozen base is not saved


@pytest.mark.slow
@pytest.mark.launched
def test_every_stage_of_zero_holds_the_saved_state_bitwise(tmp_path: Path) -> None:
    write_plain(tmp_path / "plain")
    worker = str(Path(__file__).with_name("resharded_states.py"))
    process = start_forked(tmp_path, worker, str(tmp_path), launch=Launch(num_processes=3, file="zero1.yaml"))
    assert process.wait(300) == 0, process.output()[-8000:]
    expected = read_optimizer(tmp_path / "plain", dict(zip(NAMES, NAMES, strict=True)))
    checkpoints = sorted(tmp_path.glob("*-?"))
    assert len(checkpoints) == 10
    for checkpoint in checkpoints:
        assert saved_layout(checkpoint).num_shards == 3
        model = Model()
        optimizer = AdamW(groups(model))
        restore_converted(checkpoint, model, optimizer)
        named = dict(model.named_parameters())
        for name in NAMES:
            assert torch.equal(named[name].detach().flatten(), expected.read("fp32", name)), (checkpoint.name, name)
            state = optimizer.state[named[name]]
            assert state["step"] == STEP
            for key in MOMENTS:
                assert torch.equal(state[key].flatten(), expected.read(key, name)), (checkpoint.name, key, name)
    for name in ("fp32-1", "bf16-2"):  # ZeRO-3 and ZeRO-2
        assert_universal(tmp_path / name, tmp_path / f"{name}-universal")


def assert_universal(checkpoint: Path, universal: Path) -> None:
    """Compare what is read from a checkpoint with DeepSpeed's conversion of it, bit for bit."""
    folder = str(checkpoint / "pytorch_model")
    options = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    ds_to_universal.main(Namespace(input_folder=folder, output_folder=str(universal), **options, **workers))
    saved = read_optimizer(checkpoint, {})
    for name, key in itertools.product(NAMES, ("fp32", *MOMENTS)):
        theirs = torch.load(universal / "zero" / name / f"{key}.pt", weights_only=True)
        tensor = theirs["param"] if isinstance(theirs, dict) else theirs  # ZeRO-1 and 2, or 3
        assert torch.equal(saved.read(key, name), tensor.flatten()), (name, key)
