"""The best checkpoint of a run, kept whatever the limit says, and the end of a run without progress."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.run.best import BestModel, link_best, resolve_checkpoint
from rekatrain.trainer.run.folder import RunFolder
from tests.end_to_end.small_runs import records, rloo_recipe, weights, write_data, write_recipe

# The score of the held-out completions by a file that the test writes: step by step, as evaluations come.
REWARD = """
import json


def scripted(completions, **kwargs):
    scores = json.load(open("scores.json"))
    json.dump(scores[1:], open("scores.json", "w"))
    return [float(scores[0])] * len(completions)
"""


def test_best_model_is_the_first_of_equals() -> None:
    best = BestModel(metric="accuracy", patience=2)
    values = [0.2, 0.5, 0.5, 0.4]
    assert [best.update(step, {"eval/accuracy": value}) for step, value in enumerate(values, 1)] == [1, 1, 0, 0]
    assert (best.step, best.value, best.num_worse, best.is_exhausted) == (2, 0.5, 2, True)
    assert not best.update(5, {}) and not best.update(6, {"eval/accuracy": None}) and best.num_worse == 2


@pytest.mark.parametrize(
    ("metric", "greater", "expected"),
    [("loss", None, 2), ("eval_loss", None, 2), ("loss", True, 1), ("eval_accuracy", None, 1), ("accuracy", False, 2)],
)
def test_best_model_has_the_direction_of_its_metric(metric: str, greater: bool | None, expected: int) -> None:
    best = BestModel(metric=metric, greater_is_better=greater)
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0)):
        best.update(step, {"eval_loss": value, "eval_accuracy": value})
    assert best.step == expected


def test_best_model_continues_its_own_metric_alone(tmp_path: Path) -> None:
    best = BestModel(metric="loss")
    best.update(4, {"eval_loss": 2.0})
    best.save(tmp_path)
    same, other = BestModel(metric="loss"), BestModel(metric="accuracy")
    same.restore(tmp_path)
    other.restore(tmp_path)
    assert (same.step, same.value, other.step) == (4, 2.0, None)


def test_link_best_leaves_a_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "best").write_text("mine")
    (tmp_path / "checkpoint-1").mkdir()
    link_best(tmp_path, 1)
    link_best(tmp_path, None)
    assert (tmp_path / "best").read_text() == "mine"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path)
    (tmp_path / "judges.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def make_rloo(folder: Path, model_folder: Path) -> Callable[..., Path]:
    """Write a recipe of six steps whose evaluations have scripted means; only the newest checkpoint is kept."""

    def make(*scores: float, **rloo: Any) -> Path:
        (folder / "scores.json").write_text(json.dumps(scores))
        settings = {"max_steps": 6, "eval_steps": 1, "save_steps": 100, "save_total_limit": 1}
        settings |= {"metric_for_best_model": "eval/rewards/judges:scripted/mean", **rloo}
        path = rloo_recipe(folder, "run", model_folder, rloo=settings)
        evaluate = {"reward": "judges:scripted", "max_completion_length": 4}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluate": evaluate}))
        return path

    return make


def test_rloo_keeps_and_exports_the_best_checkpoint(
    make_rloo: Callable[..., Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_rloo(0.1, 0.6, 0.3, 0.9, 0.5, 0.2)
    main(["train", str(path)])
    checkpoints = folder / "run" / "checkpoints"
    # Each new best is saved, and kept beside the last one; the bests before it are gone.
    assert {file.name for file in checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-6", "best"}
    assert (checkpoints / "best").resolve().name == "checkpoint-4"
    assert resolve_checkpoint(folder / "run", "best").name == "checkpoint-4"
    main(["export", "run", "out", "--checkpoint", "best", "--dtype", "float32"])
    exported, expected = weights(folder, "out"), weights(folder / "run", 4)
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    with pytest.raises(SystemExit):
        main(["export", "run", "other", "--checkpoint", "5"])
    assert "has none of step 5; it has checkpoint-4, checkpoint-6" in capsys.readouterr().err


def test_rloo_stops_early_and_stays_stopped(make_rloo: Callable[..., Path], folder: Path) -> None:
    path = make_rloo(0.5, 0.7, 0.6, 0.7, 0.9, early_stopping_patience=2)
    main(["train", str(path)])
    assert [r["step"] for r in records(folder / "run") if "reward" in r] == [1, 2, 3, 4]
    assert {file.name for file in (folder / "run/checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4", "best"}
    main(["train", str(path), "--resume"])
    assert records(folder / "run")[-1]["step"] == 4
    # With more patience it goes on, and knows the best of before.
    (folder / "scores.json").write_text("[0.6, 0.65]")
    main(["train", str(path), "--resume", "rloo.early_stopping_patience=9"])
    assert resolve_checkpoint(folder / "run", "best").name == "checkpoint-2"
    assert RunFolder(folder / "run").checkpoint(6).is_dir()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_trl_stages_keep_the_best_checkpoint(stage: str, folder: Path, model_folder: Path) -> None:
    metric = {"sft": "loss", "reward": "eval_margin"}[stage]
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 6, "save_total_limit": 1}
    settings |= {"metric_for_best_model": metric, "learning_rate": 0.02, "lr_scheduler_type": "constant"}
    settings |= {"per_device_train_batch_size": 2, "gradient_checkpointing": False, "logging_steps": 1}
    form = "prompt_answer" if stage == "sft" else "preference"
    data = {"path": str(folder / f"{stage}.jsonl"), "format": form}
    held_out = {"path": str(folder / ("held_out.jsonl" if stage == "sft" else "pairs.jsonl")), "format": form}
    pairs = [{"prompt": f"{n}?", "chosen": f"{n}, no", "rejected": f"{2 * n}"} for n in range(20, 24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sections: dict[str, Any] = {"stage": stage, "dataset": data, "eval_dataset": held_out, stage: settings}
    path = write_recipe(folder, "run", model_folder, **sections)
    main(["train", str(path)])
    key, choose = {"sft": ("eval_loss", min), "reward": ("eval_margin", max)}[stage]
    measured = {r["step"]: r[key] for r in records(folder / "run") if key in r}
    assert [*measured] == [1, 2, 3, 4, 5, 6]
    best = next(step for step, value in measured.items() if value == choose(measured.values()))
    kept = {int(file.name.removeprefix("checkpoint-")) for file in (folder / "run/checkpoints").glob("checkpoint-*")}
    assert kept == {best, 6} and resolve_checkpoint(folder / "run", "best").name == f"checkpoint-{best}"
    # A run that is resumed from its end with more patience than it needs does nothing more.
    main(["train", str(path), "--resume", f"{stage}.early_stopping_patience=9"])
    assert best < 6 or stage == "sft", "the case would not tell the best from the newest"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metric_for_best_model": "eval/acc"}, "'eval/acc', which no evaluation of this run has: eval/accuracy, "),
        ({"metric_for_best_model": "eval/accuracy", "eval_steps": None}, "needs evaluations while the run trains: set"),
        ({"metric_for_best_model": None, "early_stopping_patience": 2}, "needs rloo.metric_for_best_model"),
        ({"metric_for_best_model": None, "greater_is_better": True}, "needs rloo.metric_for_best_model"),
    ],
)
def test_best_model_settings_are_checked_before_weights(
    section: dict[str, Any], message: str, make_rloo: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", str(make_rloo(**section))])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_resolve_checkpoint_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no checkpoints: give the folder of a run"):
        resolve_checkpoint(tmp_path, "best")
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(InputError, match="trained without metric_for_best_model"):
        resolve_checkpoint(tmp_path, "best")
    assert resolve_checkpoint(tmp_path, "checkpoint-3") == resolve_checkpoint(tmp_path, "3")
