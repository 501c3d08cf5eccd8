"""Compare learning from equal numbers of samples: RLOO k=4, RLOO k=2, REINFORCE with a moving baseline, RAFT.

    python tests/benchmarks/learning.py

A Llama of two layers is trained from scratch, by supervision, to write digits in reverse, until about one answer in
five is right. From there every method gets the same number of completions per step, on prompts that almost never occur
twice. The reward is 1 for the exact answer, ended by eos, else 0:

    RLOO k               the step of this project, with completions / k prompts
    REINFORCE            one completion per prompt, weighted by its reward minus the moving average of earlier steps
    RAFT                 the best of 4 (the first of equals), maximum likelihood (arXiv 2304.06767)

All use the same sampler, log-probabilities, sequence sums, AdamW and clipping of the gradient norm to 1. The learning
rate of each method is chosen from one grid, with a separate seed, by the mean reward of the last quarter of the steps.
Then each method runs with five seeds; intervals are 95 % (Student's t over seeds).
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from common import make_parser, print_table, write_report
from learning_task import (
    MAX_COMPLETION_LENGTH,
    accuracy,
    is_reversed,
    make_prompts,
    make_sampler,
    make_start,
    make_tokenizer,
    score,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from rekatrain.rewards.compose import RewardFunction
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions
from rekatrain.trainer.rloo.loss import sequence_sums
from rekatrain.trainer.rloo.metrics import Clock
from rekatrain.trainer.rloo.rollouts import step_prompts
from rekatrain.trainer.rloo.setup import RunSetup
from rekatrain.trainer.rloo.step import Run, take_step

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  # after the choice of a backend that needs no screen

METHODS = {"RLOO k=4": 4, "RLOO k=2": 2, "REINFORCE": 1, "RAFT": 4}
NUM_PROMPTS = 1 << 14
BASELINE_DECAY = 0.9
TUNING_SEED = 1000
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, for 1 to 9 degrees of freedom


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that all runs have in common."""

    start: str
    steps: int
    completions: int


def reinforce_weights(rewards_P1: Tensor, state: dict[str, float]) -> Tensor:
    """Return the reward minus the moving average over earlier steps."""
    baseline = state.get("baseline", rewards_P1.mean().item())
    state["baseline"] = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * rewards_P1.mean().item()
    return rewards_P1 - baseline


def raft_weights(rewards_PG: Tensor, state: dict[str, float]) -> Tensor:
    """Return 1 for the first of the best completions, else 0."""
    return torch.nn.functional.one_hot(rewards_PG.argmax(dim=1), rewards_PG.shape[1]).float()


WEIGHTS: dict[str, Callable[[Tensor, dict[str, float]], Tensor]] = {
    "REINFORCE": reinforce_weights,
    "RAFT": raft_weights,
}


def run(setting: Setting, job: tuple[str, float, int]) -> dict[str, Any]:
    """Run a method with a learning rate and a seed -> the mean reward of every step, and held-out accuracy after."""
    method, learning_rate, seed = job
    k, tokenizer = METHODS[method], make_tokenizer()
    policy = LlamaForCausalLM.from_pretrained(setting.start, dtype=torch.float32)
    model = CompletionLogprobs(policy, temperature=1.0, num_tokens=len(tokenizer)).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    sampler = make_sampler(policy, tokenizer)
    prompts = make_prompts(tokenizer, NUM_PROMPTS, seed=0)
    per_step = setting.completions // k
    state: dict[str, float] = {}

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def own_step(step: int) -> float:
        records = take_step(Run.in_process(accelerator, model, task, sampler, update), step, Clock())
        return fmean(record["reward"] for record in records)

    def other_step(step: int) -> float:
        indices = step_prompts(len(prompts), seed=seed, step=step, prompts_per_step=per_step)
        chosen = [prompts[index] for index in indices]
        keys = [(1, seed, step, prompt_index) for prompt_index in range(per_step)]
        groups = sampler.sample([prompt.ids for prompt in chosen], keys, k)
        rewards_PG = score(chosen, groups, tokenizer)
        weights_N = WEIGHTS[method](rewards_PG, state).flatten()
        packed = pack_completions(
            [p.ids for p in chosen], [[c.ids for c in group] for group in groups], torch.device("cpu")
        )
        (-(sequence_sums(model(packed), packed.lengths) * weights_N).sum() / len(weights_N)).backward()
        update()
        return rewards_PG.mean().item()

    if method in WEIGHTS:
        rewards = [other_step(step) for step in range(setting.steps)]
    else:
        accelerator = Accelerator(cpu=True)
        config = RLOOConfig(
            max_steps=setting.steps,
            prompts_per_step=per_step,
            num_generations=k,
            max_completion_length=MAX_COMPLETION_LENGTH,
            beta=0.0,
        )
        reward = RewardFunction(name="is_reversed", weight=1.0, function=is_reversed, columns=("answer",))
        task = RunSetup(config=config, tokenizer=tokenizer, prompts=prompts, rewards=[reward])
        rewards = [own_step(step) for step in range(setting.steps)]
    held_out = accuracy(policy, tokenizer)
    greedy = accuracy(policy, tokenizer, temperature=0.0)
    return {"rewards": rewards, "held_out": held_out, "greedy": greedy}


def interval(values: Sequence[float]) -> float:
    """Return half of the width of the 95 % interval of the mean."""
    if len(values) < 2:
        return math.nan
    return STUDENT_T[len(values) - 2] * stdev(values) / math.sqrt(len(values))


def plot(curves: dict[str, list[list[float]]], setting: Setting, path: Path) -> None:
    """Plot the mean reward over seeds, averaged over ten steps, with intervals."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method, runs in curves.items():
        window = min(10, setting.steps)
        smooth = np.array([np.convolve(rewards, np.ones(window) / window, mode="valid") for rewards in runs])
        samples = (np.arange(smooth.shape[1]) + window) * setting.completions
        half = np.array([interval(list(column)) for column in smooth.T])
        axes.plot(samples, smooth.mean(axis=0), label=method)
        axes.fill_between(samples, smooth.mean(axis=0) - half, smooth.mean(axis=0) + half, alpha=0.2)
    axes.set(xlabel="completions sampled", ylabel="mean reward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "learning.json")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--completions", type=int, default=64, help="completions per step")
    parser.add_argument("--goal", type=float, default=0.2, help="accuracy that ends the supervision")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11))
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, default=[3e-5, 1e-4, 3e-4], help="grid of learning rates"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="number of concurrent runs, with one thread each"
    )
    return parser.parse_args()


def main() -> None:
    """Choose rates, run all methods, print and plot the results, write the report."""
    arguments = parse_arguments()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # One thread per worker, set before the workers import torch.
    os.environ["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as folder:
        model, course = make_start(make_tokenizer(), arguments.goal, arguments.seed)
        model.save_pretrained(folder)
        print(f"start: {course[-1][0]} supervised steps, sampled accuracy {course[-1][1]:.3f}", flush=True)
        setting = Setting(start=folder, steps=arguments.steps, completions=arguments.completions)
        with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
            tuning = [(method, rate, TUNING_SEED) for method in METHODS for rate in arguments.learning_rates]
            reached = [
                fmean(result["rewards"][-max(1, arguments.steps // 4) :])
                for result in pool.map(partial(run, setting), tuning)
            ]
            by_method = {
                method: {rate: mean for (name, rate, _), mean in zip(tuning, reached, strict=True) if name == method}
                for method in METHODS
            }
            rates = {method: max(means, key=lambda rate: means[rate]) for method, means in by_method.items()}
            print_table([{"method": m, **{f"{r:g}": v for r, v in means.items()}} for m, means in by_method.items()])
            jobs = [(method, rates[method], seed) for seed in range(arguments.seeds) for method in METHODS]
            results = list(pool.map(partial(run, setting), jobs))
    runs = {method: [r for (m, _, _), r in zip(jobs, results, strict=True) if m == method] for method in METHODS}
    rows = []
    for method, of_method in runs.items():
        row: dict[str, Any] = {"method": method, "learning rate": rates[method]}
        measures = {
            "mean reward": [fmean(result["rewards"]) for result in of_method],
            "last quarter": [fmean(result["rewards"][-max(1, arguments.steps // 4) :]) for result in of_method],
            "held out": [result["held_out"] for result in of_method],
            "held out, greedy": [result["greedy"] for result in of_method],
        }
        rows.append(row | {name: f"{fmean(v):.3f} ± {interval(v):.3f}" for name, v in measures.items()})
    print_table(rows, f"{arguments.steps} steps of {arguments.completions} completions, {arguments.seeds} seeds")
    plot(
        {method: [r["rewards"] for r in of] for method, of in runs.items()}, setting, arguments.out.with_suffix(".png")
    )
    write_report(arguments.out, arguments, {"start": course, "tuning": by_method, "table": rows, "runs": runs})


if __name__ == "__main__":
    main()
