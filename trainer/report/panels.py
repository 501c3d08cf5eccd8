"""The charts of a report: the metrics that each draws, its heading and its unit. Functions of records alone."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rekatrain.trainer.report.inputs import ReportInput

# Longer series are averaged in bins of equally many steps.
MAX_POINTS = 1000
# Not drawn: indices, and what is drawn as the band of another metric.
NOT_DRAWN = re.compile(
    r"step|time|epoch|(.*_)?num_tokens|total_flos|.*[_/](low|high)|reward_std|rewards/.*/std|"
    r"eval_(runtime|samples_per_second|steps_per_second)"
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart.

    heading: of the section
    title:   of the chart
    metrics: pattern of the names of its metrics; a group of the pattern is the name of the line
    unit:    of the vertical axis: "%", "s", ... or ""
    kind:    lines, or areas on top of each other
    note:    one sentence: how to read it
    """

    heading: str
    title: str
    metrics: str
    unit: str = ""
    kind: str = "lines"
    note: str = ""


PANELS = [
    Panel(heading="Learning", title="Reward", metrics="reward", note="mean total; the band is one standard deviation"),
    Panel(heading="Learning", title="Rewards by name", metrics="rewards/(.+)/mean"),
    Panel(heading="Learning", title="Reward by source", metrics="reward/(.+)"),
    Panel(heading="Learning", title="Loss", metrics="(loss)|eval_loss", note="nats per trained token"),
    Panel(heading="Learning", title="Loss by source", metrics="eval_(.+)_loss"),
    Panel(
        heading="Learning",
        title="Token accuracy",
        metrics="(mean_token_accuracy)|eval_mean_token_accuracy|eval_(.+)_mean_token_accuracy",
        unit="%",
    ),
    Panel(heading="Learning", title="Pairs ranked right", metrics="(accuracy)|eval_accuracy", unit="%"),
    Panel(heading="Learning", title="Margin", metrics="(margin)|eval_margin", note="chosen score minus rejected score"),
    Panel(
        heading="Held out",
        title="Accuracy",
        metrics="eval/(accuracy|avg@.+|pass@.+|maj@.+)",
        unit="%",
        note="bands are 95 % intervals",
    ),
    Panel(heading="Held out", title="Accuracy by source", metrics="eval/(.+)/accuracy", unit="%"),
    Panel(heading="Held out", title="Rewards", metrics="eval/rewards/(.+)/mean", note="bands are 95 % intervals"),
    Panel(heading="Held out", title="Length", metrics="eval/completions/mean_length", unit="tokens"),
    Panel(heading="Held out", title="Cut off", metrics="eval/completions/clipped_ratio", unit="%"),
    Panel(heading="Completions", title="Length", metrics="completions/mean_length", unit="tokens"),
    Panel(
        heading="Completions",
        title="Finish reasons",
        metrics="completions/(stop|eos|clipped)_ratio",
        unit="%",
        kind="areas",
        note="clipped: at the token limit",
    ),
    Panel(
        heading="Completions",
        title="Groups without a signal",
        metrics="frac_reward_zero_std",
        unit="%",
        note="all rewards of the group are equal",
    ),
    Panel(heading="Completions", title="Reasoning closed by its budget", metrics="completions/forced_ratio", unit="%"),
    Panel(heading="Completions", title="Rewards that failed", metrics="rewards/(.+)/errors", unit="%"),
    Panel(heading="Completions", title="Rewards that do not apply", metrics="rewards/(.+)/not_applicable", unit="%"),
    Panel(heading="Completions", title="Correlation of reward and length", metrics="rewards/(.+)/length_correlation"),
    Panel(heading="Policy", title="KL to the reference", metrics="kl", unit="nats"),
    Panel(heading="Policy", title="Entropy", metrics="entropy", unit="nats/token"),
    Panel(heading="Policy", title="Gradient norm", metrics="(grad_norm)|grad_norm_(.+)"),
    Panel(heading="Policy", title="Learning rate", metrics="learning_rate"),
    Panel(
        heading="Policy",
        title="Mismatch of sampler and trainer",
        metrics="mismatch_(.+)",
        unit="nats",
        note="logprob: per completion; kl: per token",
    ),
    Panel(heading="Policy", title="Clipped ratios", metrics="clip_ratio", unit="%"),
    Panel(heading="Speed", title="Where a step's seconds go", metrics="time/(.+)", unit="s", kind="areas"),
    Panel(heading="Speed", title="Throughput", metrics="tokens_per_second", unit="tokens/s"),
    Panel(heading="Speed", title="Memory", metrics="memory/(.+)", unit="GB", note="peak of the main process so far"),
]


def make_panels(inputs: Sequence[ReportInput]) -> list[dict[str, Any]]:
    """Return the charts that have a line, as JSON values; a metric that no panel names gets a chart under "Other".

    Each line: run (index of the input), name, steps, hours (since the run's first record), values, low and high (of the
    band, or null).
    """
    names = dict.fromkeys(name for run in inputs for record in run.metrics for name in record)
    numbers = {name for name in names if any(_number(r.get(name)) is not None for run in inputs for r in run.metrics)}
    drawn = [name for name in names if name in numbers and not NOT_DRAWN.fullmatch(name)]
    panels, taken = [], set()
    for panel in PANELS:
        matches = {name: match for name in drawn if (match := re.fullmatch(panel.metrics, name)) and name not in taken}
        taken |= {*matches}
        labels = {name: next(filter(None, match.groups()), name) for name, match in matches.items()}
        panels.append((panel, labels))
    panels += [
        (Panel(heading="Other", title=name, metrics=re.escape(name)), {name: name})
        for name in drawn
        if name not in taken
    ]
    charts = []
    for panel, labels in panels:
        lines = [
            line
            for index, run in enumerate(inputs)
            for name, label in labels.items()
            if (line := _line(run, name)) is not None and line.update(run=index, name=label) is None
        ]
        # A chart of zeros says nothing about errors, clips and closed reasoning.
        is_empty = all(value == 0 for line in lines for value in line["values"]) and panel.unit == "%"
        if lines and not (is_empty and panel.heading in ("Completions", "Policy")):
            charts.append({**asdict(panel), "lines": lines})
    return charts


def _line(run: ReportInput, name: str) -> dict[str, Any] | None:
    """Return the points of a metric; None if the run has none."""
    records = [record for record in run.metrics if _number(record.get(name)) is not None]
    if not records:
        return None
    start = next((record["time"] for record in run.metrics if _number(record.get("time")) is not None), None)
    bands = [_band(record, name) for record in records]
    columns: dict[str, list[float | None]] = {
        "steps": [record["step"] for record in records],
        "hours": [_hours(record.get("time"), start) for record in records],
        "values": [record[name] for record in records],
        "low": [low for low, _ in bands],
        "high": [high for _, high in bands],
    }
    line: dict[str, Any] = {key: _thin(values) for key, values in columns.items()}
    if all(low is None for low in line["low"]):
        line["low"] = line["high"] = None
    return line


def _band(record: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    if name == "reward":
        deviation = _number(record.get("reward_std"))
        return (None, None) if deviation is None else (record[name] - deviation, record[name] + deviation)
    stem = name.removesuffix("/mean") + ("/" if name.endswith("/mean") else "_")
    low, high = _number(record.get(f"{stem}low")), _number(record.get(f"{stem}high"))
    return (None, None) if low is None or high is None else (low, high)


def _thin(values: Sequence[float | None]) -> list[float | None]:
    """Return means of bins of equally many values, at most MAX_POINTS; digits that no screen shows are dropped."""
    size = -(-len(values) // MAX_POINTS)
    bins = [[v for v in values[first : first + size] if v is not None] for first in range(0, len(values), size)]
    return [float(f"{sum(known) / len(known):.6g}") if known else None for known in bins]


def _hours(time: object, start: float | None) -> float | None:
    number = _number(time)
    return None if number is None or start is None else (number - start) / 3600


def _number(value: object) -> float | None:
    """Return a finite number, None for anything else: a file may have been edited."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < math.inf:
        return None
    return value
