"""The common part of the stages on TRL's trainers: arguments, log, and the files added to a checkpoint."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rekatrain.data.errors import InputError
from rekatrain.data.mixture import is_shuffled
from rekatrain.trainer.models.load import check_trainable
from rekatrain.trainer.models.loraplus import lr_ratio
from rekatrain.trainer.models.probe import SaveProbe
from rekatrain.trainer.models.quantization import keep_adapter_dtype
from rekatrain.trainer.models.source import find_source
from rekatrain.trainer.processes.agreement import agree_on_start
from rekatrain.trainer.processes.launch import (
    USUAL_DDP_TIMEOUT,
    adapt_to_device,
    announce,
    check_engine,
    check_mixed_precision,
    keep_gradients_in_float32,
    prepare_deepspeed,
    read_launch,
)
from rekatrain.trainer.recipe.defaults import bf16_default
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.optimizers import MUON, optim_of
from rekatrain.trainer.resume.fingerprints import take_fingerprints
from rekatrain.trainer.resume.origin import check_origin
from rekatrain.trainer.resume.safe_load import tensors_only
from rekatrain.trainer.run.best import KEYS, BestModel
from rekatrain.trainer.run.checkpoints import STATE_FILE, checkpoint_step, write_failures
from rekatrain.trainer.run.folder import ORIGIN_FILE, RunFolder
from rekatrain.trainer.run.guards import NonFiniteGuard, StopGuard
from rekatrain.trainer.run.log import RunLog
from rekatrain.trainer.run.schedule import follow_new_length
from rekatrain.trainer.trl_stages.best import KeepBest, make_best
from rekatrain.trainer.trl_stages.guards import GuardedTrainer, NonFiniteCallback, StopCallback
from rekatrain.trainer.trl_stages.interruption import InterruptionCallback
from rekatrain.trainer.trl_stages.resharding import SaveBatch, check_resumable, restore_other_launch
from rekatrain.trainer.trl_stages.running_metrics import RunningMetrics

logger = logging.getLogger(__name__)

EVALUATED = ["eval_loss", "eval_mean_token_accuracy", "eval_accuracy", "eval_margin"]

Config = TypeVar("Config", bound=TrainingArguments)


def make_config(name: str, section: Mapping[str, Any], recipe: Recipe, config_class: Callable[..., Config]) -> Config:
    """Make a TRL config of the recipe's section `name` and of the values that the program sets; connect the processes.

    Under ZeRO-3 every model that transformers builds from here on is sharded as it is built.
    """
    prepare_deepspeed(read_launch())
    # Every step uses all trained weights; to look for unused ones costs a traversal of the graph per step.
    defaults = {
        "bf16": bf16_default(),
        "ddp_find_unused_parameters": False,
        "ddp_timeout": USUAL_DDP_TIMEOUT,
        "logging_nan_inf_filter": False,  # transformers would log a loss of nan as an earlier one
        "train_sampling_strategy": "random" if is_shuffled(recipe.dataset) else "sequential",
    }
    if not is_shuffled(recipe.dataset):
        for key, kept in (("train_sampling_strategy", "sequential"), ("packing", False)):
            if section.get(key, kept) != kept:
                raise InputError(f"{name}.{key} is {section[key]!r}, but dataset.order keeps an order: remove one")
    # The run folder deletes old checkpoints: transformers goes by the time of the files, and deletes before it has
    # written the whole of the new one.
    section = defaults | {key: value for key, value in section.items() if key not in KEYS} | {"save_total_limit": None}
    if section.get("optim") == MUON:
        del section["optim"]  # transformers has none: GuardedTrainer makes it
    check_mixed_precision(name, bf16=bool(section["bf16"]), fp16=bool(section.get("fp16")))
    try:
        config = config_class(
            output_dir=str(RunFolder(recipe.output_dir).partial),
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
        keep_gradients_in_float32(config.deepspeed_plugin)
        _check_deepspeed(name, config, config.deepspeed_plugin)
    return config


def _check_deepspeed(name: str, config: TrainingArguments, plugin: DeepSpeedPlugin) -> None:
    """Raise InputError if the launch file contradicts the recipe; DeepSpeed would do so after loading the weights."""
    for key, ours in (
        ("gradient_clipping", config.max_grad_norm),
        ("gradient_accumulation_steps", config.gradient_accumulation_steps),
    ):
        theirs = plugin.get_value(key, "auto")
        if theirs not in ("auto", ours):
            raise InputError(
                f"the launch file has {key} {theirs}, the recipe's {name} section {ours}; "
                "remove it from the launch file"
            )


def check_start(
    run: RunFolder, recipe: Recipe, config: TrainingArguments, rows: Iterable[Sequence[object]], *, resume: bool
) -> Path | None:
    """Return the checkpoint to continue from, or None for a fresh start.

    Raises InputError if the launched engine cannot train the recipe's model, or cannot go on from the checkpoint.

    rows: the parts of each trained row
    """
    check_trainable(recipe, is_deepspeed=config.deepspeed_plugin is not None, bf16=config.bf16)
    checkpoint = run.choose_checkpoint(resume=resume)
    if checkpoint is not None:
        check_resumable(checkpoint, recipe.stage, config)
    prints = take_fingerprints(recipe, rows)
    agree_on_start(prints, checkpoint)
    run.open(recipe, checkpoint, resume=resume, origin=partial(check_origin, recipe, prints))
    return checkpoint


def is_finished(run: RunFolder, recipe: Recipe, checkpoint: Path, config: TrainingArguments) -> bool:
    """Return True if the run has ended, early or not: transformers' Trainer, resumed there, would take one more step.

    A finished run gets what a kill after its last step has cut off.
    """
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    section: dict[str, Any] = getattr(recipe, recipe.stage)
    earlier = json.loads((checkpoint / ORIGIN_FILE).read_text(encoding="utf-8"))["recipe"][recipe.stage]
    if config.max_steps > 0:
        is_over = state["global_step"] >= config.max_steps
    elif all(section.get(key) == earlier.get(key) for key in ("max_steps", "num_train_epochs")):
        is_over = state["global_step"] >= state["max_steps"]
    else:
        is_over = state["epoch"] >= config.num_train_epochs
    best = make_best(recipe)
    best.restore(checkpoint)
    is_over = is_over or best.is_exhausted
    if not is_over:
        return False
    if PartialState().is_main_process:
        run.start(recipe, checkpoint_step(checkpoint))
    logger.info("%s is finished: %s is its last checkpoint", recipe.output_dir, checkpoint.name)
    return True


def run_trainer(
    trainer: GuardedTrainer,
    run: RunFolder,
    recipe: Recipe,
    *,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    headline: list[str],
    texts: Sequence[Sequence[int]] = (),
) -> None:
    """Train from the checkpoint, or from the start, with the run's log.

    tokenizer: its files are part of each checkpoint
    texts:     token ids of texts whose log-probabilities are part of each checkpoint
    """
    # TRL writes a model card beside the checkpoints, about a base model that it cannot name; an export has our own.
    trainer.create_model_card = lambda *_, **__: None  # type: ignore[method-assign]
    trainer.loraplus_lr_ratio, trainer.optim = lr_ratio(recipe.lora), optim_of(recipe)
    if recipe.model.get("quantization_config") is not None:
        assert trainer.model is not None
        keep_adapter_dtype(trainer.model, find_source(recipe.model["pretrained_model_name_or_path"]).adapter)
    trainer.add_callback(NonFiniteCallback(NonFiniteGuard(recipe, run), trainer, tokenizer))
    running = RunningMetrics(trainer, run, checkpoint)
    trainer.add_callback(running)  # its file is there when the checkpoint is completed
    trainer.add_callback(SaveBatch(run))
    if texts:
        trainer.add_callback(SaveProbe(run, texts))
    best = make_best(recipe)
    best.restore(checkpoint)
    trainer.add_callback(KeepBest(best))
    trainer.add_callback(_CompleteCheckpoint(tokenizer, run, recipe, best))
    trainer.add_callback(_AnnounceEngine(trainer.accelerator))
    if checkpoint is not None:
        trainer.add_callback(_FollowSchedule())
        trainer.args.eval_on_start = False  # the run has started before
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if PartialState().is_main_process:
        first_step = checkpoint_step(checkpoint) if checkpoint else 0
        run.start(recipe, first_step)
        trainer.add_callback(_Log(run, recipe, first_step, headline, running))
    trainer.add_callback(StopCallback(StopGuard(recipe)))  # after the log, which then shows the metrics
    if checkpoint is not None:
        restore_other_launch(trainer, checkpoint)
    interruption = InterruptionCallback(trainer)
    trainer.add_callback(interruption)
    is_sharded = checkpoint is not None and trainer.accelerator.distributed_type is DistributedType.DEEPSPEED
    with write_failures(run.path), tensors_only() if is_sharded else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    interruption.raise_if_stopped()


class _AnnounceEngine(TrainerCallback):
    """Checks and logs the engine that runs the model, once the model is wrapped."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        check_engine(read_launch(), self._accelerator)
        announce(self._accelerator, event["model"])


class _FollowSchedule(TrainerCallback):
    """Has a resumed run follow its own schedule and intervals; transformers keeps the checkpoint's."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # of saving, logging and evaluating
        follow_new_length(event["lr_scheduler"], state.max_steps)


class _CompleteCheckpoint(TrainerCallback):
    """Replaces TRL's tokenizer, which has a pad token, by ours, and publishes the checkpoint in the run folder."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, run: RunFolder, recipe: Recipe, best: BestModel) -> None:
        self._tokenizer, self._run, self._stage, self._best = tokenizer, run, recipe.stage, best
        self._save_total_limit: int | None = getattr(recipe, recipe.stage).get("save_total_limit")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its part, and the trainer does not wait for them
        folder = self._run.partial_checkpoint(state.global_step)
        if state.is_world_process_zero:
            self._best.save(folder)
            self._tokenizer.save_pretrained(folder)
            self._run.publish(
                state.global_step,
                stage=self._stage,
                launch=asdict(read_launch()),
                save_total_limit=self._save_total_limit,
            )
        PartialState().wait_for_everyone()  # none looks for the checkpoint before it is there


class _Log(TrainerCallback):
    """Passes the trainer's metrics to the run's log."""

    def __init__(
        self, run: RunFolder, recipe: Recipe, first_step: int, headline: list[str], running: RunningMetrics
    ) -> None:
        self._run, self._recipe, self._first_step, self._headline = run, recipe, first_step, headline
        self._running = running

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log = RunLog(self._run, self._recipe, first_step=self._first_step, max_steps=state.max_steps)
        self._last, self._num_tokens = time.monotonic(), float(self._running.num_tokens)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        logs = event["logs"]
        if "eval_loss" in logs:
            self._log.step(state.global_step, logs, headline=EVALUATED)
        if "loss" not in logs:  # the trainer's closing log is a summary, not a step
            return
        now = time.monotonic()
        logs["tokens_per_second"] = (logs["num_tokens"] - self._num_tokens) / (now - self._last)
        self._last, self._num_tokens = now, logs["num_tokens"]
        self._log.step(state.global_step, logs, headline=self._headline)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log.close()
