"""Plot the reward of a run against its steps, from metrics.jsonl, with the held-out accuracy before and after.

    python recipes/smollm2/plot.py runs/quickstart/rloo recipes/quickstart.png

The points are single steps, the line is their mean over a window of steps. If the folder above the run holds sft.json
and rloo.json, as after the quickstart, the title shows their accuracies and 95 % intervals. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of an rloo run")
    parser.add_argument("out", type=Path, help="picture to write, such as curve.png")
    parser.add_argument("--window", type=int, default=5, help="steps that the line averages (default 5)")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    metrics = [record for record in records if "reward" in record]
    held_out = [record for record in records if record.get("eval/accuracy") is not None]
    steps = [metric["step"] for metric in metrics]
    names = [name for name in metrics[0] if name.startswith("rewards/") and name.endswith("/mean")]
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for color, name in enumerate(["reward", *names]):
        values = [metric[name] for metric in metrics]
        axes.plot(steps, values, ".", color=f"C{color}", alpha=0.4)
        axes.plot(steps, smooth(values, options.window), color=f"C{color}", label=name)
    if held_out:
        values = [record["eval/accuracy"] for record in held_out]
        spans = [
            [record["eval/accuracy"] - record["eval/accuracy_low"] for record in held_out],
            [record["eval/accuracy_high"] - record["eval/accuracy"] for record in held_out],
        ]
        at = [record["step"] for record in held_out]
        axes.errorbar(at, values, spans, fmt="ks", capsize=3, label="held-out accuracy, 95 %")
    axes.set(xlabel="step", ylabel="mean over the completions of a step", title=accuracies(options.run.parent))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(options.out, dpi=120)
    print(f"written: {options.out}")


def smooth(values: list[float | None], window: int) -> list[float]:
    """Return the mean of each value and up to `window - 1` values before it; None counts nowhere.

    >>> smooth([0.0, 1.0, 2.0, 3.0], window=2)
    [0.0, 0.5, 1.5, 2.5]
    """
    parts = [[v for v in values[max(0, end - window) : end] if v is not None] for end in range(1, len(values) + 1)]
    return [fmean(part) if part else float("nan") for part in parts]


def accuracies(folder: Path) -> str:
    """Return the held-out accuracies that `rekatrain evaluate --out` wrote into `folder`; empty if they are missing."""
    files = [folder / f"{name}.json" for name in ("sft", "rloo")]
    if not all(file.exists() for file in files):
        return ""
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return " to ".join(f"{r['accuracy']:.1%} [{r['low']:.1%}, {r['high']:.1%}]" for r in (before, after)) + " held out"


if __name__ == "__main__":
    main()
