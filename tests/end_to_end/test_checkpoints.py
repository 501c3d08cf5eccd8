"""Runs that were killed while they saved, or whose newest checkpoint is damaged, resume and end with the same bits."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from rekatrain.trainer.cli import main
from rekatrain.trainer.run import folder as run_folder
from tests.end_to_end.small_runs import LORA, records, rloo_recipe, weights, write_data, write_recipe

STAGES = ["sft", "rloo"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def recipe(stage: str, folder: Path, name: str, model: Path, **options: Any) -> str:
    """Write a recipe of three steps with a checkpoint after each."""
    if stage == "rloo":
        return str(rloo_recipe(folder, name, model, lora=LORA, rloo=options))
    dataset = {"path": str(folder / f"{stage}.jsonl"), "format": "prompt_answer"}
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_steps": 1}
    settings |= {"logging_steps": 1} | options
    return str(write_recipe(folder, name, model, stage=stage, lora=LORA, dataset=dataset, **{stage: settings}))


def assert_equal_runs(stage: str, one: Path, other: Path) -> None:
    """Assert that two runs have the same last weights and the same records."""
    expected, actual = weights(one, 3), weights(other, 3)
    assert expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)
    key = "grad_norm"
    assert [(r["step"], r[key]) for r in records(one)] == [(r["step"], r[key]) for r in records(other)]
    if stage == "rloo":
        assert records(one, "rollouts.jsonl") == records(other, "rollouts.jsonl")


def kill_at(function: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the run at the given call of a function of the run folder, before it does anything."""
    original: Callable[..., Any] = getattr(run_folder, function)
    calls = iter(range(1, 100))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(run_folder, function, interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["seal", "publish", "rotate"])
@pytest.mark.parametrize("stage", STAGES)
def test_first_resume_works_after_a_kill_while_saving(
    folder: Path, model_folder: Path, stage: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["train", recipe(stage, folder, "whole", model_folder)])
    killed = recipe(stage, folder, "killed", model_folder, save_total_limit=1)
    with monkeypatch.context() as patch:
        kill_at(function, 2, patch)
        with pytest.raises(SystemExit):
            main(["train", killed])
    checkpoints = folder / "killed" / "checkpoints"
    assert (checkpoints / "checkpoint-1").exists()  # the one before is there until the new one is whole
    assert (checkpoints / ".rekatrain-partial" / "checkpoint-2").exists() == (function != "rotate")
    for name in ("checkpoint-best", "checkpoint-4-keep", "checkpoint-2.partial"):
        (checkpoints / name).mkdir()
    main(["train", killed, "--resume"])
    assert_equal_runs(stage, folder / "whole", folder / "killed")
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "checkpoint-2.partial",
        "checkpoint-3",
        "checkpoint-4-keep",
        "checkpoint-best",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_export_leaves_the_partial_folder_of_the_user(folder: Path, model_folder: Path, form: str) -> None:
    main(["train", recipe("sft", folder, "run", model_folder, max_steps=1)])
    (folder / "out.partial").mkdir()
    (folder / "out.partial" / "notes.txt").write_text("the user's")
    (folder / ".out.rekatrain-partial").mkdir()  # of an export that was killed
    before = set(folder.iterdir())
    main(["export", "run", "out", "--as", form])
    assert set(folder.iterdir()) == before - {folder / ".out.rekatrain-partial"} | {folder / "out"}
    assert (folder / "out.partial" / "notes.txt").read_text() == "the user's"


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Have every write beyond a size fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def last_error(command: list[str], capsys: pytest.CaptureFixture[str], status: int) -> str:
    """Run a command that fails, and return its error, which is one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(command)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == status and lines[-1].startswith("rekatrain: error: "), lines
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_full_disk_is_one_line_and_the_next_resume_works(
    folder: Path,
    model_folder: Path,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["train", recipe(stage, folder, "whole", model_folder)])
    files = list((folder / "whole" / "checkpoints" / "checkpoint-1").iterdir())
    path = recipe(stage, folder, "full", model_folder, save_total_limit=1)
    for size in {path.stat().st_size for path in files if path.stat().st_size > 4096}:
        shutil.rmtree(folder / "full", ignore_errors=True)
        with monkeypatch.context() as patch, largest_file(resource.RLIM_INFINITY):

            def fill_disk(*_: object, limit: int = size - 1, newest: int, **__: object) -> None:
                if newest == 0:  # at the start of the run
                    return
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

            patch.setattr(run_folder, "rotate", fill_disk)  # after the first checkpoint
            assert "free space" in last_error(["train", path], capsys, 1)
        assert (folder / "full" / "checkpoints" / "checkpoint-1").exists()
        main(["train", path, "--resume"])
        assert_equal_runs(stage, folder / "whole", folder / "full")


@pytest.mark.parametrize("stage", STAGES)
def test_full_disk_is_noticed_before_weights_are_loaded(
    folder: Path, model_folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loads weights"))
    path = recipe(stage, folder, "run", model_folder)
    with largest_file(8192):
        message = last_error(["train", path], capsys, 2)
    assert "output_dir" in message and "cannot be written: File too large" in message
    (folder / "file").write_text("")
    message = last_error(["train", path, f"output_dir={folder / 'file' / 'run'}"], capsys, 2)
    assert "cannot be written: Not a directory" in message


@pytest.mark.slow
def test_export_to_a_full_disk_is_one_line_and_leaves_nothing(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", recipe("sft", folder, "run", model_folder, max_steps=1)])
    before = set(folder.iterdir())
    with largest_file(8192):
        assert "free space" in last_error(["export", "run", "out"], capsys, 1)
    assert set(folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_lock_keeps_a_second_run_out(
    folder: Path, model_folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.1)
    path = recipe(stage, folder, "run", model_folder, max_steps=1)
    main(["train", path])  # unlocks the folder at its end
    before = {file: file.stat().st_mtime_ns for file in (folder / "run").rglob("*")}
    with FileLock(folder / "run" / "run.lock", timeout=0), monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loads weights"))
        message = last_error(["train", path, "--resume"], capsys, 2)
    assert "is in use: another run has locked" in message
    assert {file: file.stat().st_mtime_ns for file in (folder / "run").rglob("*")} == before
    with monkeypatch.context() as patch:
        kill_at("seal", 1, patch)
        with pytest.raises(SystemExit):
            main(["train", path, "--resume", f"{stage}.max_steps=2"])
    main(["train", path, "--resume", f"{stage}.max_steps=2"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resume_falls_back_from_each_damaged_file(
    folder: Path, model_folder: Path, stage: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(stage, folder, "whole", model_folder)
    main(["train", path])
    whole, damaged = folder / "whole", folder / "saved"
    whole.rename(damaged)
    files = [file.name for file in (damaged / "checkpoints" / "checkpoint-3").iterdir()]
    assert {"adapter_model.safetensors", "trainer_state.json", "manifest.json"} <= set(files)
    assert any(name.startswith("optimizer") for name in files) and any("r" in name for name in files)
    for count, name in enumerate(sorted(files)):
        shutil.copytree(damaged, whole)
        file = whole / "checkpoints" / "checkpoint-3" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes([content, content[:-1], b""][count % 3])
        if count % 4 == 3:
            file.unlink()
        caplog.clear()
        main(["train", path, "--resume"])
        assert len([line for line in caplog.messages if line.startswith("skipped ")]) == 1, name
        assert_equal_runs(stage, damaged, whole)
        shutil.rmtree(whole)

    shutil.copytree(damaged, whole)
    for step in (1, 2, 3):
        (whole / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(b"")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["train", path, "--resume"])
    assert stopped.value.code == 2
    assert "no checkpoint of" in capsys.readouterr().err.splitlines()[-1]
