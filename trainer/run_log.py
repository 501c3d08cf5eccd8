"""What a run tells while it goes on: metrics.jsonl, a progress line, and Weights & Biases where the recipe has it."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import wandb
from accelerate.tracking import WandBTracker
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run_folder import METRICS_FILE, RunFolder
from tqdm import tqdm

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float | int | None]


class RunLog:
    """Takes the metrics of each step; made on the main process only."""

    def __init__(self, run: RunFolder, recipe: Recipe, *, first_step: int, max_steps: int) -> None:
        self._run = run
        self._first_step, self._max_steps = first_step, max_steps
        self._started = time.monotonic()
        self._tracker = _start_wandb(recipe)
        self._bar = tqdm(total=max_steps, initial=first_step, disable=not sys.stderr.isatty(), unit="step")

    def step(self, step: int, metrics: Metrics, *, headline: list[str]) -> None:
        """Record a step; `headline` names the metrics of the progress line."""
        self._run.append(METRICS_FILE, [{"step": step, **metrics}])
        shown = " ".join(f"{name} {_short(metrics[name])}" for name in headline if name in metrics)
        if self._bar.disable:
            seconds_a_step = (time.monotonic() - self._started) / max(step - self._first_step, 1)
            eta = _duration(seconds_a_step * (self._max_steps - step))
            print(f"step {step}/{self._max_steps} {shown} eta {eta}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(shown)
            self._bar.update(step - self._bar.n)
        self._tell_tracker("log", {name: value for name, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        """End the progress line and the tracked run."""
        self._bar.close()
        self._tell_tracker("finish")

    def _tell_tracker(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments, **options)
        # Whatever a tracking service does wrong, it must not end a run of days: it is said once, and the run goes on.
        except Exception as error:
            logger.warning("wandb stopped: %s; metrics go on in %s", error, METRICS_FILE)
            self._tracker = None


def _start_wandb(recipe: Recipe) -> WandBTracker | None:
    if recipe.wandb is None:
        return None
    section = {"project": "rekatrain", "dir": recipe.output_dir, **recipe.wandb}
    if "WANDB_MODE" not in os.environ and "mode" not in section and not _is_logged_in():
        section["mode"] = "offline"
    try:
        tracker = WandBTracker(section.pop("project"), **section)
        tracker.start()
        tracker.store_init_configuration({"stage": recipe.stage, "seed": recipe.seed, "model": recipe.model})
    # No key, no route, a wrong entity: none of them is worth a run. wandb raises several unrelated classes.
    except Exception as error:
        logger.warning("wandb could not start: %s; the run goes on without it", error)
        return None
    return tracker


def _is_logged_in() -> bool:
    try:
        return wandb.login(prompt=False)
    except wandb.Error as error:
        logger.warning("wandb: the key could not be verified (%s); tracking offline", str(error).splitlines()[0])
        return False


def _short(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
