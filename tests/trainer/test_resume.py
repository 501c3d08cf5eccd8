"""Runs that are stopped and resumed: what they record, and the learning rates of a run that is made longer."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rekatrain.trainer.cli import main
from tests.end_to_end.small_runs import LORA, records, rloo_recipe, weights, write_data, write_recipe

STAGES = ["sft", "reward", "rloo"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rows and a user's reward."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def recipe(stage: str, folder: Path, model: Path, **options: Any) -> str:
    """Write a recipe of a stage with a LoRA adapter; `options` are keys of the section of the stage."""
    if stage == "rloo":
        return str(rloo_recipe(folder, "run", model, lora=LORA, rloo=options))
    form = "preference" if stage == "reward" else "prompt_answer"
    dataset = {"path": str(folder / f"{stage}.jsonl"), "format": form}
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "gradient_checkpointing": False} | options
    return str(write_recipe(folder, "run", model, stage=stage, lora=LORA, dataset=dataset, **{stage: settings}))


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_resume_between_two_records_repeats_the_records(stage: str, folder: Path, model_folder: Path) -> None:
    options = {"max_steps": 8, "logging_steps": 2, "save_steps": 3, "gradient_accumulation_steps": 2}
    path, run = recipe(stage, folder, model_folder, **options), folder / "run"
    timings = {"time", "tokens_per_second"}

    def train(*arguments: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        main(["train", path, *arguments])
        logged = [{key: value for key, value in r.items() if key not in timings} for r in records(run)]
        return logged, weights(run, 8)

    expected_records, expected = train()
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    actual_records, actual = train("--resume")
    assert actual_records == expected_records
    assert [r["step"] for r in actual_records] == [2, 4, 6, 8] and actual_records[1]["num_tokens"] > 0
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert 0 < records(run)[1]["tokens_per_second"] < 1e6


@pytest.mark.parametrize(("name", "options"), [("linear", {}), ("cosine", {"warmup_steps": 1})])
@pytest.mark.parametrize("stage", STAGES)
def test_longer_run_follows_the_longer_schedule(
    stage: str, name: str, options: dict[str, Any], folder: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged = {} if stage == "rloo" else {"logging_steps": 1}
    path = recipe(stage, folder, model_folder, lr_scheduler_type=name, save_steps=2, **options, **logged)
    main(["train", path, f"{stage}.max_steps=6"])
    longer = [record["learning_rate"] for record in records(folder / "run")]
    shutil.rmtree(folder / "run")
    main(["train", path, f"{stage}.max_steps=2"])
    shorter = [record["learning_rate"] for record in records(folder / "run")]
    with caplog.at_level(logging.INFO):
        main(["train", path, "--resume", f"{stage}.max_steps=6"])
    assert [record["learning_rate"] for record in records(folder / "run")] == [*shorter, *longer[2:]]
    assert min(longer) > 0 and len(longer) == 6
    (line,) = [message for message in caplog.messages if "learning rate" in message]
    assert line.startswith(f"the learning rate follows the schedule of 6 steps: step 3 has {longer[2]:.4g}; ")
