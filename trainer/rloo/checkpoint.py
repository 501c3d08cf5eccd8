"""A checkpoint of the RLOO stage: weights as transformers or PEFT load them, optimizer, schedule, every RNG.

Prompts and draws are functions of (seed, step), so the number of steps done is all there is to say of the data. The
folder is written beside its place and renamed: it appears whole or not at all.
"""

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import load_checkpoint_in_model
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.models import Policy
from trainer.run_folder import STATE_FILE, RunFolder, checkpoint_step


class Checkpointer:
    """Saves and restores what an `Accelerator` prepared, with the weights in a form that other programs load."""

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        run: RunFolder,
    ) -> None:
        self._accelerator, self._policy, self._tokenizer, self._run = accelerator, policy, tokenizer, run
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, step: int, save_total_limit: int | None) -> None:
        """Write the checkpoint after `step` steps, then delete the oldest ones beyond the limit."""
        final = self._run.checkpoint(step)
        partial = final.with_suffix(".partial")
        self._accelerator.save_state(str(partial))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            self._tokenizer.save_pretrained(partial)
            (partial / STATE_FILE).write_text(json.dumps({"global_step": step}), encoding="utf-8")
            if final.exists():  # a run continued at its last step saves that step again
                shutil.rmtree(final)
            partial.rename(final)
            self._run.rotate(save_total_limit)
        self._accelerator.wait_for_everyone()

    def restore(self, checkpoint: Path) -> int:
        """Load a checkpoint into what was prepared -> the number of steps done."""
        self._accelerator.load_state(str(checkpoint))
        return checkpoint_step(checkpoint)

    def _save_weights(self, models: list[torch.nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        # What is taken from `weights` Accelerate does not save a second time in its own layout.
        state_dict = {name.removeprefix("policy."): tensor for name, tensor in weights.pop().items()}
        if self._accelerator.is_main_process:
            self._policy.save_pretrained(folder, state_dict=state_dict)

    def _load_weights(self, models: list[torch.nn.Module], folder: str) -> None:
        models.clear()
        if isinstance(self._policy, PeftModel):
            set_peft_model_state_dict(self._policy, load_peft_weights(folder, device="cpu"))
        else:
            load_checkpoint_in_model(self._policy, folder)
