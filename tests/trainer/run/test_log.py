"""The log of a run: records, the progress line, and Weights & Biases, which never ends a run."""

import logging
import time
from pathlib import Path

import pytest
import wandb
from accelerate import PartialState
from accelerate.tracking import WandBTracker

from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.folder import METRICS_FILE, RunFolder
from rekatrain.trainer.run.log import RunLog, progress_text
from rekatrain.trainer.run.records import read_records

RLOO = ["reward", "kl", "completions/mean_length", "completions/clipped_ratio", "tokens_per_second"]


def test_progress_text_shows_short_names_and_units() -> None:
    metrics = {"reward": 0.6137, "kl": 0.0312, "completions/mean_length": 28.46, "completions/clipped_ratio": 0.004}
    assert progress_text({**metrics, "tokens_per_second": 1520.4}, RLOO, "eta 2m09s", 80) == (
        "reward 0.614  kl 0.031  len 28.5  clipped 0%  1,520 tok/s  eta 2m09s"
    )
    assert progress_text({"reward": None, "margin": 0.25}, ["reward", "margin"], "eta 0m00s", 80) == (
        "margin 0.25  eta 0m00s"
    )


def test_progress_text_drops_the_last_metrics_first() -> None:
    metrics = dict.fromkeys(RLOO, 0.5)
    full = progress_text(metrics, RLOO, "eta 2m09s", 200)
    for room in range(len("eta 2m09s"), len(full) + 1):
        text = progress_text(metrics, RLOO, "eta 2m09s", room)
        assert len(text) <= room and text.endswith("eta 2m09s")
        assert full.startswith(text.removesuffix("eta 2m09s").rstrip())
    assert text == full


# Weights & Biases never ends a run


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, workspace: Path) -> None:
    """No account, and nothing that says where wandb should write but the current folder."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(workspace / "home"))


def run_log(workspace: Path, **section: object) -> RunLog:
    recipe = Recipe(
        stage="rloo",
        output_dir=str(workspace / "run"),
        model={"pretrained_model_name_or_path": "m"},
        dataset={"path": "rows.jsonl"},
        rloo={"max_steps": 2},
        wandb=section,
    )
    run = RunFolder(recipe.output_dir)
    run.start(recipe, 0)
    PartialState()  # accelerate's tracker logs through it
    return RunLog(run, recipe, first_step=0, max_steps=2)


def take_two_steps(log: RunLog, workspace: Path) -> None:
    log.step(1, {"reward": 0.5, "kl": None}, headline=["reward"])
    log.step(2, {"reward": 1.0, "kl": None}, headline=["reward"])
    log.close()
    records = read_records(workspace / "run" / METRICS_FILE)
    times = [record.pop("time") for record in records]
    assert all(0.05 < record.pop("memory/host") < 1000 for record in records)  # GB
    assert records == [{"step": 1, "reward": 0.5, "kl": None}, {"step": 2, "reward": 1.0, "kl": None}]
    assert 0 <= times[1] - times[0] < 60 and abs(times[0] - time.time()) < 600


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelno >= logging.WARNING and r.name.startswith("rekatrain.trainer")
    ]


def test_wandb_without_an_account_writes_an_offline_run(offline, workspace, caplog):
    log = run_log(workspace, project="test")
    assert wandb.run is not None and wandb.run.settings.mode == "offline"
    assert wandb.run.config["stage"] == "rloo"
    take_two_steps(log, workspace)
    assert wandb.run is None
    assert len(list(workspace.rglob("offline-run-*/run-*.wandb"))) == 1
    assert warnings_of(caplog) == []


def test_wandb_run_is_continued_by_a_resumed_run(offline, workspace, caplog):
    names = []
    for _ in range(2):
        log = run_log(workspace, project="test")
        assert wandb.run is not None and wandb.run.config["rloo"] == {"max_steps": 2}
        names.append(wandb.run.id)
        log.close()
    assert names[0] == names[1] == (workspace / "run" / "wandb_id").read_text().strip()
    files = list(workspace.rglob("offline-run-*/run-*.wandb"))
    assert {file.stem for file in files} == {f"run-{names[0]}"}
    assert warnings_of(caplog) == []


def test_wandb_keeps_the_id_of_the_user(offline, workspace):
    log = run_log(workspace, id="mine")
    assert wandb.run is not None and wandb.run.id == "mine"
    log.close()
    assert not (workspace / "run" / "wandb_id").exists()


def fail(*_: object, **__: object) -> None:
    raise ConnectionError("no route to the service")


@pytest.mark.parametrize(
    ("method", "warning"),
    [
        ("start", "wandb could not start: no route to the service; the run goes on without it"),
        ("store_init_configuration", "wandb could not start: no route to the service; the run goes on without it"),
        ("log", "wandb stopped: no route to the service; metrics go on in metrics.jsonl"),
        ("finish", None),
    ],
)
def test_wandb_failure_is_reported_once(method, warning, offline, workspace, caplog, monkeypatch):
    for name in ("start", "store_init_configuration", "log", "finish"):
        monkeypatch.setattr(WandBTracker, name, fail if name == method else lambda *_, **__: None)
    take_two_steps(run_log(workspace), workspace)
    warnings = warnings_of(caplog)
    assert len(warnings) == 1
    assert warning is None or warnings == [warning]


def test_wandb_unknown_key_is_reported_once(offline, workspace, caplog):
    take_two_steps(run_log(workspace, projct="x"), workspace)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("wandb could not start: ") and "projct" in warning
