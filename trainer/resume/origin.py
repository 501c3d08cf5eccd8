"""The origin of a checkpoint: the recipe and the fingerprints of the run that wrote it, for the run that continues it.

A changed recipe is judged by changes.py. Rows are what the run says it was trained on, so they must be the same; base
weights too, where an adapter or a reference still belongs to them, and files of rewards. Code of rewards and versions
are a warning: fixing a reward is a usual reason to stop, and nobody can tell whether its scores have changed.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import Recipe, build_recipe
from rekatrain.trainer.resume.changes import EXPORT, Change, check_changes, find_changes, report_changes
from rekatrain.trainer.resume.fingerprints import Fingerprints
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.run.checkpoints import checkpoint_step
from rekatrain.trainer.run.folder import ORIGIN_FILE

logger = logging.getLogger(__name__)


def check_origin(recipe: Recipe, now: Fingerprints, checkpoint: Path | None) -> dict[str, Any]:
    """Return the origin of the checkpoints of this run, after comparing it with that of the one it continues.

    Raises InputError if what is learned would change; logs other changes.

    now: what this run reads
    """
    if checkpoint is not None:
        if not (checkpoint / ORIGIN_FILE).exists():
            raise InputError(
                f"{str(checkpoint)!r} has no {ORIGIN_FILE}: a version before 0.2.0 saved it; resume it with that "
                f"version, or start another run from its weights: {EXPORT}"
            )
        origin = json.loads((checkpoint / ORIGIN_FILE).read_text(encoding="utf-8"))
        changes = find_changes(build_recipe(origin["recipe"]), recipe)
        check_changes(changes)
        _check_length(recipe, checkpoint)
        _check_fingerprints(Fingerprints(**origin["fingerprints"]), now, recipe, changes)
        report_changes(changes)
    return {"recipe": asdict(recipe), "fingerprints": asdict(now)}


def _check_length(recipe: Recipe, checkpoint: Path) -> None:
    max_steps, taken = getattr(recipe, recipe.stage).get("max_steps", -1), checkpoint_step(checkpoint)
    if 0 < max_steps < taken:
        raise InputError(
            f"--resume: {recipe.stage}.max_steps is {max_steps}, but the run has taken {taken} steps: raise it, or "
            f"export an earlier checkpoint of {str(checkpoint.parent)!r}"
        )


def _check_fingerprints(before: Fingerprints, now: Fingerprints, recipe: Recipe, changes: Sequence[Change]) -> None:
    name = recipe.model["pretrained_model_name_or_path"]
    if before.rows != now.rows:
        counts = f"{before.num_rows:,} then, {now.num_rows:,} now"
        detail = counts if before.num_rows != now.num_rows else f"{now.num_rows:,}, with other tokens or columns"
        raise _other(f"the rows are not those of the checkpoint ({detail})", changes, "dataset chat model")
    if before.architecture != now.architecture:
        raise _other(f"config.json of {name!r} is not that of the checkpoint's base model", changes, "model")
    if before.base_weights != now.base_weights:
        has_reference = recipe.stage == "rloo" and recipe.rloo.get("beta", RLOOConfig.beta) > 0
        if recipe.lora is not None or has_reference:
            part = "adapter" if recipe.lora is not None else "KL"
            raise _other(f"{name!r} has other weights than those of the checkpoint's {part}", changes, "model")
        logger.warning("changed since the checkpoint: the weights of %s; the run continues with its own", name)
    files = _differing(before.files, now.files)
    if files:
        raise _other(f"other content in rewards.{', rewards.'.join(files)}", changes, "rewards")
    code = _differing(before.rewards, now.rewards)
    if code:
        logger.warning("changed since the checkpoint: the code of the rewards %s; scores may differ", ", ".join(code))
    environment = _differing(before.environment, now.environment)
    if environment:
        listed = (f"{key} was {before.environment.get(key)} and is {now.environment.get(key)}" for key in environment)
        logger.warning("changed since the checkpoint: %s (last bits of the arithmetic may differ)", "; ".join(listed))


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]


def _other(fault: str, changes: Sequence[Change], sections: str) -> InputError:
    """Make the error for changed content, with the changed keys of the sections that name it."""
    keys = [str(change) for change in changes if change.key.partition(".")[0] in sections.split()]
    because = f"; {'; '.join(keys)}" if keys else ""
    return InputError(
        f"--resume: {fault}{because}. Set it back, or start another run, from the weights of this one: {EXPORT}"
    )
