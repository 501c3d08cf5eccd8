"""What a run on TRL's trainers cannot be resumed with is one line."""

import json
from pathlib import Path

import pytest

from rekatrain.trainer.cli import main
from rekatrain.trainer.processes.launch import Launch
from rekatrain.trainer.run.checkpoints import read_manifest
from tests.end_to_end.small_runs import write_data, write_recipe


def test_resume_rejects_a_run_that_saved_no_optimizer(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    sft = {"max_steps": 1, "per_device_train_batch_size": 1, "save_only_model": True, "gradient_checkpointing": False}
    dataset = {"path": "sft.jsonl", "format": "prompt_answer"}
    path = write_recipe(tmp_path, "run", model_folder, stage="sft", dataset=dataset, sft=sft)
    main(["train", str(path)])
    for options in ((), ("--dry-run",)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["train", str(path), "--resume", "sft.max_steps=2", *options])
        assert ended.value.code == 2
        assert "was saved without its optimizer (sft.save_only_model)" in capsys.readouterr().err


def test_resume_rejects_another_batch_and_cut_off_saves(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "1 + 1 =", "answer": 2}\n')
    recipe = {
        "stage": "sft",
        "output_dir": "run",
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": {"path": "rows.jsonl", "format": "prompt_answer"},
        "sft": {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_checkpointing": False},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    main(["train", "recipe.yaml"])
    (checkpoint,) = Path("run").glob("checkpoints/checkpoint-1")
    assert Launch(**read_manifest(checkpoint)["launch"]) == Launch(engine="single", zero_stage=None, num_processes=1)
    for batch, message in (
        (2, "takes steps of 1 rows, and this launch would take 2"),
        (1, "it has no manifest.json"),
    ):
        options = ["sft.max_steps=2", f"sft.per_device_train_batch_size={batch}"]
        with pytest.raises(SystemExit):
            main(["train", "recipe.yaml", "--resume", *options])
        assert message in capsys.readouterr().err
        (checkpoint / "manifest.json").unlink(missing_ok=True)
