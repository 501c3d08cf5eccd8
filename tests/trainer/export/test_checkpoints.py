"""The checkpoint that an export reads: by name, by a link, and never one that is damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rekatrain.trainer.cli import main
from rekatrain.trainer.export.lazy_weights import LazyWeights
from rekatrain.trainer.models.source import find_source
from tests.helpers.exports import servable_llama, write_sft_recipe

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps whose last checkpoint is the best; read only."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_sft_recipe(folder, tokenizer)
    recipe = json.loads(path.read_text())
    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    recipe |= {"eval_dataset": recipe["dataset"], "sft": recipe["sft"] | best | {"max_steps": 3, "save_steps": 1}}
    path.write_text(json.dumps(recipe))
    main(["train", str(path)])
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line of an export that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["export", *map(str, arguments)])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1, line
    return line


def test_named_checkpoint_with_a_changed_bit_is_rejected(run: Path, no_weights: None, capsys) -> None:
    damaged = run / "checkpoints" / "checkpoint-2"
    flip_a_bit(damaged / WEIGHTS)
    for arguments in ([run, "--checkpoint", "2"], [damaged], [run, "--average", "3"]):
        line = refusal(capsys, arguments[0], run.parent / "out", *arguments[1:])
        assert f"{WEIGHTS} is damaged" in line and "checkpoint-2" in line
    flip_a_bit(run / "checkpoints" / "checkpoint-3" / WEIGHTS)
    assert "checkpoint-3" in refusal(capsys, run, run.parent / "out", "--checkpoint", "best")
    assert not (run.parent / "out").exists()


def test_names_that_are_no_checkpoint_are_rejected(run: Path, no_weights: None, capsys) -> None:
    shutil.copytree(run / "checkpoints" / "checkpoint-2", run / "checkpoints" / "mine")
    assert "is not named checkpoint-N" in refusal(capsys, run / "checkpoints" / "mine", run.parent / "out")
    for name in ("7", "", "mine", "-1"):
        line = refusal(capsys, run, run.parent / "out", f"--checkpoint={name}")
        assert "it has checkpoint-1, checkpoint-2, checkpoint-3" in line
    shutil.rmtree(run / "checkpoints" / "checkpoint-3")  # the best one; those before it name their own
    assert "has none of step 9" in refusal(capsys, run, run.parent / "out", "--checkpoint", "9")


def test_best_is_found_beside_a_damaged_record(run: Path, capsys) -> None:
    (run / "checkpoints" / "checkpoint-3" / "best_model.json").write_text("{")
    main(["export", str(run), str(run.parent / "out"), "--checkpoint", "best", "--as", "adapter"])
    exported = load_file(run.parent / "out" / WEIGHTS)
    second = load_file(run / "checkpoints" / "checkpoint-2" / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"  # stored as trained: no alpha_pattern
    assert (exported[name] == second[name]).all()


def test_link_best_is_exported(run: Path) -> None:
    main(["export", str(run / "checkpoints" / "best"), str(run.parent / "out"), "--as", "adapter"])
    assert "after 3 steps" in (run.parent / "out" / "README.md").read_text()


def test_adapter_on_a_pickled_base_is_merged_once(run: Path, tokenizer) -> None:
    base = run.parent / "model"
    model = servable_llama(tokenizer)
    model.config.save_pretrained(base)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    config_file = run / "checkpoints" / "checkpoint-3" / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"base_model_name_or_path": str(base)}))
    weights = LazyWeights(find_source(str(config_file.parent)))
    assert not weights.is_streamed
    expected = PeftModel.from_pretrained(model, str(config_file.parent)).merge_and_unload().state_dict()
    for _ in range(2):  # reading merges
        assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_base_without_config_is_one_line_in_every_form(run: Path, capsys) -> None:
    config_file = run / "checkpoints" / "checkpoint-3" / "adapter_config.json"
    (run.parent / "empty").mkdir()
    changed = json.loads(config_file.read_text()) | {"base_model_name_or_path": str(run.parent / "empty")}
    config_file.write_text(json.dumps(changed))
    (run / "checkpoints" / "checkpoint-3" / "manifest.json").unlink()
    for form in ("merged", "adapter", "gguf"):
        assert "empty" in refusal(capsys, config_file.parent, run.parent / "out", "--as", form)
