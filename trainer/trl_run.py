"""What the stages on TRL's trainers share: their arguments, their log, and the tokenizer that a checkpoint keeps."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from rekatrain.data.errors import InputError
from rekatrain.trainer.launch import Launch, adapt_to_device, announce, check_engine, read_launch
from rekatrain.trainer.models import check_trainable
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run_folder import STATE_FILE, RunFolder, checkpoint_step
from rekatrain.trainer.run_log import RunLog
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

Config = TypeVar("Config", bound=TrainingArguments)

LAUNCH_FILE = "launch.json"


def make_config(name: str, section: Mapping[str, Any], recipe: Recipe, config_class: Callable[..., Config]) -> Config:
    """A TRL config of the recipe's section `name`, with what the program itself sets; processes are connected here.

    Under ZeRO-3 every model that transformers builds from here on is sharded as it is built.
    """
    read_launch()
    # No step leaves a trained weight out, and looking for one costs a traversal of the graph each time.
    defaults = {
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "ddp_find_unused_parameters": False,
    }
    section = defaults | dict(section)
    if section.get("save_strategy") == "no":
        raise InputError(f"{name}.save_strategy is no: the run would leave nothing behind; set steps or epoch")
    try:
        config = config_class(
            output_dir=str(RunFolder(recipe.output_dir).checkpoints),
            seed=recipe.seed,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **section,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {str(error).splitlines()[0]}") from error
    if config.deepspeed_plugin is not None:
        adapt_to_device(config.deepspeed_plugin)
        _check_deepspeed(name, config, config.deepspeed_plugin)
    return config


def _check_deepspeed(name: str, config: TrainingArguments, plugin: DeepSpeedPlugin) -> None:
    """Raise InputError where the launch file and the recipe differ on one thing; DeepSpeed would after the loading."""
    for key, ours in (
        ("gradient_clipping", config.max_grad_norm),
        ("gradient_accumulation_steps", config.gradient_accumulation_steps),
    ):
        theirs = plugin.get_value(key, "auto")
        if theirs not in ("auto", ours):
            raise InputError(
                f"the launch file has {key} {theirs}, the recipe's {name} section {ours}; "
                "take it out of the launch file"
            )


def check_start(recipe: Recipe, config: TrainingArguments, checkpoint: Path | None) -> None:
    """Raise InputError for a start that cannot be trained, or continued, under the engine that was launched."""
    check_trainable(recipe, is_deepspeed=config.deepspeed_plugin is not None, bf16=config.bf16)
    if checkpoint is None:
        return
    if not (checkpoint / LAUNCH_FILE).exists():
        raise InputError(f"{str(checkpoint)!r} was cut off while it was saved; delete it to go on from the one before")
    saved = Launch(**json.loads((checkpoint / LAUNCH_FILE).read_text(encoding="utf-8")))
    if saved != read_launch():
        raise InputError(
            f"{str(checkpoint)!r} was saved by {saved}, and this is {read_launch()}: a step's rows and the optimizer's "
            "state are shared out over the processes. Launch as then, or start a new run from its weights: "
            "rekatrain export RUN OUT"
        )


def is_finished(checkpoint: Path, config: TrainingArguments) -> bool:
    """Whether the run has taken its last step: transformers' Trainer, resumed there, would take one more."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return state["global_step"] >= (config.max_steps if config.max_steps > 0 else state["max_steps"])


def run_trainer(
    trainer: Trainer,
    run: RunFolder,
    recipe: Recipe,
    *,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    headline: list[str],
) -> None:
    """Train from the checkpoint, or from the start, with the run's own log; `tokenizer` is what checkpoints keep."""
    trainer.add_callback(_CompleteCheckpoint(tokenizer, run))
    trainer.add_callback(_TellEngine(trainer.accelerator))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if PartialState().is_main_process:
        first_step = checkpoint_step(checkpoint) if checkpoint else 0
        run.start(recipe, first_step)
        trainer.add_callback(_Log(run, recipe, first_step, headline))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


class _TellEngine(TrainerCallback):
    """Checks and logs what the model really runs on, once it is wrapped."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        check_engine(read_launch(), self._accelerator)
        announce(self._accelerator, event["model"])


class _CompleteCheckpoint(TrainerCallback):
    """Saves how the run was launched, and over the trainer's tokenizer, which TRL gave a pad token, the one loaded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> None:
        self._tokenizer, self._run = tokenizer, run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()  # with its part of the checkpoint, which the trainer does not wait for
        if state.is_world_process_zero:
            checkpoint = self._run.checkpoint(state.global_step)
            self._tokenizer.save_pretrained(checkpoint)
            (checkpoint / LAUNCH_FILE).write_text(json.dumps(asdict(read_launch())), encoding="utf-8")


class _Log(TrainerCallback):
    """Hands the trainer's metrics to the run's log."""

    def __init__(self, run: RunFolder, recipe: Recipe, first_step: int, headline: list[str]) -> None:
        self._run, self._recipe, self._first_step, self._headline = run, recipe, first_step, headline

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log = RunLog(self._run, self._recipe, first_step=self._first_step, max_steps=state.max_steps)
        self._last, self._num_tokens = time.monotonic(), 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        logs = event["logs"]
        if "eval_loss" in logs:
            self._log.step(state.global_step, logs, headline=["eval_loss", "eval_accuracy", "eval_margin"])
        if "loss" not in logs:  # the trainer's closing log is a summary, not a step
            return
        now = time.monotonic()
        logs["tokens_per_second"] = (logs["num_tokens"] - self._num_tokens) / (now - self._last)
        self._last, self._num_tokens = now, logs["num_tokens"]
        self._log.step(state.global_step, logs, headline=self._headline)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log.close()
