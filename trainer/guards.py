"""Guards against numbers that go wrong: an update that is not finite is not applied, and bad weights are not saved.

The checks themselves are where the numbers are: gradients in rloo/distributed.py and, for TRL's stages, in the callback
below; rewards in rewards/grader.py. All processes see the same norms and records, so they decide alike.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rekatrain.data.errors import TrainingStopped
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run_folder import RunFolder

NONFINITE_FILE = "nonfinite.jsonl"


class NonFiniteGuard:
    """Carries out `on_nonfinite`: stops the run at an update whose gradient is not finite, or counts it as skipped."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self._action, self._max_skips = recipe.on_nonfinite, recipe.max_nonfinite_skips
        self._path = Path(folder.path) / NONFINITE_FILE
        self.num_skipped = 0

    def handle(self, step: int, evidence: Sequence[Mapping[str, Any]], *, is_main_process: bool) -> None:
        """Write the evidence of a bad update; raise TrainingStopped unless it may be skipped.

        evidence: JSON-ready records of the batch; numbers that are not finite are written as text
        """
        self.num_skipped += 1
        if is_main_process:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(spell_nonfinite({"step": step, **record})) + "\n" for record in evidence)
        if self._action == "stop":
            reason, advice = "on_nonfinite is stop", "lower the learning rate, or set on_nonfinite: skip"
        elif self.num_skipped > self._max_skips:
            reason = f"{self.num_skipped} updates are more than max_nonfinite_skips ({self._max_skips})"
            advice = "lower the learning rate, or raise max_nonfinite_skips"
        else:
            return
        raise TrainingStopped(
            f"step {step}: the gradient is not finite, and {reason}. The update was not applied; its batch is in "
            f"{str(self._path)!r}. Read it, {advice}, and go on from the newest checkpoint with --resume"
        )


class UnscorableGuard:
    """Ends a run whose completions have no reward at all for several steps in a row."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._num_steps = 0

    def __call__(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Count a step by the records of all its completions; raise TrainingStopped at the limit."""
        self._num_steps = 0 if any(record["reward"] is not None for record in records) else self._num_steps + 1
        if self._num_steps == self._max_steps:
            raise TrainingStopped(
                f"step {step}: no completion of the last {self._num_steps} steps (rloo.max_unscorable_steps) has a "
                "reward: every one was None or failed. The values and errors of each are in rollouts.jsonl"
            )


def check_finite_weights(model: nn.Module, step: int) -> None:
    """Raise TrainingStopped if a trained weight of this process is not finite: such weights are never saved."""
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all())
    ]
    if bad:
        raise TrainingStopped(
            f"step {step}: {len(bad)} weights are not finite, the first is {bad[0]}. No checkpoint is written; go on "
            "from the newest one with --resume, at a lower learning rate"
        )


def spell_nonfinite(value: Any) -> Any:  # a JSON value, and nan or inf anywhere in it
    """Return a JSON value in which nan and infinity are text, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: spell_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spell_nonfinite(item) for item in value]
    return value


class NonFiniteCallback(TrainerCallback):
    """The guard for transformers' Trainer (stages sft and reward), without and with DeepSpeed."""

    def __init__(self, guard: NonFiniteGuard) -> None:
        self._guard = guard

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Check the gradients before the optimizer reads them; a skipped update leaves none to read."""
        bad = _nonfinite_gradients(event["model"].named_parameters())
        if bad:
            self._handle(state, bad)
            event["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Check DeepSpeed, which drops a bad update itself, and the weights before they are saved."""
        engine = getattr(event["optimizer"], "optimizer", None)
        if getattr(engine, "overflow", False):
            self._handle(state, ["sharded by DeepSpeed"], step=state.global_step)
        if control.should_save:
            check_finite_weights(event["model"], state.global_step)

    def _handle(self, state: TrainerState, names: list[str], step: int | None = None) -> None:
        evidence = [{"num_parameters": len(names), "first_parameters": names[:10], "epoch": state.epoch}]
        step = state.global_step + 1 if step is None else step
        self._guard.handle(step, evidence, is_main_process=state.is_world_process_zero)


def _nonfinite_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    named = [(name, parameter.grad) for name, parameter in parameters if parameter.grad is not None]
    if not named or bool(torch.isfinite(torch.nn.utils.get_total_norm([gradient for _, gradient in named]))):
        return []
    return [name for name, gradient in named if not bool(torch.isfinite(gradient).all())] or ["the norm overflows"]
