"""The guards of ../run/guards.py for TRL's trainers (stages sft and reward), without and with DeepSpeed."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rekatrain.data.chat import IGNORED_LABEL
from rekatrain.trainer.models.loraplus import split_groups
from rekatrain.trainer.models.optimizers import keep_kernels, make_optimizer
from rekatrain.trainer.recipe.optimizers import DEFAULT, MUON, Optim
from rekatrain.trainer.run.guards import NonFiniteGuard, StopGuard, check_finite_weights
from rekatrain.trainer.run.schedule import make_schedule


class GuardedTrainer(Trainer):
    """Base of our subclasses of TRL's trainers: keeps the micro-batches of an update, and has our schedules."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.loraplus_lr_ratio: float | None = None
        self.optim: Optim = DEFAULT
        self.micro_batches: list[tuple[dict[str, Any], Tensor]] = []  # inputs and loss, of one update
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Make one forward and backward pass -> its loss."""
        kept = dict(inputs)  # TRL takes entries out
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.micro_batches.append((kept, loss))
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the recipe's optimizer, with the rates of LoRA+ if the recipe has them."""
        made: torch.optim.Optimizer | None = self.optimizer
        if made is not None:  # DeepSpeed's start calls this twice: the ratio would be squared
            return made
        trained = self.model if model is None else model
        assert trained is not None
        if self.optim == MUON:  # transformers has none
            self.optimizer = self._make_muon(trained)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        keep_kernels(optimizer)
        if self.loraplus_lr_ratio is not None:
            split_groups(optimizer, trained.named_parameters(), self.loraplus_lr_ratio)
        return optimizer

    def _make_muon(self, model: nn.Module) -> torch.optim.Optimizer:
        decayed = set(self.get_decay_parameter_names(model))
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return make_optimizer(
            MUON,
            model,
            [
                {"params": [parameter for name, parameter in named if (name in decayed) == is_decayed], **decay}
                for is_decayed, decay in ((True, {}), (False, {"weight_decay": 0.0}))
            ],
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule, once."""
        if self.lr_scheduler is None:
            steps_optimizer, options = optimizer or self.optimizer, self.args.lr_scheduler_kwargs
            assert steps_optimizer is not None and not isinstance(options, str)
            self.lr_scheduler = make_schedule(  # type: ignore[assignment]  # as upstream's own, of any class
                self.args.lr_scheduler_type,
                steps_optimizer,
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
                max_steps=num_training_steps,
                options=options,
            )
        return super().create_scheduler(num_training_steps, optimizer)


class NonFiniteCallback(TrainerCallback):
    """Carries out `on_nonfinite`."""

    def __init__(self, guard: NonFiniteGuard, trainer: GuardedTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._guard, self._trainer, self._tokenizer = guard, trainer, tokenizer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Check the gradients before the optimizer reads them; a skipped update leaves none to read."""
        bad = _nonfinite_gradients(event["model"].named_parameters())
        if bad:
            self._handle(state, bad, step=state.global_step + 1)
            event["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Check DeepSpeed, which drops a bad update itself, and the weights before they are saved."""
        engine = getattr(event["optimizer"], "optimizer", None)
        if getattr(engine, "overflow", False):
            self._handle(state, ["sharded by DeepSpeed"], step=state.global_step)
        self._trainer.micro_batches.clear()
        if control.should_save:
            check_finite_weights(event["model"], state.global_step)

    def _handle(self, state: TrainerState, names: list[str], step: int) -> None:
        evidence = [{"num_parameters": len(names), "first_parameters": names[:10], "epoch": state.epoch}]
        evidence += gather_object(_describe_batch(self._trainer.micro_batches, self._tokenizer))
        self._guard.handle(step, evidence, is_main_process=state.is_world_process_zero)


class StopCallback(TrainerCallback):
    """Carries out `stop_if`, at each log."""

    def __init__(self, guard: StopGuard) -> None:
        self._guard = guard

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Check the metrics of a step; a save of the same step comes after."""
        if "loss" in event["logs"]:  # the trainer's closing log is a summary, not a step
            self._guard(state.global_step, event["logs"])


def _nonfinite_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    named = [(name, parameter.grad) for name, parameter in parameters if parameter.grad is not None]
    if not named or bool(torch.isfinite(torch.nn.utils.get_total_norm([gradient for _, gradient in named]))):
        return []
    return [name for name, gradient in named if not bool(torch.isfinite(gradient).all())] or ["the norm overflows"]


def _describe_batch(
    micro_batches: Iterable[tuple[dict[str, Any], Tensor]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Make a JSON-ready record of each sequence of this process's part of an update, without padding."""
    records = []
    for number, (inputs, loss) in enumerate(micro_batches):
        masks = inputs.get("attention_mask", [None] * len(inputs["input_ids"]))
        labels = inputs.get("labels", [None] * len(inputs["input_ids"]))
        for ids_T, mask_T, labels_T in zip(inputs["input_ids"], masks, labels, strict=True):
            ids = (ids_T if mask_T is None else ids_T[mask_T.bool()]).tolist()
            records.append(
                {
                    "process": PartialState().process_index,
                    "micro_batch": number,
                    "loss": float(loss),
                    "num_trained": None if labels_T is None else int((labels_T != IGNORED_LABEL).sum()),
                    "input_ids": ids,
                    "text": tokenizer.decode(ids),
                }
            )
    return records
