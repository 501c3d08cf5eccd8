"""Runs that are stopped, changed and resumed: their records, learning rates and weights, and what is refused."""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rekatrain.trainer.cli import main
from tests.end_to_end.small_runs import LORA, records, rloo_recipe, start, weights, write_data, write_recipe

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
    timings = {"time", "tokens_per_second", "memory/host"}

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


OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {"logging_steps": 1, "gradient_accumulation_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant"},
    "reward": {"logging_steps": 1, "gradient_accumulation_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant"},
    "rloo": {"per_device_generation_batch_size": 8},
}
# What somebody changes after running out of memory.
SMALLER = {
    "sft": [
        "sft.per_device_train_batch_size=1",
        "sft.gradient_accumulation_steps=4",
        "sft.gradient_checkpointing=true",
    ],
    "rloo": [
        "rloo.micro_batch_tokens=40",
        "rloo.per_device_generation_batch_size=4",
        "rloo.gradient_checkpointing=true",
        "scoring.timeout=9",
        "rewards.math_answer.timeout=9",
    ],
}
SMALLER["reward"] = [override.replace("sft", "reward") for override in SMALLER["sft"]]


def stop_after_one_step(stage: str, folder: Path, model: Path, **options: Any) -> str:
    """Take one of two steps -> the recipe."""
    path = recipe(stage, folder, model, **OPTIONS[stage], **options)
    main(["train", path, f"{stage}.max_steps=1"])
    return path


def resume(stage: str, path: str, *overrides: str) -> None:
    main(["train", path, "--resume", f"{stage}.max_steps=2", *overrides])


def error_of(capsys: pytest.CaptureFixture[str], stage: str, path: str, *overrides: str) -> str:
    """Resume a run that is refused -> the one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        resume(stage, path, *overrides)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("rekatrain: error: ")
    return line.removeprefix("rekatrain: error: ")


@pytest.mark.parametrize("stage", STAGES)
def test_free_changes_in_a_moved_folder_change_no_step(
    stage: str, folder: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stop_after_one_step(stage, folder, model_folder)
    shutil.copytree(folder / "run", folder / "moved")
    resume(stage, path, f"output_dir={folder}/./run")
    shutil.copytree(model_folder, folder / "model")
    data = "sums" if stage == "rloo" else stage
    (folder / f"{data}.jsonl").rename(folder / f"moved-{data}.jsonl")
    with caplog.at_level(logging.INFO):
        resume(
            stage,
            path,
            "output_dir=moved",
            f"dataset.path=moved-{data}.jsonl",
            "model.pretrained_model_name_or_path=model",
            *SMALLER[stage],
        )
    (line,) = [message for message in caplog.messages if message.startswith("changed since the checkpoint: ")]
    changed = [override.partition("=")[0] for override in SMALLER[stage]]
    assert all(f"{key} was " in line for key in ["output_dir", "dataset.path", f"{stage}.max_steps", *changed])
    expected, actual = weights(folder / "run", 2), weights(folder / "moved", 2)
    start = weights(folder / "run", 1)
    assert all(torch.allclose(expected[name], actual[name], rtol=1e-5, atol=1e-7) for name in expected)
    assert not all(torch.equal(expected[name], start[name]) for name in expected)
    if stage == "rloo":
        drawn = [[r["completion_ids"] for r in records(folder / name, "rollouts.jsonl")] for name in ("run", "moved")]
        assert drawn[0] == drawn[1]


def change_weights(folder: Path, model: Path) -> str:
    """Copy a model, change one of its weights, and return its folder."""
    shutil.copytree(model, folder / "other")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 0.1
    save_file(tensors, folder / "other" / "model.safetensors", {"format": "pt"})
    return str(folder / "other")


@pytest.mark.parametrize("stage", STAGES)
def test_other_rows_weights_and_lengths_are_refused(
    stage: str,
    folder: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = stop_after_one_step(stage, folder, model_folder)
    data = folder / ("sums.jsonl" if stage == "rloo" else f"{stage}.jsonl")
    whole = data.read_text()
    number = len(whole.splitlines())
    advice = ". Set it back, or start another run, from the weights of this one: rekatrain export RUN OUT"

    data.write_text(whole + whole.splitlines()[0].replace("1 + 1", "90 + 1") + "\n")
    fault = f"--resume: the rows are not those of the checkpoint ({number} then, {number + 1} now)"
    assert error_of(capsys, stage, path) == fault + advice
    assert error_of(capsys, stage, path, "--dry-run") == fault + advice
    data.write_text(whole.replace("2 + 2", "2+2"))
    fault = f"--resume: the rows are not those of the checkpoint ({number}, with other tokens or columns)"
    assert error_of(capsys, stage, path) == fault + advice
    data.write_text(whole)

    other = change_weights(folder, model_folder)
    override = f"model.pretrained_model_name_or_path={other}"
    assert error_of(capsys, stage, path, override) == (
        f"--resume: {other!r} has other weights than those of the checkpoint's adapter; "
        f"model.pretrained_model_name_or_path was {str(model_folder)!r} and is {other!r}{advice}"
    )
    config = json.loads((model_folder / "config.json").read_text())
    shutil.copy(model_folder / "model.safetensors", other)
    (Path(other) / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert f"config.json of {other!r} is not that of the checkpoint" in error_of(capsys, stage, path, override)

    assert f"{stage}.learning_rate was 0.001 and is 0.1: it changes the size of the steps" in error_of(
        capsys, stage, path, f"{stage}.learning_rate=0.1"
    )
    resume(stage, path)
    for loader in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("loads weights"))
    with caplog.at_level(logging.INFO):
        resume(stage, path)
    assert f"{folder / 'run'} is finished: checkpoint-2 is its last checkpoint" in caplog.messages
    assert error_of(capsys, stage, path, f"{stage}.max_steps=1").startswith(
        f"--resume: {stage}.max_steps is 1, but the run has taken 2 steps: raise it, or export an earlier checkpoint"
    )


def test_changed_reward_code_is_a_warning(folder: Path, model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = stop_after_one_step("rloo", folder, model_folder)
    code = folder / "my_rewards.py"
    code.write_text(code.read_text() + "# fixed\n")
    resume("rloo", path)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "changed" in r.getMessage()] == [
        "changed since the checkpoint: the code of the rewards my_rewards:letters; scores may differ"
    ]


def test_more_epochs_continue_a_finished_run(
    folder: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = recipe("sft", folder, model_folder, logging_steps=1)
    longer = ["sft.num_train_epochs=2", "sft.logging_steps=3", "sft.save_steps=4"]
    with caplog.at_level(logging.INFO):
        main(["train", path, "--resume", "sft.num_train_epochs=1"])
        main(["train", path, "--resume", *longer])
        main(["train", path, "--resume", *longer])
    assert [r["step"] for r in records(folder / "run")] == [1, 2, 3, 4, 5, 6, 9, 12]
    assert records(folder / "run")[-1]["epoch"] == 2.0
    saved = {path.name for path in (folder / "run" / "checkpoints").iterdir()}
    assert saved == {"checkpoint-6", "checkpoint-8", "checkpoint-12"}
    assert len([line for line in caplog.messages if line.endswith("checkpoint-12 is its last checkpoint")]) == 1


@pytest.mark.slow
@pytest.mark.launched
@pytest.mark.parametrize("stage", STAGES)
def test_second_run_in_the_folder_is_rejected(
    stage: str, folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(stage, folder, model_folder, max_steps=10**6)
    first = start(folder, "-m", "rekatrain", "train", path)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "run" / "recipe.yaml").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        message = error_of(capsys, stage, path, f"{stage}.max_steps=1000000")
    finally:
        first.kill()
        first.communicate()
    assert message.startswith(f"output_dir {str(folder / 'run')!r} is in use: another run has locked ")
