"""Trackers of a run, through Accelerate: the sections `wandb`, `tensorboard` and `trackio` of a recipe.

Each gets the metrics, the resolved recipe, and tables of completions. A tracker that fails is reported once and left
out; it never ends a run. A resumed run continues the tracked run.
"""

import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

import wandb
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from rekatrain.trainer.recipe.load import Recipe, dump_recipe
from rekatrain.trainer.run.checkpoints import write_whole
from rekatrain.trainer.run.completions_table import clean, completions_table
from rekatrain.trainer.run.folder import METRICS_FILE, RunFolder

logger = logging.getLogger(__name__)

PROJECT = "rekatrain"
# In the run folder: the id of the run at Weights & Biases, and its name at Trackio.
WANDB_ID_FILE = "wandb_id"
TRACKIO_NAME_FILE = "trackio_name"
TENSORBOARD_FOLDER = "tensorboard"
COLUMNS = ("step", "prompt", "gold", "completion", "reward", "advantage", "finish_reason")

Records = Sequence[Mapping[str, Any]]


class Trackers:
    """The trackers of a run that work; made on the main process only."""

    def __init__(self, recipe: Recipe, run: RunFolder, *, first_step: int) -> None:
        """Start those whose sections the recipe has; `first_step` is the step that the run goes on from."""
        self._working: dict[str, GeneralTracker] = {}
        makers: dict[str, Callable[[], GeneralTracker]] = {
            "wandb": lambda: _make_wandb(recipe, run),
            "tensorboard": lambda: _make_tensorboard(recipe, run, first_step),
            "trackio": lambda: _make_trackio(recipe, run),
        }
        for name, make in makers.items():
            if getattr(recipe, name) is None:
                continue
            # A missing key, network or entity must not cost the run. The libraries raise many unrelated classes.
            try:
                with redirect_stdout(sys.stderr):  # Trackio prints how to show its dashboard
                    tracker = make()
                    tracker.start()
                    _store_recipe(name, tracker, recipe)
                self._working[name] = tracker
            except Exception as error:
                logger.warning("%s could not start: %s; the run goes on without it", name, error)

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Record the metrics of a step."""
        self._call_each(lambda name, tracker: tracker.log(dict(metrics), step=step))

    def log_completions(self, records: Records, step: int) -> None:
        """Record completions of a step as a table."""
        self._call_each(lambda name, tracker: _log_table(name, tracker, records, step))

    def finish(self) -> None:
        """End the tracked runs."""
        with redirect_stdout(sys.stderr):
            self._call_each(lambda name, tracker: tracker.finish())

    def _call_each(self, call: Callable[[str, GeneralTracker], object]) -> None:
        for name, tracker in [*self._working.items()]:
            try:
                call(name, tracker)
            # No failure of a tracking service may end a run of days: it is reported once, and the run goes on.
            except Exception as error:
                logger.warning("%s stopped: %s; metrics go on in %s", name, error, METRICS_FILE)
                del self._working[name]


def _make_wandb(recipe: Recipe, run: RunFolder) -> WandBTracker:
    section: dict[str, Any] = {"project": PROJECT, "dir": recipe.output_dir, **(recipe.wandb or {})}
    if "WANDB_MODE" not in os.environ and "mode" not in section and not _is_logged_in():
        section["mode"] = "offline"
    if "WANDB_RUN_ID" not in os.environ and "id" not in section:
        section["id"] = _remembered(run, WANDB_ID_FILE, secrets.token_hex(4))
    if section.get("mode", os.environ.get("WANDB_MODE")) != "offline":  # wandb warns that it ignores it there
        section = {"resume": "allow", **section}
    return WandBTracker(section.pop("project"), **section)


def _make_tensorboard(recipe: Recipe, run: RunFolder, first_step: int) -> TensorBoardTracker:
    section = {"log_dir": str(run.path / TENSORBOARD_FOLDER), **(recipe.tensorboard or {})}
    # The steps that a resumed run repeats are dropped.
    section = {"purge_step": first_step + 1, **section} if first_step else section
    return TensorBoardTracker("", section.pop("log_dir"), **section)


def _make_trackio(recipe: Recipe, run: RunFolder) -> TrackioTracker:
    name = _remembered(run, TRACKIO_NAME_FILE, f"{run.path.name}-{secrets.token_hex(2)}")
    section: dict[str, Any] = {"project": PROJECT, "name": name, "resume": "allow", **(recipe.trackio or {})}
    # It holds no secret: the recipe's check rejects them.
    section["config"] = {**asdict(recipe), **(section.get("config") or {})}
    return TrackioTracker(section.pop("project"), **section)


def _store_recipe(name: str, tracker: GeneralTracker, recipe: Recipe) -> None:
    if name == "wandb":
        tracker.store_init_configuration(asdict(recipe))
    elif name == "tensorboard":  # its table of hyperparameters takes no sections
        tracker.log({"recipe": _as_code(dump_recipe(recipe))}, step=0)


def _log_table(name: str, tracker: GeneralTracker, records: Records, step: int) -> None:
    rewards = list(dict.fromkeys(reward for record in records for reward in record["rewards"]))
    rows = [
        [record.get(column) if column != "gold" else str(record.get("gold")) for column in COLUMNS]
        + [record["rewards"].get(reward) for reward in rewards]
        for record in records
    ]
    columns = [*COLUMNS, *rewards]
    if isinstance(tracker, WandBTracker):
        tracker.log_table("completions", columns=columns, data=rows, step=step)
    elif name == "trackio":
        import pandas
        import trackio

        tracker.log({"completions": trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step)
    else:
        tracker.log({"completions": _as_code(completions_table(records, title=f"step {step}"))}, step=step)


def _as_code(text: str) -> str:
    """Return a text as a block of code in Markdown, which TensorBoard shows."""
    return "\n".join(f"    {line}" for line in clean(text).splitlines())


def _remembered(run: RunFolder, name: str, value: str) -> str:
    """Return the content of a file of the run folder, which is `value` at the first start; a resumed run reads it."""
    file = run.path / name
    if not file.exists():
        write_whole(file, f"{value}\n".encode())
    return file.read_text(encoding="utf-8").strip()


def _is_logged_in() -> bool:
    try:
        return wandb.login(prompt=False)
    except wandb.Error as error:
        logger.warning("wandb: the key could not be verified (%s); tracking offline", str(error).splitlines()[0])
        return False
