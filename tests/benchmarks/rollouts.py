"""Reward and time of one recipe with its rollouts in-process, by vLLM on policy, and by vLLM one step off policy.

    taskset -c 1 env VLLM_CPU_OMP_THREADS_BIND=1 rekatrain serve-rollouts RECIPE --port 8000
    taskset -c 0 python tests/benchmarks/rollouts.py RECIPE --url http://127.0.0.1:8000 [--rounds 2] [key=value ...]

Each arm is a whole run of the recipe by `rekatrain train` in a separate process; rounds interleave the arms. Seconds
are those of the steps, from sampling to the update, without loading. Trainer and server need separate cores, as above:
on shared cores sampling ahead cannot save time, because both are slower while the other runs. The arm that samples in
process has only the trainer's cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from common import make_parser, write_report
from wall_clock import compare_rewards

PROJECT = Path(__file__).parents[2]


def arms(url: str) -> dict[str, list[str]]:
    """Return the overrides of each arm; all use the importance ratio, which is 1 on policy up to rounding."""
    served = ["rloo.importance_sampling_correction=sequence_truncate", f"rloo.vllm_server_base_url={url}"]
    return {
        "in process": served[:1],
        "vLLM": served,
        "vLLM, one step off policy": [*served, "rloo.max_staleness=1"],
    }


def run_arm(recipe: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Run one arm and return its steps."""
    command = [sys.executable, "-m", "rekatrain", "train", recipe, f"output_dir={folder}", *overrides]
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("reward", "mismatch_logprob", "mismatch_kl", "staleness", "rollout_retries")
    return {
        "steps": [
            {
                "seconds": sum(value for name, value in step.items() if name.startswith("time/")),
                **{name: step.get(name) for name in kept},
            }
            for step in steps
        ]
    }


def main() -> None:
    """Print the table, write the report and the plot."""
    parser = make_parser(__doc__, "rollouts.json")
    parser.add_argument("recipe")
    parser.add_argument("--url", required=True, help="URL of a server that rekatrain serve-rollouts started")
    parser.add_argument("--rounds", type=int, default=1)
    arguments, overrides = parser.parse_known_args()
    results = {}
    for number in range(arguments.rounds):
        for arm, settings in arms(arguments.url).items():
            folder = arguments.out.parent / "rollouts" / f"{arm.replace(' ', '-').replace(',', '')}-{number}"
            seeded = [f"seed={arguments.seed + number}", *overrides, *settings]
            results[f"{arm}, seed {arguments.seed + number}"] = run_arm(arguments.recipe, seeded, folder)
    compared = compare_rewards(results, arguments.out)
    for row in compared["table"]:
        mismatches = [step["mismatch_logprob"] for step in results[row["arm"]]["steps"]]
        row["mismatch_logprob"] = fmean(value for value in mismatches if value is not None)
        print(f"{row['arm']}: mismatch_logprob {row['mismatch_logprob']:.2g}")
    write_report(arguments.out, arguments, compared)


if __name__ == "__main__":
    main()
