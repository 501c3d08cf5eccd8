"""Reward against wall time, from the results of arms.py: a table and a plot."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from common import print_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  # after the choice of a backend that needs no screen

SMOOTHED_STEPS = 5


def compare_rewards(results: dict[str, dict[str, Any]], out: Path) -> dict[str, Any]:
    """Plot each arm's reward (mean of the last steps) against the seconds since its first step began."""
    figure, axes = plt.subplots(figsize=(7, 4))
    rows = []
    for arm, result in results.items():
        steps = result["steps"]
        seconds = list(accumulate(step["seconds"] for step in steps))
        rewards = [step["reward"] for step in steps]
        smoothed = [
            sum(rewards[max(0, end - SMOOTHED_STEPS) : end]) / min(end, SMOOTHED_STEPS)
            for end in range(1, len(rewards) + 1)
        ]
        axes.plot(seconds, smoothed, label=arm)
        rows.append(
            {
                "arm": arm,
                "steps": len(steps),
                "seconds": seconds[-1],
                "first rewards": smoothed[min(SMOOTHED_STEPS, len(smoothed)) - 1],
                "last rewards": smoothed[-1],
            }
        )
    axes.set(xlabel="seconds", ylabel=f"reward, mean of {SMOOTHED_STEPS} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix(".png"), dpi=150)
    print_table(rows)
    print(f"plot: {out.with_suffix('.png')}")
    return {"table": rows, "runs": results}
