"""Scores of a few conversations by the reward model in training, which each checkpoint holds for its export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rekatrain.data.errors import InputError
from rekatrain.data.reward_model_input import RewardModelIds
from rekatrain.rewards.models.classifier import classify
from rekatrain.trainer.models.probe import own_arithmetic
from rekatrain.trainer.run.folder import RunFolder

FILE = "score_probe.safetensors"
MICRO_BATCH_TOKENS = 4096
# Largest difference of a score, as a fraction of the largest score or of 1, by the coarser dtype of the weights.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class SaveScores(TrainerCallback):
    """Adds the scores to the checkpoints of transformers' Trainer."""

    def __init__(self, run: RunFolder, sequences: Sequence[RewardModelIds]) -> None:
        self._run, self._sequences = run, sequences

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Write the file into the checkpoint that is being written; under ZeRO-3 every process must call this."""
        model = extract_model_from_parallel(event["model"])
        with own_arithmetic(model):
            scores = _scores(model, self._sequences)
        if state.is_world_process_zero:
            _write(self._run.partial_checkpoint(state.global_step), model, self._sequences, scores)


def save_scores(folder: Path, model: PreTrainedModel, sequences: Sequence[RewardModelIds]) -> None:
    """Write the scores of a model that is not in training, such as a mean of checkpoints, into a folder."""
    _write(folder, model, sequences, _scores(model, sequences))


def read_scores(checkpoint: Path) -> tuple[list[RewardModelIds], Tensor]:
    """Return the conversations of a checkpoint's file and their scores, [N] float32."""
    tensors = load_file(checkpoint / FILE)
    sequences = [
        RewardModelIds(input_ids=tensors[f"ids.{n}"].tolist(), token_type_ids=tensors[f"types.{n}"].tolist())
        for n in range(len(tensors["scores"]))
    ]
    return sequences, tensors["scores"]


def check_scores(model: PreTrainedModel, checkpoint: Path, dtype: torch.dtype) -> float | None:
    """Return the largest difference of the model's scores from those of training; None for a checkpoint without them.

    Raises InputError if it is beyond rounding.

    dtype: the coarser one of the weights in training and here
    """
    if not (checkpoint / FILE).exists():
        return None
    sequences, expected = read_scores(checkpoint)
    error = (_scores(model, sequences) - expected).abs().max().item()
    limit = TOLERANCES[dtype] * max(1.0, expected.abs().max().item())
    if error > limit:
        raise InputError(
            f"{str(checkpoint)!r}, as it is loaded here, is not the reward model that was trained: a score differs by "
            f"{error:.3g}, and {limit:.3g} is allowed. Restore the files of its base model"
        )
    return error


def _scores(model: PreTrainedModel, sequences: Sequence[RewardModelIds]) -> Tensor:
    was_training = model.training
    model.eval()
    scores = classify(model, sequences, micro_batch_tokens=MICRO_BATCH_TOKENS)[:, 0]
    model.train(was_training)
    return scores


def _write(folder: Path, model: PreTrainedModel, sequences: Sequence[RewardModelIds], scores: Tensor) -> None:
    tensors = {"scores": scores.contiguous()}
    for index, sequence in enumerate(sequences):
        tensors[f"ids.{index}"] = torch.tensor(sequence.input_ids)
        tensors[f"types.{index}"] = torch.tensor(sequence.token_type_ids)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    save_file(tensors, folder / FILE, metadata={"dtype": dtype})
