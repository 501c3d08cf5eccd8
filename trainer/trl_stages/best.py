"""The best checkpoint and early stopping (../run/best.py) for the stages on TRL's trainers."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.best import KEYS, BestModel
from rekatrain.trainer.run.guards import check_finite_weights


def make_best(recipe: Recipe) -> BestModel:
    """Return the best evaluation of a run that has not begun."""
    section: dict[str, Any] = getattr(recipe, recipe.stage)
    metric, greater_is_better, patience = (section.get(key) for key in KEYS)
    return BestModel(metric=metric, greater_is_better=greater_is_better, patience=patience)


class KeepBest(TrainerCallback):
    """Has the trainer save each new best checkpoint, and stop when the evaluations get no better."""

    def __init__(self, best: BestModel) -> None:
        self._best = best

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        if state.global_step == 0:  # eval_on_start: there is no checkpoint to keep
            return
        if self._best.update(state.global_step, event["metrics"]):
            check_finite_weights(event["model"], state.global_step)
            control.should_save = True
        if self._best.is_exhausted:
            control.should_save = control.should_training_stop = True
