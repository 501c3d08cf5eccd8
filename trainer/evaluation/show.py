"""The figures of an evaluation as lines for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rekatrain.trainer.held_out_prompts import EvaluateConfig

REASONS = {"stop": "stop", "eos": "eos", "length": "length"}


def show_figures(model: str, config: EvaluateConfig, figures: Mapping[str, Any]) -> None:
    """Print accuracy, rates over several answers, mean rewards, sources and budgets."""
    for line in lines_of(model, config, figures):
        print(line)


def lines_of(model: str, config: EvaluateConfig, figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `show_figures`."""
    ratios = {name: figures["completions"][f"{name}_ratio"] for name in REASONS}
    reasons = ", ".join(
        f"{name} {ratio:.0%}" for name, ratio in sorted(ratios.items(), key=lambda pair: -pair[1]) if ratio
    )
    yield (
        f"{model}: {config.reward} {_rate(figures)} ({figures['num_right']:g} of {figures['num_graded']}, temperature "
        f"{config.temperature:g}); finish reasons: {reasons}"
    )
    if "avg" in figures:
        most = max(figures["avg_at"])
        yield f"  avg@{most} {_rate(figures['avg'])}" + (
            f", maj@{most} {_rate(figures['maj'])}" if "maj" in figures else ""
        )
        if "maj_gain" in figures:
            mean, low, high = (100 * figures["maj_gain"][key] for key in ("mean", "low", "high"))
            yield f"  maj@{most} - avg@{most}: {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
        for name in ("avg", "pass", "maj"):
            if f"{name}_at" in figures:
                yield "  " + ", ".join(f"{name}@{k} {rate:.1%}" for k, rate in figures[f"{name}_at"].items())
    for name, values in figures["rewards"].items():
        yield f"  {name}: mean {values['mean']:.4g} [{values['low']:.4g}, {values['high']:.4g}]"
    for name, of_source in figures.get("sources", {}).items():
        yield f"  source {name or '(unnamed)'}: {_rate(of_source)} ({of_source['num_graded']} prompts)"
    if "budgets" in figures:
        yield "  budget  thinking tokens  accuracy"
        for point in figures["budgets"]:
            budget = "none" if point["reasoning_budget"] is None else f"{point['reasoning_budget']:,}"
            majority = f"  majority {point['maj']['accuracy']:.1%}" if "maj" in point else ""
            yield f"  {budget:>6}  {point['thinking_tokens']:15.1f}  {_rate(point)}{majority}"


def _rate(figures: Mapping[str, Any]) -> str:
    return f"{figures['accuracy']:.1%} [{figures['low']:.1%}, {figures['high']:.1%}]"
