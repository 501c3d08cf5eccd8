"""This project's RLOO step against TRL's RLOOTrainer: seconds, completions/s, peak memory, token slots.

    python tests/benchmarks/rloo_vs_trl.py --model runs/smollm2-135m --prompts gsm8k.jsonl
    python tests/benchmarks/rloo_vs_trl.py --model runs/smollm2-135m --arms rekatrain trl-defaults trl-8 trl-16 trl-all
    python tests/benchmarks/rloo_vs_trl.py --model runs/quickstart/sft-export --wall-clock

Each arm of each round is a separate process, and the arms alternate. All arms have the same model and dtype, all
weights trained by torch's fused AdamW at one learning rate, the same prompts in the same order (as ids), k, caps,
temperature 1, a gradient norm of 1, and a reward that varies in every group, so that no arm can leave a group out. TRL
cannot stop at a string, so a completion ends at the tokenizer's eos in all arms (ours also searches for `<sep>`, and
pays for it). Draws differ between the arms, and so do natural lengths: `--lengths equal` gives all models an eos that
they cannot draw.

The best setting of TRL is the fastest of its arms in the run. Its options on a CPU are completions per pass,
checkpointing, and continuous batching (`trl-8-continuous`). TRL_SETTINGS in arms.py lists the arms.

Token slots (on a CPU) are the tokens that the layers run on, counted by hooks, with padding and recomputation. Needed
slots are each prompt once and each completion without its last token, for sampling and for each pass (training; with
beta > 0 the reference). The first step of a process warms up and is not in the medians. Memory is the process's peak;
on a GPU, the peak of what PyTorch allocated there.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from statistics import fmean, median
from typing import Any

import torch
from arms import OWN_SETTINGS, TRL_SETTINGS
from common import add_model_arguments, machine_rates, make_parser, print_table, write_report
from wall_clock import compare_rewards
from work import Result, Work, run_arm


def summarize(arm: str, results: Sequence[Result]) -> dict[str, Any]:
    """Return medians over the steps of all rounds, without the first step of each process."""
    steps = [step for result in results for step in result["steps"][1:]]
    slots = sum(sum(step["slots"].values()) for step in steps)
    phases = ("sample", "score", "reward", "train")
    return {
        "arm": arm,
        "completions/s": median(step["completions"] / step["seconds"] for step in steps),
        "step s": median(step["seconds"] for step in steps),
        **{f"{phase} s": median(step[f"seconds_{phase}"] for step in steps) for phase in phases},
        "peak MB": median(result["peak_mb"] for result in results),
        "above loaded": median(result["peak_mb"] - result["loaded_mb"] for result in results),
        "slots/needed": None if torch.cuda.is_available() else slots / sum(step["slots_needed"] for step in steps),
        "length": fmean(length for step in steps for length in step["lengths"]),
    }


def compare(arms: Sequence[str], work: Work, rounds: int, *, is_tuned: bool) -> dict[str, Any]:
    """Run all arms alternately on one kind of work, and print a table."""
    results: dict[str, list[Result]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            results[arm].append(run_arm(arm, work, is_tuned=is_tuned))
    rows = {arm: summarize(arm, results[arm]) for arm in arms}
    title = (
        f"cap {work.max_completion_length}, beta {work.beta}, {'equal' if work.equal_lengths else 'natural'} lengths, "
        f"{work.prompts_per_step} prompts x {work.num_generations}, malloc {'tuned' if is_tuned else 'as it is'}"
    )
    print_table(list(rows.values()), title)
    lengths = sorted(n for arm in arms for result in results[arm] for step in result["steps"] for n in step["lengths"])
    at_cap = sum(length == work.max_completion_length for length in lengths) / len(lengths)
    quartiles = [lengths[len(lengths) * quarter // 4] for quarter in (1, 2, 3)]
    print(f"lengths: quartiles {quartiles}, {at_cap:.0%} at the cap")
    ratios = {}
    own_arms, trl_arms = ([arm for arm in arms if arm in settings] for settings in (OWN_SETTINGS, TRL_SETTINGS))
    if own_arms and trl_arms:
        best = max(trl_arms, key=lambda arm: rows[arm]["completions/s"])
        others = [arm for arm in dict.fromkeys([best, "trl-defaults"]) if arm in rows]
        for own, other in product(own_arms, others):
            pair = f"{own} / {other}"
            ratios[pair] = {
                name: rows[own][name] / rows[other][name] for name in ("completions/s", "peak MB", "above loaded")
            }
            print(f"{pair}{' (best)' if other == best else ''}:", end=" ")
            print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios[pair].items()))
    return {
        "title": title,
        "work": vars(work),
        "rows": list(rows.values()),
        "clipped_ratio": at_cap,
        "ratios": ratios,
        "runs": results,
    }


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "rloo_vs_trl.json")
    add_model_arguments(parser)
    arms = [*OWN_SETTINGS, *TRL_SETTINGS]
    parser.add_argument("--arms", nargs="+", choices=arms, default=["rekatrain", "trl-defaults", "trl-8"])
    parser.add_argument("--caps", nargs="+", type=int, default=[64], help="largest number of new tokens")
    parser.add_argument("--betas", nargs="+", type=float, default=[0.0])
    parser.add_argument("--lengths", nargs="+", choices=["natural", "equal"], default=["natural"])
    parser.add_argument("--malloc", nargs="+", choices=["tuned", "plain"], default=["tuned"])
    parser.add_argument("--prompts-per-step", type=int, default=4)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=Work.micro_batch_tokens, help="tokens per micro-batch of rekatrain"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps of each process; the first is left out")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--wall-clock", action="store_true", help="measure reward against time on the task of a recipe instead"
    )
    parser.add_argument("--recipe", default="recipes/smollm2/rloo.yaml", help="recipe with the task of --wall-clock")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-6, help="learning rate of all arms; 1e-5 suits --wall-clock"
    )
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first is left out")
    return arguments


def main() -> None:
    """Print the tables and write the report."""
    arguments = parse_arguments()
    print("this machine: " + ", ".join(f"{rate:.3g} {name}" for name, rate in machine_rates().items()))
    common = {
        "model": arguments.model,
        "steps": arguments.steps,
        "prompts_per_step": arguments.prompts_per_step,
        "num_generations": arguments.num_generations,
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "dtype": arguments.dtype,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
    }
    if arguments.wall_clock:
        work = Work(**common, recipe=arguments.recipe, max_completion_length=arguments.caps[0], beta=arguments.betas[0])
        results: Any = compare_rewards({arm: run_arm(arm, work) for arm in arguments.arms}, arguments.out)
    else:
        results = []
        cases = product(arguments.caps, arguments.betas, arguments.lengths, arguments.malloc)
        for cap, beta, lengths, malloc in cases:
            case = {"max_completion_length": cap, "beta": beta, "equal_lengths": lengths == "equal"}
            work = Work(**common, prompts=arguments.prompts, **case)
            results.append(compare(arguments.arms, work, arguments.rounds, is_tuned=malloc == "tuned"))
            write_report(arguments.out, arguments, results)
    write_report(arguments.out, arguments, results)


if __name__ == "__main__":
    main()
