"""Logging of a run: metrics.jsonl, the progress line, and Weights & Biases if the recipe has a `wandb:` section."""

import logging
import math
import os
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import wandb
from accelerate.tracking import WandBTracker
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.checkpoints import write_whole
from rekatrain.trainer.run.folder import METRICS_FILE, RunFolder

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float | int | None]

# In the run folder: the id of the run at Weights & Biases.
WANDB_ID_FILE = "wandb_id"
WIDTH = 100
# How the progress line shows a metric; others appear under their own names, as numbers of four digits.
SHOWN = {
    "reward": "reward {:.3g}",
    "kl": "kl {:.2g}",
    "completions/mean_length": "len {:.1f}",
    "completions/clipped_ratio": "clipped {:.0%}",
    "completions/stop_ratio": "stop {:.0%}",
    "mean_token_accuracy": "accuracy {:.1%}",
    "accuracy": "accuracy {:.1%}",
    "grad_norm": "grad {:.3g}",
    "epoch": "epoch {:.2f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "eval_loss": "eval loss {:.4g}",
    "eval_mean_token_accuracy": "eval accuracy {:.1%}",
    "eval/accuracy": "held-out {:.1%}",
    "eval/completions/mean_length": "len {:.1f}",
    "eval_accuracy": "eval accuracy {:.1%}",
    "eval_margin": "eval margin {:.3g}",
}


class RunLog:
    """Records the metrics of each step; made on the main process only."""

    def __init__(self, run: RunFolder, recipe: Recipe, *, first_step: int, max_steps: int) -> None:
        self._run = run
        self._first_step, self._max_steps = first_step, max_steps
        self._started = time.monotonic()
        self._tracker = _start_wandb(recipe, run)
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            disable=not is_terminal,
            bar_format="step {n_fmt}/{total_fmt} |{bar:10}| {desc}",
            ncols=min(WIDTH, shutil.get_terminal_size().columns),
        )
        if is_terminal:
            disable_progress_bar()  # transformers' bars for the files of a checkpoint would break ours

    def step(self, step: int, metrics: Metrics, *, headline: list[str]) -> None:
        """Record a step; `headline` names the metrics of the progress line, the most telling first."""
        metrics = {
            name: None if value is None or not math.isfinite(value) else value for name, value in metrics.items()
        }
        self._run.append(METRICS_FILE, [{"step": step, **metrics, **_peak_memory(), "time": time.time()}])
        seconds_per_step = (time.monotonic() - self._started) / max(step - self._first_step, 1)
        eta = f"eta {_duration(seconds_per_step * (self._max_steps - step))}"
        count = f"step {step}/{self._max_steps}"
        if self._bar.disable:
            print(
                f"{count}  {progress_text(metrics, headline, eta, WIDTH - len(count) - 2)}", file=sys.stderr, flush=True
            )
        else:
            room = self._bar.ncols - len(count) - len(" |1234567890| ")
            self._bar.set_description_str(progress_text(metrics, headline, eta, room), refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        self._call_tracker("log", {name: value for name, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        """End the progress line and the tracked run."""
        if not self._bar.disable:
            enable_progress_bar()
        self._bar.close()
        self._call_tracker("finish")

    def _call_tracker(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments, **options)
        # No failure of a tracking service may end a run of days: it is reported once, and the run goes on.
        except Exception as error:
            logger.warning("wandb stopped: %s; metrics go on in %s", error, METRICS_FILE)
            self._tracker = None


def _peak_memory() -> dict[str, float]:
    """Return the peak memory of this process so far, in GB: of the host, and of its GPU if it has one."""
    peak = {"memory/host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}  # Linux counts in KiB
    return peak | ({"memory/gpu": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_available() else {})


def progress_text(metrics: Metrics, headline: list[str], eta: str, room: int) -> str:
    """Return the text of a step's metrics and the remaining time, of at most `room` characters.

    >>> progress_text({"reward": 0.61, "kl": None, "tokens_per_second": 520.4}, ["reward", "kl"], "eta 2m09s", 80)
    'reward 0.61  eta 2m09s'
    """
    values = {name: metrics.get(name) for name in headline}
    parts = [_shown(name, value) for name, value in values.items() if value is not None]
    while parts and len("  ".join([*parts, eta])) > room:
        parts.pop()
    return "  ".join([*parts, eta])


def _shown(name: str, value: float | int) -> str:
    return SHOWN.get(name, f"{name.replace('_', ' ')} {{:.4g}}").format(value)


def _start_wandb(recipe: Recipe, run: RunFolder) -> WandBTracker | None:
    if recipe.wandb is None:
        return None
    section = {"project": "rekatrain", "dir": recipe.output_dir, **recipe.wandb}
    if "WANDB_MODE" not in os.environ and "mode" not in section and not _is_logged_in():
        section["mode"] = "offline"
    try:
        if "WANDB_RUN_ID" not in os.environ and "id" not in section:
            section["id"] = _tracked_id(run)
        if section.get("mode", os.environ.get("WANDB_MODE")) != "offline":  # wandb warns that it ignores it there
            section = {"resume": "allow", **section}
        tracker = WandBTracker(section.pop("project"), **section)
        tracker.start()
        tracker.store_init_configuration(asdict(recipe))  # it holds no secret: the recipe's check rejects them
    # A missing key, network or entity must not cost the run. wandb raises several unrelated classes.
    except Exception as error:
        logger.warning("wandb could not start: %s; the run goes on without it", error)
        return None
    return tracker


def _tracked_id(run: RunFolder) -> str:
    """Return the id of the tracked run, which a resumed run continues; it is chosen at the first start."""
    file = run.path / WANDB_ID_FILE
    if not file.exists():
        write_whole(file, f"{secrets.token_hex(4)}\n".encode())
    return file.read_text(encoding="utf-8").strip()


def _is_logged_in() -> bool:
    try:
        return wandb.login(prompt=False)
    except wandb.Error as error:
        logger.warning("wandb: the key could not be verified (%s); tracking offline", str(error).splitlines()[0])
        return False


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
