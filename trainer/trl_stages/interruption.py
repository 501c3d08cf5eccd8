"""Interruptions of the stages on TRL's trainers: the step is finished, saved, and the run ends with status 75."""

import time
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rekatrain.trainer.processes.interruption import INTERRUPTION, describe_end


class InterruptionCallback(TrainerCallback):
    """Stops transformers' Trainer after the step in which a rank is interrupted or the time limit comes near.

    An evaluation that is due after that step is left out: the checkpoint would have to wait for it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._stopped_at: int | None = None
        self._last_step = self._last_event = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Begin the time of the first step, and end the run if it was interrupted while it started."""
        self._last_step = time.monotonic()
        INTERRUPTION.begin_steps(self._trainer.accelerator)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Agree with the other ranks on the end of the run; a run that has taken its last step just ends."""
        now = self._last_event = time.monotonic()
        INTERRUPTION.time.took("step", now - self._last_step)
        self._last_step = now
        if INTERRUPTION.is_agreed(self._trainer.accelerator) and state.global_step < state.max_steps:
            self._stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Do nothing more: transformers ends an epoch when it stops in the middle of one."""
        if self._stopped_at is not None:
            control.should_save = control.should_evaluate = control.should_log = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Begin the time of saving anew."""
        self._last_event = time.monotonic()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Begin the time of saving anew."""
        self._last_event = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Record how long the checkpoint took."""
        INTERRUPTION.time.took("save", time.monotonic() - self._last_event)

    def raise_if_stopped(self) -> None:
        """Raise RunInterrupted if this callback has ended the training."""
        if self._stopped_at is None:
            return
        if self._trainer.args.save_only_model:
            step = self._stopped_at
            raise INTERRUPTION.end(
                f"after step {step}: checkpoint-{step} is saved without its optimizer (save_only_model), so it can be "
                "exported, not resumed"
            )
        raise INTERRUPTION.end(describe_end(self._stopped_at))
