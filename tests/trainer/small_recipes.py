"""Small recipes of the stages sft and rloo, and copies of the tiny model, for tests of bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

ROWS = [
    {"messages": [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": str(2 * n)}]}
    for n in range(1, 4)
]
STAGES = {
    "sft": {"sft": {"max_steps": 1, "gradient_checkpointing": False}},
    "rloo": {
        "rloo": {
            "max_steps": 1,
            "prompts_per_step": 1,
            "num_generations": 2,
            "max_completion_length": 4,
            "per_device_generation_batch_size": 2,
        },
        "rewards": {"reasoning_format": None},
    },
}
DATASET = {"path": "rows.jsonl"}
LORA = {"r": 2, "target_modules": "all-linear"}

Rekatrain = Callable[..., str]


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def copy_model(model_folder: Path, to: Path, **config: object) -> dict[str, str]:
    """A `model:` section for a copy of the tiny model whose config.json is changed."""
    shutil.copytree(model_folder, to)
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return {"pretrained_model_name_or_path": str(to), "dtype": "float32"}
