"""The metrics that TRL's trainers gather between two logged steps, which their checkpoints lack.

With them, the records of a resumed run equal those of one that was never stopped, wherever it was saved.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rekatrain.trainer.run.folder import RunFolder
from rekatrain.trainer.run.guards import spell_nonfinite

RUNNING_METRICS_FILE = "running_metrics.json"


class RunningMetrics(TrainerCallback):
    """Saves the counts and sums of the steps since the last logged one, and restores them.

    trainer:    one of TRL's; SFTTrainer and RewardTrainer have the attributes, but no class of them in common
    checkpoint: the one that the run continues from, or None
    """

    def __init__(self, trainer: Any, run: RunFolder, checkpoint: Path | None) -> None:
        self._trainer, self._run, self._checkpoint = trainer, run, checkpoint

    @property
    def num_tokens(self) -> int:
        """Number of tokens since the first step of the run."""
        return int(self._trainer._total_train_tokens)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the file to the checkpoint that is being written."""
        trainer = self._trainer
        content = {
            "num_tokens": self.num_tokens,
            "last_logged_step": trainer._globalstep_last_logged,
            "losses": trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist(),  # one per process
            "metrics": trainer._metrics["train"],
        }
        if state.is_world_process_zero:
            path = self._run.partial_checkpoint(state.global_step) / RUNNING_METRICS_FILE
            path.write_text(json.dumps(spell_nonfinite(content)) + "\n", encoding="utf-8")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the content of the checkpoint's file."""
        if self._checkpoint is None:
            return
        content = json.loads((self._checkpoint / RUNNING_METRICS_FILE).read_text(encoding="utf-8"))
        trainer, losses = self._trainer, [float(loss) for loss in content["losses"]]
        trainer._total_train_tokens = content["num_tokens"]
        trainer._globalstep_last_logged = content["last_logged_step"]
        is_same_launch = len(losses) == args.world_size
        loss = losses[args.process_index] if is_same_launch else sum(losses) / len(losses)
        trainer._tr_loss = torch.tensor(loss, device=args.device)
        for name, values in content["metrics"].items():
            trainer._metrics["train"][name] = [float(value) for value in values]
