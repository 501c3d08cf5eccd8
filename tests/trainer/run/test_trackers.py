"""Trackers: the metrics, the whole recipe and completions arrive; a resumed run goes on; none of them ends a run."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trackio
import wandb
from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker, TrackioTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.sections import check_sections
from rekatrain.trainer.run.folder import RunFolder
from rekatrain.trainer.run.log import RunLog

COMPLETIONS = [
    {
        "step": 1, "prompt_index": 0, "prompt": "human: 1+1? <sep> assistant:", "gold": "2", "completion": text,
        "completion_ids": [1], "finish_reason": "stop", "reward": reward, "advantage": reward - 0.5,
        "rewards": {"math_answer": reward}, "reward_errors": {},
    }
    for text, reward in (("2 <sep>", 1.0), ("\x1b[31m3", 0.0))
]  # fmt: skip


@pytest.fixture
def make_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunLog]:
    """Starts the log of a run with some trackers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "trackio"]:
        if hasattr(module, "TRACKIO_DIR"):  # read from the environment once, at the import
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    PartialState()  # accelerate's trackers log through it

    def make(*, first_step: int = 0, **trackers: Any) -> RunLog:
        model, dataset = {"pretrained_model_name_or_path": "m"}, {"path": "rows.jsonl"}
        rloo = {"max_steps": 4, "beta": 0.25}
        recipe = Recipe(stage="rloo", output_dir="run", model=model, dataset=dataset, rloo=rloo, **trackers)
        run = RunFolder(recipe.output_dir)
        if not first_step:
            run.start(recipe, 0)
        return RunLog(run, recipe, first_step=first_step, max_steps=4)

    return make


def take_steps(log: RunLog, *steps: int) -> None:
    for step in steps:
        log.completions(step, COMPLETIONS)
        log.step(step, {"reward": 0.5 * step, "kl": None}, headline=["reward"])
    log.close()


def events() -> EventAccumulator:
    """Read TensorBoard's files as TensorBoard does."""
    return EventAccumulator("run/tensorboard").Reload()


def test_tensorboard_has_metrics_recipe_and_completions(make_log: Callable[..., RunLog]) -> None:
    take_steps(make_log(tensorboard={}), 1, 2, 3)
    take_steps(make_log(tensorboard={}, first_step=2), 3, 4)  # step 3 is repeated
    found = events()
    scalars = found.Scalars("reward")
    assert [(each.step, each.value) for each in scalars] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    recipe, table = (next(text for tag, text in texts.items() if tag.startswith(name)) for name in ("recipe", "compl"))
    assert "beta: 0.25" in recipe and "2 <sep>" in table and "math_answer 1" in table and "\x1b" not in table


def test_trackio_run_is_continued_by_a_resumed_run(make_log: Callable[..., RunLog], tmp_path: Path) -> None:
    take_steps(make_log(trackio={"project": "sums"}), 1, 2)
    name = Path("run/trackio_name").read_text().strip()
    take_steps(make_log(trackio={"project": "sums"}, first_step=2), 3)
    assert trackio.SQLiteStorage.get_runs("sums") == [name]
    logs = trackio.SQLiteStorage.get_logs("sums", name)
    assert [each["reward"] for each in logs if "reward" in each] == [0.5, 1.0, 1.5]
    assert sum("completions" in each for each in logs) == 3
    config = trackio.SQLiteStorage.get_run_config("sums", name)
    assert config["rloo"] == {"max_steps": 4, "beta": 0.25} and config["seed"] == 0


def test_wandb_gets_completions_as_a_table(make_log: Callable[..., RunLog], monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # an earlier test may have had it read other variables
    log = make_log(wandb={"project": "sums"})
    assert wandb.run is not None and wandb.run.config["rloo"] == {"max_steps": 4, "beta": 0.25}
    tables: list[Any] = []
    logged = wandb.run.log

    def record(values: dict[str, Any], **options: Any) -> None:
        tables.extend(value for value in values.values() if isinstance(value, wandb.Table))
        logged(values, **options)

    monkeypatch.setattr(wandb.run, "log", record)
    take_steps(log, 1)
    (table,) = tables
    row = dict(zip(table.columns, table.data[0], strict=True))
    assert row["completion"] == "2 <sep>" and row["math_answer"] == 1.0 and row["gold"] == "2" and len(table.data) == 2


@pytest.mark.parametrize(("name", "tracker"), [("tensorboard", TensorBoardTracker), ("trackio", TrackioTracker)])
@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_tracker_that_fails_is_reported_once_and_alone(
    name: str, tracker: type, method: str, make_log: Callable[..., RunLog], monkeypatch: Any, caplog: Any
) -> None:
    works = getattr(tracker, method)

    def fail(*arguments: object, **options: object) -> None:
        if method == "finish":  # a run that stays open would write after the test
            works(*arguments)
        raise ConnectionError("no route to the service")

    monkeypatch.setattr(tracker, method, fail)
    other = {"tensorboard": "trackio", "trackio": "tensorboard"}[name]
    take_steps(make_log(**{name: {}, other: {}}), 1, 2)
    warnings = [
        r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("rekatrain")
    ]
    assert len(warnings) == 1 and warnings[0].startswith(f"{name} ") and "no route to the service" in warnings[0]
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2
    if other == "tensorboard":
        assert len(events().Scalars("reward")) == 2


@pytest.mark.parametrize(("name", "key"), [("tensorboard", "logdir"), ("trackio", "projct"), ("wandb", "projct")])
def test_tracker_sections_are_checked(name: str, key: str) -> None:
    recipe = Recipe(
        stage="sft", output_dir="run", model={"pretrained_model_name_or_path": "m"}, dataset={"path": "rows.jsonl"},
        **{name: {key: "x"}},
    )  # fmt: skip
    with pytest.raises(InputError, match=f"{name}.{key}"):
        check_sections(recipe)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_tracker_that_is_not_installed_is_one_line(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    sections = {"model": {"pretrained_model_name_or_path": "m"}, "dataset": {"path": "rows.jsonl"}, name: {}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"stage": "sft", "output_dir": "run", **sections}))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "recipe.yaml")])
    line = f"rekatrain: error: {name}: {name} is not installed: pip install 'rekatrain[trackers]'\n"
    assert ended.value.code == 2 and capsys.readouterr().err == line
