"""The arms of staleness.py on a real vLLM: whole runs by `rekatrain train`, and their table."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2
from common import print_table
from wall_clock import SMOOTHED_STEPS, compare_rewards

PROJECT = Path(__file__).parents[2]
POLL_SECONDS = 0.2


def settings_of(staleness: int) -> dict[str, Any]:
    """Return the settings of an arm; all use the weights per token, which are 1 on policy up to rounding."""
    weights = {"importance_sampling_level": "token", "importance_sampling_correction": "token_truncate"}
    return {"max_staleness": staleness, **weights}


@contextmanager
def watch(url: str) -> Iterator[Callable[[], float]]:
    """Watch whether vLLM has running requests -> a function that returns the fraction of the time."""
    samples: list[bool] = []
    stopped = threading.Event()

    def poll() -> None:
        while not stopped.wait(POLL_SECONDS):
            lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
            running = [line for line in lines if line.startswith("vllm:num_requests_running")]
            samples.append(float(running[0].split()[-1]) > 0)

    def share() -> float:
        used = samples[samples.index(True) :] if True in samples else []
        return sum(used) / max(len(used), 1)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    yield share
    stopped.set()
    thread.join()


def run_real(recipe: str, url: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run one arm by `rekatrain train` -> its steps and the busy share of the server."""
    command = [sys.executable, "-m", "rekatrain", "train", recipe, f"output_dir={folder}", *overrides]
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    with watch(url) as busy:
        subprocess.run(
            [*command, f"rloo.vllm_server_base_url={url}"], check=True, env={**os.environ, "PYTHONPATH": path}
        )
        share = busy()
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("reward", "staleness", "staleness/max", "importance/mean_weight", "importance/effective_sample_size")
    return {
        "busy": share,
        "steps": [
            {
                "seconds": sum(value for name, value in step.items() if name.startswith("time/")),
                **{name: step.get(name) for name in (*kept, "completions/mean_length", "completions/clipped_ratio")},
            }
            for step in steps
        ],
    }


def compare_real(options: Any, overrides: list[str]) -> dict[str, Any]:
    """Run the arms in rounds -> the report; print reward against wall time and the server's busy share."""
    results: dict[str, dict[str, Any]] = {}
    arms: dict[int, list[dict[str, Any]]] = {staleness: [] for staleness in options.staleness}
    for number in range(options.rounds):
        for staleness in options.staleness:
            settings = [f"rloo.{name}={value}" for name, value in settings_of(staleness).items()]
            seeded = [f"seed={options.seed + number}", *overrides, *settings]
            folder = options.out.parent / "staleness" / f"{staleness}-{number}"
            result = run_real(options.recipe, options.url, folder, seeded)
            results[f"staleness {staleness}, seed {options.seed + number}"] = result
            arms[staleness].append(result)
    compared = compare_rewards(results, options.out)
    arms_table = summarize(arms)
    print_table(arms_table, f"means of {options.rounds} runs each")
    return {"arms": arms_table, **compared}


def summarize(arms: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a line for each value of `max_staleness`: means over its runs.

    reward at T s: mean reward of the last SMOOTHED_STEPS steps that have ended T seconds after the first one began, at
                   half the time of the fastest run, and at its whole time
    """
    times = {
        id(run): list(accumulate(step["seconds"] for step in run["steps"])) for runs in arms.values() for run in runs
    }
    shortest = min(seconds[-1] for seconds in times.values())

    def reward_at(run: dict[str, Any], limit: float) -> float | None:
        ended = [step["reward"] for step, end in zip(run["steps"], times[id(run)], strict=True) if end <= limit]
        return fmean(ended[-SMOOTHED_STEPS:]) if ended else None

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    return [
        {
            "max_staleness": staleness,
            "server busy": mean([run["busy"] for run in runs]),
            "seconds": mean([times[id(run)][-1] for run in runs]),
            **{
                f"reward at {limit:.0f} s": mean([reward_at(run, limit) for run in runs])
                for limit in (shortest / 2, shortest)
            },
            "first reward": mean([run["steps"][0]["reward"] for run in runs]),
            "last rewards": mean([reward_at(run, times[id(run)][-1]) for run in runs]),
            **{
                name: mean([step[key] for run in runs for step in run["steps"]])
                for name, key in (
                    ("staleness", "staleness"),
                    ("ESS", "importance/effective_sample_size"),
                    ("tokens", "completions/mean_length"),
                    ("cut off", "completions/clipped_ratio"),
                )
            },
        }
        for staleness, runs in arms.items()
    ]
