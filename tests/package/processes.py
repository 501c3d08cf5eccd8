"""Recipes of one step in a user's folder, and real processes that run there: for the tests of the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
REWARD = """
def letters(completion):
    return sum(letter.isalpha() for letter in completion.answer) / 100
"""


def write_recipes(folder: Path, model: Path, *, rows: str = "rows.jsonl") -> None:
    """Write `sft.yaml` and `rloo.yaml` of one step, their rows, and the module `my_rewards` with a scorer."""
    path = folder / rows
    path.parent.mkdir(exist_ok=True)
    examples = [{"prompt": f"{n} + {n} =", "answer": 2 * n, "reasoning": f"Twice {n}."} for n in range(1, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in examples))
    (folder / "my_rewards.py").write_text(REWARD)
    common = {
        "model": {"pretrained_model_name_or_path": str(model), "dtype": "float32"},
        "dataset": {"path": rows, "format": "prompt_answer"},
    }
    sft = {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1}
    rloo = {"max_steps": 1, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 8}
    rewards = {"my_rewards:letters": {"weight": 1.0}}
    for name, sections in (("sft", {"sft": sft}), ("rloo", {"rloo": rloo, "rewards": rewards})):
        recipe = {"stage": name, "output_dir": name, **common, **sections}
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))  # JSON is YAML


def environment(package: Path | None = None) -> dict[str, str]:
    """Return the environment of a user's process that imports rekatrain from `package`, by default this checkout."""
    hidden = ["PYTHONPATH", "PYTHONSAFEPATH", "PYTHONWARNINGS", "TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"]
    hidden += ["COLUMNS", "LINES"]  # pytest-xdist sets them, and they hide the size of a terminal
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"PYTHONPATH": str(package or ROOT / ".package"), "OMP_NUM_THREADS": "1"}


def run(
    folder: Path, *command: str | Path, package: Path | None = None, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` and return its result.

    package: the folder that holds the package rekatrain; by default this checkout's, as an editable install has it
    text:    standard input
    """
    options = {"cwd": folder, "env": environment(package), "input": text}
    return subprocess.run(list(map(str, command)), **options, capture_output=True, text=True, timeout=600)


def finish(folder: Path, *command: str | Path, package: Path | None = None, text: str = "") -> str:
    """Run a command that must succeed; return its output and its error output."""
    result = run(folder, *command, package=package, text=text)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr
