"""Measure how the cost of an RLOO step grows with prompts, completions per prompt, and completion length.

    python tests/benchmarks/growth.py --model runs/smollm2-135m --prompts gsm8k.jsonl

One of the three grows, and the other two stay at their first value. All completions have the length of the cap, so
that the work of a point is known. Every point is a separate process with its own peak memory. Its first step warms up;
the median of the others counts. The plot shows seconds by phase, peak memory, and a line through the first point that
grows in proportion to the work.
"""

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from common import add_model_arguments, make_parser, print_table, write_report
from work import Work, run_arm

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  # after the choice of a backend that needs no screen

AXES = {
    "prompts_per_step": "prompts",
    "num_generations": "completions per prompt",
    "max_completion_length": "tokens per completion",
}


def measure(work: Work) -> dict[str, Any]:
    """Measure one point."""
    result = run_arm("rekatrain", work)
    steps = result["steps"][1:]
    phases = ("sample", "score", "reward", "train")
    return {
        **{name: getattr(work, name) for name in AXES},
        "tokens run": median(step["slots_needed"] / 2 for step in steps),
        "step s": median(step["seconds"] for step in steps),
        **{f"{phase} s": median(step[f"seconds_{phase}"] for step in steps) for phase in phases},
        "peak MB": result["peak_mb"],
        "slots/needed": sum(sum(step["slots"].values()) for step in steps) / sum(s["slots_needed"] for s in steps),
    }


def plot(points: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot seconds above and memory below, in one column per growing axis."""
    figure, panels = plt.subplots(2, len(points), figsize=(4 * len(points), 6.5), sharex="col", squeeze=False)
    for column, (axis, rows) in enumerate(points.items()):
        above, below = panels[:, column]
        values = [row[axis] for row in rows]
        for phase, marker in (("sample s", "o"), ("train s", "s"), ("step s", "^")):
            above.plot(values, [row[phase] for row in rows], marker=marker, label=phase.removesuffix(" s"))
        first = rows[0]["step s"]
        above.plot(values, [first * value / values[0] for value in values], "k:", lw=1, label="in proportion")
        below.plot(values, [row["peak MB"] for row in rows], marker="o", color="tab:red")
        below.set_ylim(bottom=0)
        above.set_xscale("log", base=2)
        above.set_yscale("log", base=2)
        below.set_xlabel(AXES[axis])
        for panel in (above, below):
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("seconds per step")
    panels[1][0].set_ylabel("peak memory, MB")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, plot, write the report."""
    parser = make_parser(__doc__, "growth.json")
    add_model_arguments(parser)
    parser.add_argument("--prompts-per-step", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--num-generations", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--max-completion-length", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=2, help="steps of each process; the first is left out")
    parser.add_argument("--beta", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first is left out")

    grown = {axis: getattr(arguments, axis) for axis in AXES}
    first = {axis: values[0] for axis, values in grown.items()}
    common = {"steps": arguments.steps, "beta": arguments.beta, "seed": arguments.seed, "equal_lengths": True}
    known: dict[Work, dict[str, Any]] = {}
    points: dict[str, list[dict[str, Any]]] = {axis: [] for axis in AXES}
    for axis, values in grown.items():
        for value in values:
            work = Work(model=arguments.model, prompts=arguments.prompts, **common, **first | {axis: value})
            known[work] = known.get(work) or measure(work)
            points[axis].append(known[work])
        print_table(points[axis], f"growing: {AXES[axis]}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    plot(points, arguments.out.with_suffix(".png"))
    write_report(arguments.out, arguments, points)


if __name__ == "__main__":
    main()
