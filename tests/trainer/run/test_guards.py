"""Numbers that go wrong: nothing that is not finite is trained on or saved, and no run ends as if all were well."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.errors import TrainingStopped
from rekatrain.trainer.cli import main
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.sft import train as train_sft
from tests.end_to_end.small_runs import records, rloo_recipe, weights, write_data, write_recipe
from tests.helpers.rloo import by_ids, make_setup, run_updates

# The reward of step 2 overflows float32 in the gradient, though it is a finite float32 itself.
OVERFLOWING = """
calls = 0


def score(completions, **kwargs):
    global calls
    calls += 1
    scale = 3e38 if calls == 2 else 1.0
    return [scale * (sum(map(ord, text)) % 7 / 7) for text in completions]


def word_sums(completions, **kwargs):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def huge(completions, **kwargs):
    return [1e300] * len(completions)


def nothing(completions, **kwargs):
    return [None] * len(completions)
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows and the rewards above, in which the test runs."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def make_recipe(workspace: Path, model_folder: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Write an RLOO recipe that is judged by one function of the rewards above, in a module of this test."""
    module = f"bad_numbers_{abs(hash(request.node.name))}"
    (workspace / f"{module}.py").write_text(OVERFLOWING)

    def make(function: str, rloo: dict[str, Any] | None = None, **sections: object) -> Path:
        settings = {"beta": 0.0, "max_steps": 4, **(rloo or {})}
        path = rloo_recipe(workspace, "run", model_folder, rloo=settings, **sections)
        recipe = json.loads(path.read_text())
        recipe["rewards"] = {f"{module}:{function}": {"weight": 1.0}}
        path.write_text(json.dumps(recipe))
        return path

    return make


def stopped(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a recipe that must end with status 1, and return its one line."""
    with pytest.raises(SystemExit) as caught:
        main(["train", str(path)])
    assert caught.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rekatrain: error: ")]
    (line,) = lines
    return line.removeprefix("rekatrain: error: ")


def is_finite(folder: Path) -> bool:
    files = list(folder.glob("*model*.safetensors"))
    assert files
    return all(bool(tensor.isfinite().all()) for file in files for tensor in load_file(file).values())


def test_rloo_stops_before_an_update_that_is_not_finite(
    workspace: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = stopped(make_recipe("score"), capsys)
    assert line.startswith("step 2: the gradient is not finite, and on_nonfinite is stop.")
    batch = records(workspace / "run", "nonfinite.jsonl")
    assert len(batch) == 8 and all(record["step"] == 2 and record["completion_ids"] for record in batch)
    assert [folder.name for folder in (workspace / "run" / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert is_finite(workspace / "run" / "checkpoints" / "checkpoint-1")


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_rloo_skips_updates_that_are_not_finite(
    workspace: Path, make_recipe: Callable[..., Path], num_iterations: int
) -> None:
    rloo = {"num_iterations": num_iterations}
    main(["train", str(make_recipe("score", rloo=rloo, on_nonfinite="skip", max_nonfinite_skips=1))])
    run = workspace / "run"
    before, after = (weights(run, step) for step in (1, 2))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], value) for name, value in weights(run, 3).items())
    metrics = records(run)
    assert [step["step"] for step in metrics] == [1, 2, 3, 4] and metrics[1]["grad_norm"] is None
    assert all(value is None or math.isfinite(value) for step in metrics for value in step.values())


def test_rloo_stops_at_more_skips_than_allowed(
    make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = stopped(make_recipe("score", on_nonfinite="skip", max_nonfinite_skips=0), capsys)
    assert "1 updates are more than max_nonfinite_skips (0)" in line


def test_reward_that_float32_cannot_hold_is_an_error_and_no_value(
    workspace: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "failed on 8 of its last 8 completions" in stopped(make_recipe("huge"), capsys)
    assert not (workspace / "run" / "checkpoints" / "checkpoint-1").exists()


def test_rloo_stops_if_nothing_can_be_scored(
    make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = stopped(make_recipe("nothing", rloo={"max_unscorable_steps": 2}), capsys)
    assert line.startswith("step 2: no completion of the last 2 steps (rloo.max_unscorable_steps) has a reward")


def test_take_step_without_a_signal_makes_no_update(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def constant(completion_ids: list[list[int]], **_: object) -> list[float | None]:
        return [0.5] * len(completion_ids)

    setup = make_setup(tokenizer, constant)
    step_records, gradients = run_updates(policy, setup)
    assert gradients == [] and len(step_records) == 20
    assert {record["advantage"] for record in step_records} == {0.0}
    assert len(run_updates(policy, make_setup(tokenizer, by_ids))[1]) == 1


@pytest.mark.parametrize(
    ("learning_rate", "message"),
    [(1e12, "the gradient is not finite, and on_nonfinite is stop."), (1e38, "weights are not finite, the first is")],
)
def test_sft_saves_nothing_that_is_not_finite(
    workspace: Path, model_folder: Path, learning_rate: float, message: str
) -> None:
    path = write_recipe(
        workspace,
        "sft",
        model_folder,
        stage="sft",
        dataset={"path": str(workspace / "sft.jsonl"), "format": "prompt_answer"},
        sft={
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": learning_rate,
            "save_steps": 1,
            "bf16": False,
        },
    )
    # Without the checks of the recipe, which reject such a learning rate.
    with pytest.raises(TrainingStopped) as caught:
        train_sft(load_recipe(path), resume=False)
    assert message in str(caught.value)
    assert all(is_finite(folder) for folder in (workspace / "sft" / "checkpoints").glob("checkpoint-*"))
    if "gradient" in message:
        about, *batch = records(workspace / "sft", "nonfinite.jsonl")
        assert about["num_parameters"] > 0 and len(batch) == 2  # the sequences of the update
        texts = [f"human: {row['prompt']} <sep> assistant:" for row in records(workspace, "sft.jsonl")]
        for record in batch:
            assert record["process"] == record["micro_batch"] == 0 and record["num_trained"] > 0
            assert any(record["text"].startswith(text) for text in texts) and record["input_ids"]


@pytest.mark.parametrize("key", ["temperature", "learning_rate", "beta", "max_grad_norm"])
def test_rloo_rejects_a_setting_that_is_not_finite(
    make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = make_recipe("score")
    for value in (".inf", ".nan"):
        with pytest.raises(SystemExit) as caught:
            main(["train", str(path), f"rloo.{key}={value}"])
        assert caught.value.code == 2
        assert f"rloo.{key} is " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bound", "says"),
    [
        ({"grad_norm_above": 1e-9}, "grad_norm is "),
        ({"entropy_below": 1e3}, "below stop_if.entropy_below (1000)"),
        ({"entropy_above": 1e-3, "grad_norm_above": None}, "above stop_if.entropy_above (0.001)"),
        ({"kl_above": 0.0}, "above stop_if.kl_above (0)"),
    ],
)
def test_rloo_stops_at_a_metric_beyond_its_bound(
    workspace: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], bound: dict, says: str
) -> None:
    rloo = {"beta": 0.1, "learning_rate": 0.01, "save_steps": 1}
    line = stopped(make_recipe("word_sums", rloo=rloo, stop_if=bound), capsys)
    step = 2 if "kl_above" in bound else 1  # the policy of step 1 is the reference
    assert line.startswith(f"step {step}: ") and says in line
    assert [record["step"] for record in records(workspace / "run")][-1] == step  # the step is logged
    assert not (workspace / "run" / "checkpoints" / f"checkpoint-{step}").exists()


def test_rloo_within_its_bounds_goes_on(workspace: Path, make_recipe: Callable[..., Path]) -> None:
    bounds = {"kl_above": 1e3, "entropy_below": 0.0, "entropy_above": 20.0, "grad_norm_above": 1e6}
    main(["train", str(make_recipe("word_sums", rloo={"beta": 0.1}, stop_if=bounds))])
    assert len(records(workspace / "run")) == 4


def sft_recipe(workspace: Path, model_folder: Path, sft: dict[str, Any], **sections: object) -> Path:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 1, "bf16": False}
    dataset = {"path": str(workspace / "sft.jsonl"), "format": "prompt_answer"}
    return write_recipe(
        workspace, "sft", model_folder, stage="sft", dataset=dataset, sft={**settings, **sft}, **sections
    )


@pytest.mark.parametrize(("key", "bound"), [("loss_above", 1e-3), ("entropy_below", 1e3), ("grad_norm_above", 1e-9)])
def test_sft_stops_at_a_metric_beyond_its_bound(
    workspace: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], key: str, bound: float
) -> None:
    line = stopped(sft_recipe(workspace, model_folder, {}, stop_if={key: bound}), capsys)
    assert line.startswith("step 1: ") and f"stop_if.{key}" in line
    assert not list((workspace / "sft" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("stop_if", "says"),
    [
        ({"loss_above": 1.0}, "stop_if.loss_above: stage rloo has no such metric"),
        ({"kl_below": 1.0}, "stop_if.kl_below"),
        ({"kl_above": -1.0}, "stop_if.kl_above is -1"),
        ({"grad_norm_above": "nan"}, "stop_if.grad_norm_above"),
        ({"kl_above": 1.0}, "stop_if.kl_above needs a reference policy, and rloo.beta is 0"),
    ],
)
def test_stop_if_rejects_a_bound_that_cannot_be_checked(
    make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], stop_if: dict, says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", str(make_recipe("word_sums", stop_if=stop_if))])
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_sft_has_a_learning_rate_from_the_first_update(workspace: Path, model_folder: Path) -> None:
    sft = {"learning_rate": 0.3, "lr_scheduler_type": "linear", "warmup_steps": 2}
    main(["train", str(sft_recipe(workspace, model_folder, sft))])
    rates = [record["learning_rate"] for record in records(workspace / "sft")]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.15])


def test_rloo_has_a_learning_rate_from_the_first_update(workspace: Path, make_recipe: Callable[..., Path]) -> None:
    rloo = {"learning_rate": 0.3, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    main(["train", str(make_recipe("word_sums", rloo=rloo))])
    rates = [record["learning_rate"] for record in records(workspace / "run")]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.15])
