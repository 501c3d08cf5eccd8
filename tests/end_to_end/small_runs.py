"""Recipes of a few steps on a tiny model, and readers of their run folders, for the tests of whole runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

PROJECT = Path(__file__).parents[2]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# Options with state that a checkpoint could lack: several updates, norms of earlier updates, replaced prompts.
OPTIONS = {
    "beta": 0.05,
    "num_iterations": 2,
    "importance_sampling_level": "token",
    "importance_sampling_correction": "token_truncate",
    "loss_type": "token_mean",
    "truncated_completions": "penalize",
    "overlong_buffer": 4,
    "dynamic_sampling_rounds": 1,
    "max_grad_norm": 1e3,
    "grad_norm_quantile": 0.5,
    "grad_norm_window": 3,
    "lr_scheduler_type": "cosine",
}
# A reward that varies between completions of a random model, so that every step changes the weights. The run waits once
# the link `hold` in its folder leads to something: to a checkpoint, after which a test kills the run at its leisure.
REWARD = '''
import time
from pathlib import Path

def letters(completions, **kwargs):
    """Return the fraction of letters in each completion."""
    while Path("hold").exists():
        time.sleep(0.02)
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]
'''


def write_data(folder: Path) -> None:
    """Write rows, held-out rows, pairs for a reward model, and a user's reward."""
    for name, numbers in (("sums", range(1, 7)), ("held_out", range(50, 56)), ("sft", range(1, 13))):
        rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n, "reasoning": f"Twice {n}."} for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"{n} + {n} =", "chosen": f"{2 * n}", "rejected": f"{n}, no"} for n in range(1, 13)]
    (folder / "reward.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "my_rewards.py").write_text(REWARD)


def write_recipe(folder: Path, name: str, model: Path, **sections: object) -> Path:
    """Write a small recipe of any stage to `folder`; its run folder has the same name."""
    tree = {
        "output_dir": str(folder / name),
        "seed": 3,
        "model": {"pretrained_model_name_or_path": str(model), "dtype": "float32"},
        **sections,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def rloo_recipe(
    folder: Path, name: str, model: Path, *, rloo: dict[str, Any] | None = None, **sections: object
) -> Path:
    """Write a recipe of three RLOO steps with a checkpoint after each; `rloo` overrides keys of its section."""
    settings = {"max_steps": 3, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 12}
    settings |= {"beta": 0.1, "learning_rate": 1e-3, "save_steps": 1} | (rloo or {})
    return write_recipe(
        folder,
        name,
        model,
        stage="rloo",
        dataset={"path": str(folder / "sums.jsonl"), "format": "prompt_answer"},
        eval_dataset={"path": str(folder / "held_out.jsonl"), "format": "prompt_answer"},
        rewards={"my_rewards:letters": {"weight": 1.0}, "math_answer": {"weight": 1.0}},
        rloo=settings,
        evaluate={"max_completion_length": 12},
        **sections,
    )


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """Start a separate python process in the working folder."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stderr=subprocess.PIPE)


def weights(run: Path, step: int | str) -> dict[str, torch.Tensor]:
    """Load the weights of a step's checkpoint, or of the folder of that name in the run folder."""
    (file,) = (run / (f"checkpoints/checkpoint-{step}" if isinstance(step, int) else step)).glob("*model.safetensors")
    return load_file(file)


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Read a file of JSON lines in the run folder."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]
