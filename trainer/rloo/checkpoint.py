"""Checkpoints of the RLOO stage: weights as transformers or PEFT load them, optimizer, schedule and every RNG.

Prompts and draws are functions of (seed, step), so the number of finished steps is the whole state of the data. The
folder is written aside and then moved (../run/checkpoints.py): it appears whole or not at all.

A run resumes on any number of processes and at any stage of ZeRO: an optimizer that is saved in another layout is
converted (../resume/resharding.py).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import load_checkpoint_in_model
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.models.loraplus import is_fast
from rekatrain.trainer.models.probe import run_probe
from rekatrain.trainer.processes.launch import read_launch
from rekatrain.trainer.resume.resharding import restore_converted
from rekatrain.trainer.resume.safe_load import tensors_only
from rekatrain.trainer.resume.saved_optimizer import Layout, check_convertible, make_layout, saved_layout
from rekatrain.trainer.resume.states import read_states, write_states
from rekatrain.trainer.rloo.distributed import trained_weights, writable, zero_stage
from rekatrain.trainer.run.best import BestModel
from rekatrain.trainer.run.checkpoints import STATE_FILE, checkpoint_step, write_failures
from rekatrain.trainer.run.folder import RunFolder

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """An object with a state of JSON values and numpy arrays.

    `state_dict` is called on all processes, and must be the same on them.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""


class Checkpointer:
    """Saves and restores the state of an `Accelerator`, with the weights in a form that other programs load.

    states: further objects whose states are part of a checkpoint, by a name for each
    texts:  token ids of texts whose log-probabilities are part of a checkpoint (../models/probe.py)
    best:   the best evaluation so far, which is part of a checkpoint
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        run: RunFolder,
        states: Mapping[str, Stateful],
        texts: Sequence[Sequence[int]],
        best: BestModel,
    ) -> None:
        self._accelerator, self._policy, self._tokenizer, self._run = accelerator, policy, tokenizer, run
        self._states, self._texts, self._best = dict(states), texts, best
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, step: int, save_total_limit: int | None) -> None:
        """Write the checkpoint after `step` steps, then delete the oldest ones beyond the limit.

        Raises OSError if the disk is full or the folder cannot be written.
        """
        with write_failures(self._run.path):
            self._save(step, save_total_limit)

    def _save(self, step: int, save_total_limit: int | None) -> None:
        partial = self._run.partial_checkpoint(step)
        # With an adapter, the weights of the base are not written.
        self._accelerator.save_state(str(partial), **({"exclude_frozen_parameters": True} if self._is_sharded else {}))
        states = {name: stateful.state_dict() for name, stateful in self._states.items()}
        probe = run_probe(self._policy, self._texts)
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            probe.save(partial)
            write_states(partial, states)
            self._tokenizer.save_pretrained(partial)
            self._best.save(partial)
            (partial / STATE_FILE).write_text(json.dumps({"global_step": step}), encoding="utf-8")
            self._run.publish(step, stage="rloo", launch=asdict(read_launch()), save_total_limit=save_total_limit)
        self._accelerator.wait_for_everyone()

    def restore(self, checkpoint: Path) -> None:
        """Load a checkpoint into everything that the accelerator prepared, and into the further objects."""
        states = read_states(checkpoint)
        if saved_layout(checkpoint) != _layout(self._accelerator):
            self._restore_converted(checkpoint)
        elif self._is_sharded:
            with tensors_only():
                self._accelerator.load_state(str(checkpoint), load_module_strict=False)
        else:
            self._accelerator.load_state(str(checkpoint))
        for name, state in states.items():
            if name in self._states:
                self._states[name].load_state_dict(state)

    def _restore_converted(self, checkpoint: Path) -> None:
        (model,), (optimizer,) = self._accelerator._models, self._accelerator._optimizers
        whole = self._accelerator.unwrap_model(model)
        trained = {name: parameter for name, parameter in whole.named_parameters() if parameter.requires_grad}
        names = list(trained)
        if len(optimizer.param_groups) > 1:  # LoRA+ has a group of its fast parameters, the last one
            names.sort(key=lambda name: is_fast(name, trained[name]))
        restore_converted(checkpoint, whole, optimizer, names)
        for _ in range(checkpoint_step(checkpoint)):  # the schedule is a function of the step
            for scheduler in self._accelerator._schedulers:
                scheduler.step()

    @property
    def _is_sharded(self) -> bool:
        return zero_stage(self._accelerator) > 0

    def _save_weights(self, models: list[torch.nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        # Accelerate saves the entries of `weights` in its own layout: taking them out avoids a second copy.
        named = trained_weights(self._accelerator, models[0]) if self._is_sharded else weights.pop()
        state_dict = {name.removeprefix("module.").removeprefix("policy."): tensor for name, tensor in named.items()}
        if self._accelerator.is_main_process:
            self._policy.save_pretrained(folder, state_dict=state_dict)

    def _load_weights(self, models: list[torch.nn.Module], folder: str) -> None:
        if self._is_sharded:
            return  # DeepSpeed has loaded them with their optimizer
        models.clear()
        load_weights(self._accelerator, self._policy, Path(folder))


def check_layout(accelerator: Accelerator, checkpoint: Path, *, restarts_optimizer: bool) -> bool:
    """Return True if this launch loads a checkpoint's optimizer, False if it restarts it.

    Raises InputError for an optimizer that can neither be loaded nor converted and is not restarted, and for a
    checkpoint whose optimizer is loaded and that holds no readable states.
    """
    there, here = saved_layout(checkpoint), _layout(accelerator)
    if there != here:
        if restarts_optimizer:
            logger.warning("the optimizer starts anew: its state was in %s, this run has %s", there, here)
            return False
        check_convertible(checkpoint)
        logger.info("the optimizer is converted from %s to %s", there, here)
    read_states(checkpoint)
    return True


def load_weights(accelerator: Accelerator, policy: Policy, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a policy, sharded or not."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with writable(accelerator, trained) as is_written_here:
        if not is_written_here:
            return
        if isinstance(policy, PeftModel):
            set_peft_model_state_dict(policy, load_peft_weights(str(checkpoint), device="cpu"))
        else:
            # By the name of the file: Accelerate prefers a pytorch_model.bin in the folder, which is not ours.
            whole = checkpoint / SAFE_WEIGHTS_NAME
            load_checkpoint_in_model(policy, str(whole if whole.exists() else checkpoint / SAFE_WEIGHTS_INDEX_NAME))


def _layout(accelerator: Accelerator) -> Layout:
    return make_layout(zero_stage(accelerator), accelerator.num_processes)
