"""`rekatrain report`: write one HTML file about runs and evaluations, as they are now."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rekatrain.trainer.report.inputs import ReportInput, read_inputs
from rekatrain.trainer.report.page import write_page
from rekatrain.trainer.report.panels import make_panels
from rekatrain.trainer.report.rollouts import MAX_COMPLETIONS, collect_rollouts

# Of the tiles above the charts: metric, title, is a fraction, and whether the best value is the highest.
TILES = [
    ("eval/accuracy", "held-out accuracy", True, "highest"),
    ("eval_loss", "held-out loss", False, "lowest"),
    ("eval_accuracy", "held-out accuracy", True, "highest"),
    ("reward", "reward", False, None),
    ("loss", "loss", False, None),
    ("accuracy", "accuracy", True, None),
    ("kl", "KL", False, None),
    ("completions/mean_length", "tokens per completion", False, None),
    ("tokens_per_second", "tokens/s", False, None),
]
NUM_TILES = 5


def write_report(paths: Sequence[Path], out: Path, *, max_completions: int = MAX_COMPLETIONS) -> str:
    """Write the report of run folders and evaluation files to `out`; return one line about it."""
    inputs = read_inputs(paths)
    rollouts = collect_rollouts(inputs, max_completions=max_completions)
    title = "rekatrain: " + ", ".join(run.name for run in inputs)
    content = {
        "title": title,
        "written": time.time(),
        "runs": [_summary(run) for run in inputs],
        "panels": make_panels(inputs),
        "recipes": recipe_table([run.recipe for run in inputs]),
        "evaluations": [_evaluation(index, run) for index, run in enumerate(inputs) if run.evaluation is not None],
        "rollouts": rollouts.as_json(),
    }
    write_page(out, title, content, rollouts.chunks)
    shown, total = len(rollouts.completions["group"]), rollouts.total
    count = f"{total:,} completions" if shown == total else f"{shown:,} of {total:,} completions, an even sample"
    return f"{out}: {out.stat().st_size / 1e6:.1f} MB, {count}; open it in a browser"


def recipe_table(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each key of the recipes: key, the value in each recipe as text or None, and if they differ.

    >>> recipe_table([{"seed": 0, "a": 1}, {"seed": 3, "a": 1}])[0]
    {'key': 'seed', 'values': ['0', '3'], 'differs': True}
    """
    rows = []
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = [_text(recipe[key]) if key in recipe else None for recipe in recipes]
        rows.append({"key": key, "values": values, "differs": len({*values}) > 1})
    return rows


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _summary(run: ReportInput) -> dict[str, Any]:
    """Return the name of a run, how far it is, and its tiles: title, last value, best value with its step."""
    times = [record["time"] for record in run.metrics if isinstance(record.get("time"), int | float)]
    section = f"{run.stage}.max_steps"
    return {
        "name": run.name,
        "path": str(run.path),
        "stage": run.stage,
        "step": max((record["step"] for record in run.metrics), default=None),
        "max_steps": run.recipe.get(section),
        "seconds": times[-1] - times[0] if len(times) > 1 else None,
        "tiles": [tile for entry in TILES if (tile := _tile(run, *entry))][:NUM_TILES],
    }


def _tile(run: ReportInput, name: str, title: str, is_fraction: bool, best: str | None) -> dict[str, Any] | None:
    points = [(record["step"], record[name]) for record in run.metrics if isinstance(record.get(name), int | float)]
    if not points:
        return None
    tile: dict[str, Any] = {"title": title, "value": points[-1][1], "is_fraction": is_fraction, "first": points[0][1]}
    if best and len(points) > 1:
        choose = max if best == "highest" else min
        tile["best_step"], tile["best"] = choose(points, key=lambda point: point[1])
    return tile


def _evaluation(index: int, run: ReportInput) -> dict[str, Any]:
    """Return the figures of an evaluation, without its answers."""
    assert run.evaluation is not None
    figures = {key: value for key, value in run.evaluation.items() if key != "answers"}
    return {"run": index, **figures}
