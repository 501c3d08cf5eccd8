"""Runs of the chaos scripts: small recipes in separate folders, and the exact comparison of two run folders.

A run takes four steps with a checkpoint after each, and keeps the last two: it writes and deletes all the time.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekatrain.trainer.run.folder import LOCK_FILE, METRICS_FILE, ROLLOUTS_FILE
from tests.conftest import tiny_llama, tiny_tokenizer

STEPS = 4
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# A batch function, and a scorer, which runs in worker processes.
REWARDS = '''
def letters(completions, **kwargs):
    """Return the fraction of letters in each completion."""
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def short(completion):
    """Return 1 for an answer without text."""
    return 1 / (1 + len(completion.answer))
'''
# Options whose state must be in a checkpoint: several updates, norms of earlier updates, replaced prompts.
RLOO = {
    "prompts_per_step": 2,
    "num_generations": 2,
    "max_completion_length": 8,
    "beta": 0.05,
    "num_iterations": 2,
    "importance_sampling_level": "token",
    "dynamic_sampling_rounds": 1,
    "max_grad_norm": 1e3,
    "grad_norm_quantile": 0.5,
    "grad_norm_window": 3,
}
SFT = {"per_device_train_batch_size": 2, "logging_steps": 1, "gradient_checkpointing": False}
# Files of the user, which no run may touch.
OWN_FILES = ("run/checkpoints/checkpoint-best/notes", "run/checkpoints/checkpoint-4-keep/notes", "run.partial/notes")
TIMINGS = ("time", "tokens_per_second", "memory/host")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A kind of run.

    stage:     sft or rloo
    form:      full or lora
    processes: 1, or 2 under ZeRO-3
    """

    stage: str
    form: str
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.stage} {self.form}" + (f" ZeRO-3 x {self.processes}" if self.processes > 1 else "")


def all_settings(processes: int) -> list[Setting]:
    """Return the settings of both stages and forms."""
    return [
        Setting(stage=stage, form=form, processes=processes) for stage in ("sft", "rloo") for form in ("full", "lora")
    ]


def write_model(folder: Path) -> Path:
    """Write the tiny model of the tests with its tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_workspace(folder: Path, model: Path, setting: Setting, **changes: Any) -> Path:
    """Write a folder with rows, rewards and `recipe.yaml`, whose run folder is `run` in it.

    changes: other values of keys of the stage's section
    """
    folder.mkdir(parents=True)
    rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n, "reasoning": f"Twice {n}."} for n in range(1, 9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS)
    section = {"max_steps": STEPS, "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-3}
    tree: dict[str, Any] = {
        "stage": setting.stage,
        "output_dir": "run",
        "seed": 3,
        "model": {"pretrained_model_name_or_path": str(model), "dtype": "float32"},
        "dataset": {"path": "rows.jsonl", "format": "prompt_answer"},
        setting.stage: {**section, **(SFT if setting.stage == "sft" else RLOO), **changes},
    }
    if setting.stage == "sft":
        tree["sft"]["per_device_train_batch_size"] //= setting.processes
    else:
        tree["rewards"] = {"my_rewards:letters": {"weight": 1.0}, "my_rewards:short": {"weight": 0.5}}
        tree["scoring"] = {"num_workers": 1, "timeout": 60}  # a busy machine is no failure of the reward
    if setting.form == "lora":
        tree["lora"] = LORA
    (folder / "recipe.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return folder


def write_own_files(folder: Path) -> None:
    """Write files of the user into and beside the run folder of a workspace."""
    for name in OWN_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("the user's")


def take_own_files(folder: Path) -> list[str]:
    """Remove the user's files again; return those that were gone or changed."""
    lost = [n for n in OWN_FILES if not (folder / n).is_file() or (folder / n).read_text() != "the user's"]
    for name in OWN_FILES:
        shutil.rmtree((folder / name).parent, ignore_errors=True)
    return lost


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file without their timings."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if not _is_timing(key)} for record in records]


def _is_timing(key: str) -> bool:
    return key.startswith(TIMINGS) or key.endswith("/seconds")


def differences(one: Path, other: Path) -> Iterator[str]:
    """Yield each difference between two run folders; timings do not count.

    Files of the checkpoints are compared byte by byte; manifests hold the hashes of the rest and are left out.
    """
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (one, other)]
    yield from (f"{name} is missing" for name in sorted({*names[0]} - {*names[1]}))
    yield from (f"{name} is left over" for name in sorted({*names[1]} - {*names[0]}))
    for name in sorted({*names[0]} & {*names[1]}):
        paths = [run / name for run in (one, other)]
        if paths[0].is_dir() or paths[0].name in (LOCK_FILE, "manifest.json"):
            continue
        if paths[0].suffix == ".jsonl":
            mine, theirs = map(read_records, paths)
            if mine != theirs:
                yield f"{name} differs: {_first_difference(mine, theirs)}"
        elif paths[0].read_bytes() != paths[1].read_bytes() and not _equal_states(*paths):
            yield f"{name} differs"


def _equal_states(one: Path, other: Path) -> bool:
    """Return True if two JSON files differ in timings, or in the order of a set of PEFT's, alone."""
    if one.suffix != ".json":
        return False
    states = [json.loads(path.read_text(encoding="utf-8")) for path in (one, other)]
    for state in states:
        for entry in state.get("log_history", []):
            for key in [key for key in entry if _is_timing(key)]:
                del entry[key]
        if isinstance(state.get("target_modules"), list):
            state["target_modules"].sort()
    return states[0] == states[1]


def _first_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} records"
    for mine, theirs in zip(one, other, strict=True):
        for key in {**mine, **theirs}:
            if mine.get(key) != theirs.get(key):
                return f"step {mine.get('step')}, {key}: {mine.get(key)} and {theirs.get(key)}"
    return "the order of keys"


def records_of(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the metrics and the rollouts of a run, without timings."""
    return read_records(run / METRICS_FILE), read_records(run / ROLLOUTS_FILE)


def scratch_folder() -> Path:
    """Return a new folder for workspaces, on a disk."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix="rekatrain-chaos-", dir=os.environ.get("TMPDIR")))
