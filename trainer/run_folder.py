"""The folder of one run.

recipe.yaml      the resolved recipe
metrics.jsonl    one line per step
rollouts.jsonl   one line per completion (stage rloo)
checkpoints/checkpoint-N/   weights as transformers or PEFT load them, and the whole state that step N + 1 depends on
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import Recipe, differing_keys, dump_recipe, load_recipe

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
# The last file of a checkpoint to be written, by us and by transformers' Trainer: a folder without it is incomplete.
STATE_FILE = "trainer_state.json"
# Keys that may change when a run is continued: its length, its records, its servers; never the result of a step.
MAY_CHANGE = re.compile(
    r"(sft|reward|rloo)\.(max_steps|save_steps|save_total_limit|logging_steps|restart_optimizer|vllm_\w+|max_unscorable_steps)"
    r"|wandb.*|evaluate.*|on_nonfinite|max_nonfinite_skips"
)


class RunFolder:
    """Paths and appended records of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def check(self, recipe: Recipe, *, resume: bool) -> Path | None:
        """Return the checkpoint to continue from, or None for a fresh start; write nothing.

        Raises InputError if the folder is in use, or holds a run of another recipe.
        """
        stored_file = self.path / RECIPE_FILE
        if not stored_file.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise InputError(f"output_dir {str(self.path)!r} is not a run folder and not empty; choose another")
            return None
        if not resume:
            raise InputError(
                f"output_dir {str(self.path)!r} already holds a run; continue it with --resume or choose another folder"
            )
        changed = [key for key in differing_keys(recipe, load_recipe(stored_file)) if not MAY_CHANGE.fullmatch(key)]
        if changed:
            raise InputError(
                f"--resume: the recipe differs from {str(stored_file)!r} in {', '.join(changed)}; "
                "set it back, or choose another output_dir"
            )
        return newest_checkpoint(self.path)

    def start(self, recipe: Recipe, step: int) -> None:
        """Write the recipe, and delete the records of the steps after `step`, which the run will repeat."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.path / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
        for partial in [*self.checkpoints.glob("*.partial"), *self._incomplete()]:
            shutil.rmtree(partial)
        for name in (METRICS_FILE, ROLLOUTS_FILE):
            _keep_records(self.path / name, step)

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records to one of the run's JSON-lines files."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps."""
        return self.checkpoints / f"checkpoint-{step}"

    def rotate(self, save_total_limit: int | None) -> None:
        """Delete the oldest checkpoints beyond the limit."""
        complete = complete_checkpoints(self.path)
        for path in complete[: -save_total_limit if save_total_limit else 0]:
            shutil.rmtree(path)

    def _incomplete(self) -> list[Path]:
        complete = set(complete_checkpoints(self.path))
        return [path for path in self.checkpoints.glob("checkpoint-*") if path not in complete]


def complete_checkpoints(run: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = (path.parent for path in (Path(run) / "checkpoints").glob(f"checkpoint-*/{STATE_FILE}"))
    numbered = [path for path in folders if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=checkpoint_step)


def newest_checkpoint(run: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None if it has none yet."""
    return next(reversed(complete_checkpoints(run)), None)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of steps taken before the checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file, without a last line that is incomplete."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # Every complete record ends in a newline; text after the last one was being written when the run was killed.
    return [json.loads(line) for line in lines[:-1]]


def _keep_records(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
    partial.replace(path)
