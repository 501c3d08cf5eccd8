"""Resuming a stage on TRL's trainers under another launch: the same rows per step, and a converted optimizer."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.loraplus import is_fast
from rekatrain.trainer.resume.resharding import restore_converted
from rekatrain.trainer.resume.saved_optimizer import Layout, check_convertible, make_layout, saved_layout
from rekatrain.trainer.run.checkpoints import checkpoint_step, read_manifest
from rekatrain.trainer.run.folder import RunFolder
from rekatrain.trainer.trl_stages.guards import GuardedTrainer

logger = logging.getLogger(__name__)

BATCH_FILE = "batch.json"
# Lists in the state of a schedule with an entry for each group of parameters.
RATES_BY_GROUP = {"base_lrs", "_last_lr", "lr_lambdas", "min_lrs"}


class SaveBatch(TrainerCallback):
    """Adds the number of rows of a step to a checkpoint: a resumed run must take as many."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the file into the checkpoint that is being written."""
        if state.is_world_process_zero:
            path = self._run.partial_checkpoint(state.global_step) / BATCH_FILE
            path.write_text(json.dumps({"rows_per_step": _rows_per_step(args)}) + "\n", encoding="utf-8")


def check_resumable(checkpoint: Path, stage: str, config: TrainingArguments) -> None:
    """Raise InputError if this launch cannot take the steps that the one of the checkpoint would have taken."""
    if not any("optim" in name for name in read_manifest(checkpoint)["files"]):
        raise InputError(
            f"{str(checkpoint)!r} was saved without its optimizer ({stage}.save_only_model), so it cannot be "
            "resumed; start a new run from its weights: rekatrain export RUN OUT"
        )
    saved = json.loads((checkpoint / BATCH_FILE).read_text(encoding="utf-8"))["rows_per_step"]
    if saved != _rows_per_step(config):
        raise InputError(
            f"the run of {str(checkpoint)!r} takes steps of {saved} rows, and this launch would take "
            f"{_rows_per_step(config)}: {stage}.per_device_train_batch_size {config.train_batch_size} x "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps} x {config.world_size} processes; set "
            f"the first two so that the product is {saved}"
        )
    there, here = saved_layout(checkpoint), _layout(config)
    if there != here:
        check_convertible(checkpoint)
        if not (checkpoint / SCHEDULER_NAME).exists():  # of a launch whose DeepSpeed file had a scheduler, once allowed
            raise InputError(
                f"{str(checkpoint)!r} has a schedule of DeepSpeed's, which cannot be converted; resume under the "
                "earlier launch"
            )
        logger.info("the optimizer is converted from %s to %s", there, here)


def restore_other_launch(trainer: GuardedTrainer, checkpoint: Path) -> None:
    """Have the trainer, when it resumes, restore a checkpoint of another launch.

    transformers has no hook for it: it loads an optimizer into the layout that it was saved in.
    """
    if read_manifest(checkpoint)["launch"]["num_processes"] != trainer.args.world_size:

        def seed_states(_: str | None) -> None:
            """Seed each process: dropout alone draws from its states, the order of rows follows from seed and epoch."""
            set_seed(trainer.args.seed + checkpoint_step(checkpoint), device_specific=True)

        trainer._load_rng_state = seed_states  # type: ignore[method-assign, assignment]  # the argument has another name
    if saved_layout(checkpoint) == _layout(trainer.args):
        return
    prepare = trainer._prepare_for_training

    def prepare_and_restore(max_steps: int, train_dataloader: DataLoader[Any], _: str) -> tuple[nn.Module, Any]:
        prepared: tuple[nn.Module, Any] = prepare(max_steps, train_dataloader, None)
        model, optimizer, scheduler = trainer.model, trainer.optimizer, trainer.lr_scheduler
        assert model is not None and optimizer is not None and scheduler is not None
        decayed = set(trainer.get_decay_parameter_names(model))
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        # As GuardedTrainer.create_optimizer groups them.
        splits = trainer.loraplus_lr_ratio is not None
        names = sorted(trained, key=lambda name: (splits and is_fast(name, trained[name]), name not in decayed))
        restore_converted(checkpoint, model, optimizer, names)
        state = torch.load(checkpoint / SCHEDULER_NAME, weights_only=True)
        # DeepSpeed drops an empty group: an adapter has no weights without decay. Rates are then equal in all groups;
        # with LoRA+ no group is empty.
        for key in RATES_BY_GROUP & state.keys():
            if len(state[key]) != len(optimizer.param_groups):
                state[key] = state[key][:1] * len(optimizer.param_groups)
        scheduler.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        return prepared

    trainer._prepare_for_training = prepare_and_restore  # type: ignore[method-assign]
    trainer._load_from_checkpoint = lambda *_: None  # type: ignore[method-assign]  # weights come with the optimizer


def _rows_per_step(config: TrainingArguments) -> int:
    return config.train_batch_size * config.gradient_accumulation_steps * config.world_size


def _layout(config: TrainingArguments) -> Layout:
    plugin = config.deepspeed_plugin
    return make_layout(int(plugin.zero_stage) if plugin else 0, config.world_size)
