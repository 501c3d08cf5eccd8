"""The mean of the last checkpoints of a run: `rekatrain export RUN OUT --average N`.

    python -m rekatrain.trainer.export.average OUT CHECKPOINT...

computes the log-probabilities, or the scores of a reward model, that the export is held against: a separate process
loads each checkpoint as training does, holds it against its own probe, and adds the weights up. It needs two whole
models in float32.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import load_classifier_tokenizer
from rekatrain.trainer.models.load import load_model
from rekatrain.trainer.models.probe import find_difference, read_probe, run_probe
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.reward_model.model import load_reward_model
from rekatrain.trainer.reward_model.score_probe import FILE as SCORES_FILE
from rekatrain.trainer.reward_model.score_probe import check_scores, read_scores, save_scores
from rekatrain.trainer.run.checkpoints import MANIFEST_FILE, checkpoint_step, find_fault, numbered_checkpoints
from rekatrain.trainer.run.folder import RECIPE_FILE, WEIGHTS_FILES


def check_checkpoint(checkpoint: Path) -> None:
    """Raise InputError for a folder that is no checkpoint of a run, and for weights that are not those of its manifest.

    A checkpoint of a version before 0.2.0 has no manifest.
    """
    if not re.fullmatch("checkpoint-[0-9]+", checkpoint.name):
        raise InputError(f"{str(checkpoint)!r} is not named checkpoint-N, as the checkpoints of a run are: rename it")
    fault = find_fault(checkpoint, is_needed=lambda name: name.endswith(WEIGHTS_FILES))
    if fault is not None and (checkpoint / MANIFEST_FILE).exists():
        raise InputError(f"{str(checkpoint)!r} cannot be exported: {fault}; choose another one: --checkpoint N")


def last_checkpoints(newest: Path, number: int) -> list[Path]:
    """Return `number` checkpoints of a run, oldest first, that end with `newest`; InputError if there are fewer."""
    found = [path for path in numbered_checkpoints(newest.parent) if checkpoint_step(path) <= checkpoint_step(newest)]
    if len(found) < number:
        raise InputError(
            f"--average {number}: there are {len(found)} checkpoints up to {newest.name}: "
            f"{', '.join(path.name for path in found)}; average fewer, or train with a larger save_total_limit"
        )
    for path in found[-number:-1]:
        check_checkpoint(path)
    return found[-number:]


def main() -> None:
    """Write the probe of the mean into OUT; raise AssertionError if a checkpoint is not what it was in training."""
    out, *checkpoints = map(Path, sys.argv[1:])
    if (checkpoints[-1] / SCORES_FILE).exists():
        _score_mean(out, checkpoints)
    else:
        _probe_mean(out, checkpoints)
    print(f"probe of the mean of {', '.join(path.name for path in checkpoints)}, by the loader of training")


def _probe_mean(out: Path, checkpoints: list[Path]) -> None:
    mean, texts = Mean(), None
    for checkpoint in reversed(checkpoints):
        model = load_model(str(checkpoint), dtype="float32").eval()
        probe = read_probe(checkpoint)
        assert probe is not None, f"{checkpoint} has no log-probabilities of training"
        difference = find_difference(probe, run_probe(model, [ids.tolist() for ids in probe.ids]))
        assert difference is None, (
            f"{checkpoint}, as it is loaded here, is not the model that was trained: {difference}"
        )
        texts = texts or [ids.tolist() for ids in probe.ids]
        mean.add(model)
    assert texts is not None
    run_probe(mean.model, texts).save(out)


def _score_mean(out: Path, checkpoints: list[Path]) -> None:
    tokenizer = load_classifier_tokenizer(str(checkpoints[-1]))
    section = load_recipe(checkpoints[-1].parent.parent / RECIPE_FILE).model
    trained = getattr(torch, section.get("dtype", "bfloat16"))
    mean = Mean()
    for checkpoint in reversed(checkpoints):
        assert (checkpoint / SCORES_FILE).exists(), f"{checkpoint} has no scores of training"
        model: Any = load_reward_model(tokenizer, str(checkpoint), dtype="float32").eval()  # a PeftModel scores, too
        if section.get("quantization_config") is None:  # QLoRA trains on another base than is exported
            check_scores(model, checkpoint, trained)
        mean.add(model)
    sequences, _ = read_scores(checkpoints[-1])
    save_scores(out, mean.model, sequences)


class Mean:
    """The mean of models, which is updated in place; an adapter is merged first."""

    model: PreTrainedModel

    def __init__(self) -> None:
        self._number = 0

    @torch.no_grad()
    def add(self, model: PreTrainedModel | PeftModel) -> None:
        """Add a model in float32, which the mean keeps if it is the first one."""
        merged: PreTrainedModel = model.merge_and_unload() if isinstance(model, PeftModel) else model
        self._number += 1
        if self._number == 1:
            self.model = merged
            return
        for ours, theirs in zip(self.model.parameters(), merged.parameters(), strict=True):
            ours.add_((theirs - ours) / self._number)


if __name__ == "__main__":
    main()
