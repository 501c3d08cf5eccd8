"""Evaluation while RLOO trains: the accuracy of `rekatrain evaluate` at that step, and the same training without it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.evaluate import evaluate
from rekatrain.trainer.held_out_prompts import EvaluateConfig
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.evaluation import evaluation_metrics
from tests.end_to_end.small_runs import records, rloo_recipe, weights, write_data

REWARDS = """
def is_even(completions, **kwargs):
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def broken(completions, **kwargs):
    raise RuntimeError("out of order")
"""


@pytest.fixture
def make_recipe(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write an RLOO recipe of three steps with held-out rows."""
    write_data(tmp_path)
    (tmp_path / "judges.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)

    def make(name: str, rloo: dict[str, Any], reward: str = "judges:is_even") -> Path:
        settings = {"reward": reward, "max_completion_length": 10, "temperature": 1.0, "num_generations": 2}
        rloo = {"max_steps": 3, "save_steps": 1, "learning_rate": 1e-2, **rloo}
        path = rloo_recipe(tmp_path, name, model_folder, rloo=rloo)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluate": settings}))
        return path

    return make


def test_evaluation_measures_as_the_command_and_leaves_training_alone(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_recipe("run", {"eval_steps": 2, "eval_on_start": True})
    main(["train", str(path)])
    evaluated = {record["step"]: record for record in records(tmp_path / "run") if "eval/accuracy" in record}
    assert list(evaluated) == [0, 2, 3]
    for step in (2, 3):
        model = f"model.pretrained_model_name_or_path={tmp_path / 'run' / 'checkpoints' / f'checkpoint-{step}'}"
        by_command = evaluate(load_recipe(path, [model]))
        assert by_command.num_graded == 6
        measured = evaluated[step]
        assert measured["eval/accuracy"] == by_command.accuracy
        assert (measured["eval/accuracy_low"], measured["eval/accuracy_high"]) == (by_command.low, by_command.high)
    assert evaluated[0] != evaluated[3]

    main(["train", str(make_recipe("plain", {}))])
    steps = [record for record in records(tmp_path / "run") if "reward" in record]
    plain = records(tmp_path / "plain")
    assert [step["reward"] for step in steps] == [step["reward"] for step in plain] and len(steps) == 3
    ours, theirs = weights(tmp_path / "run", 3), weights(tmp_path / "plain", 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_evaluation_that_fails_does_not_end_the_run(
    make_recipe: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["train", str(make_recipe("run", {"eval_steps": 1, "max_steps": 2}, reward="judges:broken"))])
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    assert "step 1: the held-out prompts could not be evaluated: " in caplog.text and "out of order" in caplog.text


def test_evaluation_metrics_count_first_answers_and_all_lengths() -> None:
    def answer(prompt: int, reward: float | None, index: int = 0, **others: object) -> dict:
        base = {"num_tokens": 4, "num_thinking": 0, "finish_reason": "stop", "source": "a"}
        return {"prompt_index": prompt, "index": index, "rewards": {"math": reward}, **base, **others}

    answers = [answer(0, 1.0), answer(1, 0.5), answer(2, None), answer(3, 1.0, source="b"), answer(0, 1.0, 1)]
    answers.append(answer(3, 0.0, 1, source="b", num_tokens=10, finish_reason="length"))
    metrics = evaluation_metrics(answers, EvaluateConfig(reward="math"))
    assert metrics["eval/accuracy"] == pytest.approx(2 / 3)
    assert (metrics["eval/a/accuracy"], metrics["eval/b/accuracy"]) == (0.5, 1.0)
    low, mean, high = (metrics[f"eval/rewards/math/{key}"] for key in ("low", "mean", "high"))
    assert mean == pytest.approx((1 + 0.5 + 0.5) / 3) and low < mean < high
    assert metrics["eval/completions/mean_length"] == 5 and metrics["eval/completions/clipped_ratio"] == 1 / 6
    nothing = evaluation_metrics([answer(0, None)], EvaluateConfig(reward="math"))
    assert nothing["eval/accuracy"] is None and nothing["eval/rewards/math/mean"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_on_start": True}, "rloo.eval_on_start needs rloo.eval_steps"),
    ],
)
def test_config_rejects_an_evaluation_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RLOOConfig(max_steps=1, **settings)


def test_evaluation_needs_held_out_rows(make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", str(make_recipe("run", {"eval_steps": 1})), "eval_dataset=null"])
    assert caught.value.code == 2 and "no eval_dataset" in capsys.readouterr().err
