"""Logging of a run: metrics.jsonl, the progress line, tables of completions, and the recipe's trackers."""

import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.completions_table import choose_group, completions_table
from rekatrain.trainer.run.folder import METRICS_FILE, RunFolder
from rekatrain.trainer.run.memory import peak_host_bytes
from rekatrain.trainer.run.trackers import Trackers

Metrics = Mapping[str, float | int | None]

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
        self._trackers = Trackers(recipe, run, first_step=first_step)
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
        self._trackers.log({name: value for name, value in metrics.items() if value is not None}, step)

    def completions(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Print a table of a few completions of a step, and record all of them with the trackers.

        records: those of rollouts.jsonl
        """
        table = completions_table(choose_group(records), title=f"step {step}/{self._max_steps}")
        self._bar.write(table, file=sys.stderr)
        self._trackers.log_completions(records, step)

    def close(self) -> None:
        """End the progress line and the tracked runs."""
        if not self._bar.disable:
            enable_progress_bar()
        self._bar.close()
        self._trackers.finish()


def _peak_memory() -> dict[str, float]:
    """Return the peak memory of this process so far, in GB: of the host, and of its GPU if it has one."""
    peak = {"memory/host": peak_host_bytes() / 1e9}
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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
