"""Measure how fast completions are scored, and how much time a hanging reward costs a run.

    python tests/benchmarks/rewards.py [--help]

math_answer: completions per second, with time limits, over numbers, boxes, prose and LaTeX, as policies write them,
and over other kinds of golds: roots, letters, lists, intervals, texts. The second column has completions per second of
processor time, of this process and the workers together: other programs on the machine change it little.
hang: seconds per step if the reward hangs on 1 % of the completions, and if it never hangs. Completions end one by one
over --seconds, as in a rollout.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import psutil

PROJECT = Path(__file__).parents[2]
PROCESSOR = " of processor time"
HANGING = """
import time

def hanging(completion):
    if completion.answer == "hang":
        time.sleep(1_000)
    return 1.0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--completions", type=int, default=8_000, help="completions of the math_answer measurement (8000)"
    )
    parser.add_argument("--workers", type=int, default=2, help="number of worker processes (2)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each kind in the hang measurement (2)")
    parser.add_argument("--size", type=int, default=512, help="completions per step (512)")
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds of sampling per step (30)")
    parser.add_argument("--only", choices=["math_answer", "hang"], help="run one of the two measurements")
    parser.add_argument("--json", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    sys.path.insert(0, str(PROJECT))
    figures: dict[str, float] = {}
    if options.only != "hang":
        figures |= measure_math(options.completions, options.workers)
    if options.only != "math_answer":
        figures |= measure_hang(options.steps, options.size, options.seconds, options.workers)
    print(f"{'':45} {'wall':>10} {'processor':>10}")
    for name, value in figures.items():
        if not name.endswith(PROCESSOR):
            processor = figures.get(f"{name}{PROCESSOR}")
            print(f"{name:45} {value:10,.2f} {'' if processor is None else f'{processor:10,.0f}'}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))


def measure_math(num_completions: int, num_workers: int) -> dict[str, float]:
    """Score groups of 8 answers, half of them right, in five styles; no two groups have the same numbers."""
    from rekatrain.rewards.compose import build_reward_functions
    from rekatrain.rewards.grader import Grader
    from rekatrain.rewards.scoring import ScoringConfig

    rng = random.Random(0)
    styles = {
        "number": "{}",
        "boxed": r"\boxed{{{}}}",
        "prose": "So she pays 3 times 12, and the answer is {} dollars.",
        "solution": "First, 3 * 12 = 36.\nThen add the rest.\n\n**Answer:** {}",
        "fraction": r"$\boxed{{\frac{{{}}}{{1}}}}$",
    }
    # Other kinds of golds, each with a right answer in another form.
    kinds = {
        "factorial": ("{}! / 5!", r"\boxed{{\frac{{{}!}}{{120}}}}"),
        "base": ("{}_{{11}}", r"\boxed{{{}_{{11}}}}"),
        "small": (r"{} \times 10^{{-19}}", r"\boxed{{{}e-19}}"),
        "root": (r"{}\sqrt{{2}} + \frac \pi4", r"\boxed{{\frac{{\pi}}{{4}} + \sqrt{{2}} \cdot {}}}"),
        "letters": ("x^2 + {}x + 1", r"\boxed{{1 + {}x + x^2}}"),
        "equation": ("{}", r"\boxed{{x = \frac{{{}}}{{1}}}}"),
        "pair": ("(2, {})", r"\boxed{{\left(2, {}\right)}}"),
        "percent": (r"{}\%", r"\boxed{{{}.0\%}}"),
        "text": (r"\text{{June the {}}}", r"\boxed{{June the {}}}"),
        "interval": ("[{}, \\infty)", r"\boxed{{x \ge {}}}"),
        "list": ("2, 3, {}", r"\boxed{{2}}, \boxed{{3}}, \boxed{{{}}}"),
        "alternatives": ("{0}, -{0}", r"The answer is $\pm {}$."),
    }
    found = {}
    with Grader(build_reward_functions({"math_answer": None}), ScoringConfig(num_workers=num_workers)) as grader:
        _score(grader, ["<reasoning>\nHm.\n</reasoning>\n\n1 <sep>"] * 64, ["1"] * 64)
        cases = [(style, "{}", template) for style, template in [*styles.items(), ("mixed", "")]]
        for style, gold_template, template in [*cases, *((kind, *both) for kind, both in kinds.items())]:
            texts, golds = [], []
            for _ in range(num_completions // 8):
                gold = rng.randrange(10**6)
                for member in range(8):
                    answer = gold if member % 2 else gold + rng.randrange(1, 50)
                    shown = (template or rng.choice(list(styles.values()))).format(answer)
                    texts.append(f"<reasoning>\n{'Let me see. ' * 40}\n</reasoning>\n\n{shown} <sep>")
                    golds.append(gold_template.format(gold, gold, gold))
            started, used = time.perf_counter(), _processor_seconds()
            values = _score(grader, texts, golds)
            name = f"math_answer, {style}, completions/s"
            found[name] = len(texts) / (time.perf_counter() - started)
            found[f"{name}{PROCESSOR}"] = len(texts) / (_processor_seconds() - used)
            assert sum(value or 0.0 for value in values) == len(texts) / 2, style
    return found


def _processor_seconds() -> float:
    """Return the processor time that this process and its children have used."""
    process = psutil.Process()
    times = [other.cpu_times() for other in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measure_hang(num_steps: int, size: int, seconds: float, num_workers: int) -> dict[str, float]:
    """Time steps whose completions end at even intervals: 1 % of them hang, at random positions, or none."""
    from rekatrain.rewards.compose import build_reward_functions
    from rekatrain.rewards.grader import Grader
    from rekatrain.rewards.scoring import ScoringConfig

    rng = random.Random(0)
    spent: dict[str, list[float]] = {"none hangs": [], "1 % hang": []}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hanging_grader.py").write_text(HANGING)
        sys.path.append(folder)
        functions = build_reward_functions({"hanging_grader:hanging": None})
        with Grader(functions, ScoringConfig(num_workers=num_workers)) as grader:
            _score(grader, ["fine <sep>"], ["1"])
            for _ in range(num_steps):
                for name, steps in spent.items():
                    hanging = set(rng.sample(range(size), round(size / 100))) if name == "1 % hang" else set()
                    texts = ["hang <sep>" if index in hanging else "fine <sep>" for index in range(size)]
                    started = time.perf_counter()
                    jobs = {}
                    for index, text in enumerate(texts):
                        time.sleep(max(0.0, started + seconds * index / size - time.perf_counter()))
                        jobs[index] = grader.submit(text, {"answer": "1"})
                    scored = grader.score(
                        prompts=["?"] * size,
                        completions=texts,
                        completion_ids=[[1]] * size,
                        columns={"answer": ["1"] * size},
                        submitted=jobs,
                    )
                    steps.append(time.perf_counter() - started)
                    assert sum(bool(errors) for errors in scored.errors) == len(hanging)
    medians = {f"hang, seconds per step, {name}": median(steps) for name, steps in spent.items()}
    none, some = medians.values()
    return {**medians, "hang, times as long": some / none}


def _score(grader: object, texts: Sequence[str], golds: Sequence[str]) -> Sequence[float | None]:
    from rekatrain.rewards.grader import Grader

    assert isinstance(grader, Grader)
    scores = grader.score(
        prompts=["?"] * len(texts),
        completions=list(texts),
        completion_ids=[[1]] * len(texts),
        columns={"answer": list(golds)},
    )
    return next(iter(scores.by_name.values()))


if __name__ == "__main__":
    main()
