"""The arms of staleness.py on a real vLLM: whole runs by `rekatrain train`, and their table."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2
from common import print_table
from wall_clock import compare_rewards

from rekatrain.data.errors import INTERRUPTED

PROJECT = Path(__file__).parents[2]
POLL_SECONDS = 0.2
WINDOW_SECONDS = 60.0  # over which rewards are averaged


def settings_of(staleness: int) -> dict[str, Any]:
    """Return the settings of an arm; all use the weights per token, which are 1 on policy up to rounding."""
    weights = {"importance_sampling_level": "token", "importance_sampling_correction": "token_truncate"}
    return {"max_staleness": staleness, **weights}


@contextmanager
def watch(url: str) -> Iterator[list[tuple[float, float]]]:
    """Watch the number of completions that vLLM is sampling -> a list of (time, number) that grows."""
    samples: list[tuple[float, float]] = []
    stopped = threading.Event()

    def poll() -> None:
        while not stopped.wait(POLL_SECONDS):
            lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
            running = [line for line in lines if line.startswith("vllm:num_requests_running")]
            samples.append((time.time(), float(running[0].split()[-1])))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    yield samples
    stopped.set()
    thread.join()


def run_real(recipe: str, url: str, folder: Path, overrides: list[str], seconds: float) -> dict[str, Any]:
    """Run one arm by `rekatrain train` -> its steps, the busy share of the server and its running completions.

    Both count from the beginning of the first step to the end of the last one. The run gets SIGTERM `seconds` after
    its start: it finishes its step and saves.
    """
    command = [sys.executable, "-m", "rekatrain", "train", recipe, f"output_dir={folder}", *overrides]
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    with watch(url) as samples:
        run = subprocess.Popen([*command, f"rloo.vllm_server_base_url={url}"], env={**os.environ, "PYTHONPATH": path})
        with suppress(subprocess.TimeoutExpired):
            run.wait(seconds)
        run.send_signal(signal.SIGTERM)
        if run.wait() not in (0, INTERRUPTED):
            raise RuntimeError(f"rekatrain train ended with status {run.returncode}: its output is above")
    metrics = folder / "metrics.jsonl"
    kept = ("reward", "staleness", "staleness/max", "importance/mean_weight", "importance/effective_sample_size")
    steps = [
        {
            "seconds": sum(value for name, value in step.items() if name.startswith("time/")),
            **{name: step.get(name) for name in (*kept, "completions/mean_length", "completions/clipped_ratio")},
        }
        for step in map(json.loads, metrics.read_text().splitlines())
    ]
    end = metrics.stat().st_mtime
    begin = end - sum(step["seconds"] for step in steps)
    running = [number for at, number in samples if begin <= at <= end]
    return {"busy": fmean(number > 0 for number in running), "running": fmean(running), "steps": steps}


def compare_real(options: Any, overrides: list[str]) -> dict[str, Any]:
    """Run the arms in rounds -> the report; print reward against wall time and the server's busy share."""
    results: dict[str, dict[str, Any]] = {}
    arms: dict[int, list[dict[str, Any]]] = {staleness: [] for staleness in options.staleness}
    for number in range(options.rounds):
        for staleness in options.staleness:
            settings = [f"rloo.{name}={value}" for name, value in settings_of(staleness).items()]
            seeded = [f"seed={options.seed + number}", *overrides, *settings]
            folder = options.out.parent / "staleness" / f"{staleness}-{number}"
            result = run_real(options.recipe, options.url, folder, seeded, options.seconds)
            results[f"staleness {staleness}, seed {options.seed + number}"] = result
            arms[staleness].append(result)
            print_table(summarize({staleness: [result]}), f"seed {options.seed + number}")
    compared = compare_rewards(results, options.out)
    arms_table = summarize(arms)
    print_table(arms_table, f"means of {options.rounds} runs each")
    return {"arms": arms_table, **compared}


def summarize(arms: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a line for each value of `max_staleness`: means over its runs.

    running:       mean number of completions that the server samples at the same time
    reward at T s: mean reward of the steps that ended in the WINDOW_SECONDS before T, or of the last one before, T
                   seconds after the first step began: half the time of the shortest run, and its whole time
    """
    times = {
        id(run): list(accumulate(step["seconds"] for step in run["steps"])) for runs in arms.values() for run in runs
    }
    shortest = min(seconds[-1] for seconds in times.values())

    def reward_at(run: dict[str, Any], limit: float) -> float | None:
        ended = [(end, step["reward"]) for step, end in zip(run["steps"], times[id(run)], strict=True) if end <= limit]
        recent = [reward for end, reward in ended if end > limit - WINDOW_SECONDS]
        return fmean(recent or [reward for _, reward in ended[-1:]]) if ended else None

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    return [
        {
            "max_staleness": staleness,
            "server busy": mean([run["busy"] for run in runs]),
            "running": mean([run["running"] for run in runs]),
            "seconds": mean([times[id(run)][-1] for run in runs]),
            "steps": mean([len(run["steps"]) for run in runs]),
            **{
                f"reward at {limit:.0f} s": mean([reward_at(run, limit) for run in runs])
                for limit in (shortest / 2, shortest)
            },
            "first reward": mean([run["steps"][0]["reward"] for run in runs]),
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
