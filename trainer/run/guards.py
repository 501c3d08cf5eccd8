"""Guards against numbers that go wrong: an update that is not finite is not applied, and bad weights are not saved.

The checks themselves are where the numbers are: gradients in rloo/distributed.py and, for TRL's stages, in
trl_stages/guards.py; rewards in rewards/grader.py. All processes see the same norms and records, so they decide alike.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from pydantic import FiniteFloat
from torch import nn

from rekatrain.data.errors import InputError, TrainingStopped
from rekatrain.trainer.models.weights import values_here
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.folder import RunFolder

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
            reason, advice = "on_nonfinite is stop", "set on_nonfinite: skip"
        elif self.num_skipped > self._max_skips:
            reason = f"{self.num_skipped} updates are more than max_nonfinite_skips ({self._max_skips})"
            advice = "raise max_nonfinite_skips"
        else:
            return
        raise TrainingStopped(
            f"step {step}: the gradient is not finite, and {reason}. The update was not applied; its batch is in "
            f"{str(self._path)!r}. Read it, {advice} and go on from the newest checkpoint with --resume, or start "
            "another run from its weights, at a lower learning rate: rekatrain export RUN OUT"
        )


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """Values of a step's metrics at which the run stops, before a checkpoint of that step is written.

    kl_above:        `kl`, nats per completion (stage rloo)
    entropy_below:   `entropy`, nats per token (stages rloo and sft)
    entropy_above:   the other side; the entropy of a policy that falls apart rises to ln(vocabulary)
    grad_norm_above: `grad_norm`, the gradient's norm before it is clipped
    loss_above:      `loss` (stages sft and reward)
    """

    kl_above: Annotated[FiniteFloat, Ge(0)] | None = None
    entropy_below: Annotated[FiniteFloat, Ge(0)] | None = None
    entropy_above: Annotated[FiniteFloat, Gt(0)] | None = None
    grad_norm_above: Annotated[FiniteFloat, Gt(0)] | None = None
    loss_above: Annotated[FiniteFloat, Gt(0)] | None = None


STOP_KEYS = {
    "rloo": {"kl_above", "entropy_below", "entropy_above", "grad_norm_above"},
    "sft": {"loss_above", "entropy_below", "entropy_above", "grad_norm_above"},
    "reward": {"loss_above", "grad_norm_above"},
}


class StopGuard:
    """Carries out `stop_if`: ends the run at a metric beyond its bound."""

    def __init__(self, recipe: Recipe) -> None:
        self._bounds = {key: bound for key, bound in recipe.stop_if.items() if bound is not None}

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raise TrainingStopped if a metric of the step is beyond its bound; a metric that is None has none."""
        for key, bound in self._bounds.items():
            name, _, side = key.rpartition("_")
            value = metrics.get(name)
            if value is not None and (value > bound if side == "above" else value < bound):
                raise TrainingStopped(
                    f"step {step}: {name} is {value:g}, {side} stop_if.{key} ({bound:g}). No checkpoint of this step "
                    "is written; read the run's metrics, change what led here or the bound, and go on from the newest "
                    "checkpoint with --resume"
                )


def check_stop_if(recipe: Recipe) -> None:
    """Raise InputError for a bound on a metric that the recipe's run does not have."""
    for key in recipe.stop_if.keys() - STOP_KEYS[recipe.stage]:
        known = ", ".join(sorted(STOP_KEYS[recipe.stage]))
        raise InputError(f"stop_if.{key}: stage {recipe.stage} has no such metric; it has {known}")
    if "kl_above" in recipe.stop_if and recipe.rloo.get("beta") == 0:
        raise InputError(
            "stop_if.kl_above needs a reference policy, and rloo.beta is 0: remove it, or set beta above 0"
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
        if parameter.requires_grad and not bool(torch.isfinite(values_here(parameter)).all())
    ]
    if bad:
        raise TrainingStopped(
            f"step {step}: {len(bad)} weights are not finite, the first is {bad[0]}. No checkpoint is written; "
            "start another run from the newest one, at a lower learning rate: rekatrain export RUN OUT"
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
