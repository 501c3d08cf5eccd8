"""Exports of each stage, as typed: a step, the best checkpoint, and the mean of the last ones into a repository."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rekatrain.trainer.cli import main
from tests.end_to_end.small_runs import LORA, rloo_recipe, write_data, write_recipe
from tests.helpers.fake_hub import serve_hub

# Held-out means of a user's reward, evaluation by evaluation: the third one is the best.
REWARD = """
import json


def scripted(completions, **kwargs):
    scores = json.load(open("scores.json"))
    json.dump(scores[1:], open("scores.json", "w"))
    return [float(scores[0])] * len(completions)
"""


def train(folder: Path, model: Path, stage: str, lora: dict[str, Any] | None) -> None:
    """Train four steps with a checkpoint after each; the best one is not the last, in stage reward if it so happens."""
    common = {"max_steps": 4, "save_steps": 1, "save_total_limit": 9, "learning_rate": 1e-2, "eval_steps": 1}
    if stage == "rloo":
        (folder / "judges.py").write_text(REWARD)
        (folder / "scores.json").write_text("[0.1, 0.2, 0.9, 0.3]")
        rloo = common | {"metric_for_best_model": "eval/rewards/judges:scripted/mean"}
        path = rloo_recipe(folder, "run", model, rloo=rloo, lora=lora)
        evaluate = {"reward": "judges:scripted", "max_completion_length": 4}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluate": evaluate}))
    else:
        # The largest loss is that of the first evaluation.
        metric = {"sft": ("loss", True), "reward": ("eval_margin", True)}[stage]
        best = {"eval_strategy": "steps", "metric_for_best_model": metric[0], "greater_is_better": metric[1]}
        settings = common | best | {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
        form = "prompt_answer" if stage == "sft" else "preference"
        held_out = folder / "held_out.jsonl"
        if stage == "reward":
            rows = [{"prompt": f"{n}?", "chosen": f"{n}", "rejected": f"{n}, no"} for n in range(20, 24)]
            held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections = {"dataset": folder / f"{stage}.jsonl", "eval_dataset": held_out}
        data = {key: {"path": str(path), "format": form} for key, path in sections.items()}
        path = write_recipe(folder, "run", model, stage=stage, lora=lora, **data, **{stage: settings})
    main(["train", str(path)])


def merged(folder: Path, model: Path, step: int, stage: str, is_adapter: bool) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, an adapter being merged by PEFT."""
    checkpoint = folder / "run" / "checkpoints" / f"checkpoint-{step}"
    auto_class: Any = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    options = {"num_labels": 1} if stage == "reward" else {}
    base = auto_class.from_pretrained(model if is_adapter else checkpoint, **options)
    trained = PeftModel.from_pretrained(base, str(checkpoint)).merge_and_unload() if is_adapter else base
    return dict(trained.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapter"])
@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
def test_named_best_and_mean_checkpoints_are_exported(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog, stage: str, lora: dict | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_data(tmp_path)
    train(tmp_path, model_folder, stage, lora)
    best = int((tmp_path / "run" / "checkpoints" / "best").resolve().name.removeprefix("checkpoint-"))
    assert best < 4 or stage == "reward"
    states = {step: merged(tmp_path, model_folder, step, stage, lora is not None) for step in (1, 2, 3, 4)}
    stacked = {name: torch.stack([states[step][name] for step in (2, 3, 4)]) for name in states[4]}
    mean = {name: tensors.double().mean(0).float() for name, tensors in stacked.items()}

    options = {"2": states[2], "best": states[best]}
    for name, expected in options.items():
        main(["export", "run", f"out-{name}", "--checkpoint", name])
        assert_holds(tmp_path / f"out-{name}", expected, stage)
    with caplog.at_level("INFO"), serve_hub() as hub:
        main(["export", "run", "mean", "--average", "3", "--push-to-hub", "me/model"])
    assert_holds(tmp_path / "mean", mean, stage)
    assert any((mean[name] - states[4][name]).abs().max() > 1e-4 for name in mean)
    files = {str(path.relative_to(tmp_path / "mean")): path for path in (tmp_path / "mean").rglob("*")}
    assert hub.files == {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    assert "the mean of checkpoint-2, checkpoint-3, checkpoint-4" in hub.files["README.md"].decode()
    assert hub.created[0]["visibility"] == "private"
    assert "uploaded to https://huggingface.co/me/model/commit/abc" in caplog.text
    assert "of a separate mean" in caplog.text or stage != "reward"


def assert_holds(out: Path, expected: dict[str, Tensor], stage: str) -> None:
    """Assert that transformers loads exactly these weights from an export."""
    auto_class: Any = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    assert_close(dict(auto_class.from_pretrained(out).state_dict()), expected, rtol=0, atol=0)
