"""The SFT stage: TRL's SFTTrainer on rows whose ids and labels are made here.

    rekatrain train recipes/smollm2/sft.yaml

Packing is TRL's: rows lie end to end, and their position ids, which start again at 0, keep each from seeing another on
every attention backend (tests/test_sft.py holds packed and separate losses equal).
"""

import copy
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from data.chat import EncodedRow, EndOfTurn, assistant_turns, encode_row
from data.errors import InputError
from data.rows import Row
from data.sources import load_rows
from trainer.models import check_model, check_trainable, load_model_tokenizer, load_policy
from trainer.recipe import Recipe
from trainer.run_folder import STATE_FILE, RunFolder, checkpoint_step
from trainer.run_log import RunLog

logger = logging.getLogger(__name__)

HEADLINE = ["loss", "mean_token_accuracy", "grad_norm", "epoch", "tokens_per_second"]


@dataclass(frozen=True, kw_only=True)
class SFTTask:
    """All of a run that can be wrong without a weight being loaded, checked."""

    config: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    rows: list[EncodedRow]


def prepare(recipe: Recipe) -> SFTTask:
    """Check the recipe against its data and its model's config; InputError says what is wrong."""
    config = _make_config(recipe)
    tokenizer = load_model_tokenizer(recipe)
    context = check_model(recipe, tokenizer).max_position_embeddings
    rows = load_rows(**recipe.dataset).rows
    encoded = encode_conversations(rows, tokenizer, **recipe.chat)
    limit = min(config.max_length or context, context)
    fitting = [row for row in encoded if len(row.input_ids) <= limit]
    if len(fitting) < len(encoded):
        # TRL would cut such a row, and with it the end of the turn: the model would learn not to stop.
        message = (
            f"{len(encoded) - len(fitting)} of {len(encoded)} rows are longer than {limit} tokens "
            "(the smaller of sft.max_length and the model's context)"
        )
        if recipe.dataset.get("bad_rows", "refuse") == "refuse" or not fitting:
            raise InputError(f"{message}; raise sft.max_length, or set dataset.bad_rows to skip")
        logger.warning("%s; skipped", message)
    return SFTTask(config=config, tokenizer=tokenizer, rows=fitting)


def encode_conversations(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_of_turn: EndOfTurn = "sep",
    turns: Literal["all", "last"] = "all",
) -> list[EncodedRow]:
    """Encode each conversation, as one training row for each of its assistant turns or for the last alone.

    Raises InputError, with the row named, where a conversation has no assistant turn to train.
    """
    encoded = []
    for row in rows:
        conversations = list(assistant_turns(row.messages))
        if not conversations:
            raise InputError(f"{row.where}: no assistant message to train; stage sft needs one in every row")
        for messages in conversations if turns == "all" else conversations[-1:]:
            try:
                encoded.append(encode_row(messages, tokenizer, end_of_turn))
            except InputError as error:
                raise InputError(f"{row.where}: {error}") from error
    return encoded


def train(recipe: Recipe, *, resume: bool) -> None:
    """Run the stage, from the newest checkpoint where `resume` finds one."""
    run = RunFolder(recipe.output_dir)
    checkpoint = run.check(recipe, resume=resume)
    task = prepare(recipe)
    check_trainable(recipe, has_master_weights=task.config.deepspeed_plugin is not None)
    if checkpoint and _is_finished(checkpoint, task.config):
        logger.info("%s is finished: %s is its last checkpoint", recipe.output_dir, checkpoint.name)
        return
    set_seed(recipe.seed)
    trainer = SFTTrainer(
        model=load_policy(recipe),
        args=task.config,
        train_dataset=Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in task.rows]),
        processing_class=task.tokenizer,
        callbacks=[_KeepTokenizer(copy.deepcopy(task.tokenizer), run)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if PartialState().is_main_process:
        first_step = checkpoint_step(checkpoint) if checkpoint else 0
        run.start(recipe, first_step)
        trainer.add_callback(_Log(run, recipe, first_step))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _make_config(recipe: Recipe) -> SFTConfig:
    section = {"bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(), **recipe.sft}
    if section.get("save_strategy") == "no":
        raise InputError("sft.save_strategy is no: the run would leave nothing behind; set steps or epoch")
    try:
        return SFTConfig(
            output_dir=str(RunFolder(recipe.output_dir).checkpoints),
            seed=recipe.seed,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **section,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"sft: {str(error).splitlines()[0]}") from error


def _is_finished(checkpoint: Path, config: SFTConfig) -> bool:
    # transformers' Trainer, resumed at its last step, would take one more.
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return state["global_step"] >= (config.max_steps if config.max_steps > 0 else state["max_steps"])


class _KeepTokenizer(TrainerCallback):
    """Saves the tokenizer as it was loaded over the trainer's, which TRL has given a pad token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, run: RunFolder) -> None:
        self._tokenizer, self._run = tokenizer, run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._tokenizer.save_pretrained(self._run.checkpoint(state.global_step))


class _Log(TrainerCallback):
    """Hands the trainer's metrics to the run's log."""

    def __init__(self, run: RunFolder, recipe: Recipe, first_step: int) -> None:
        self._run, self._recipe, self._first_step = run, recipe, first_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log = RunLog(self._run, self._recipe, first_step=self._first_step, max_steps=state.max_steps)
        self._last, self._num_tokens = time.monotonic(), 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        logs = event["logs"]
        if "loss" not in logs:  # the trainer's closing log is a summary, not a step
            return
        now = time.monotonic()
        logs["tokens_per_second"] = (logs["num_tokens"] - self._num_tokens) / (now - self._last)
        self._last, self._num_tokens = now, logs["num_tokens"]
        self._log.step(state.global_step, logs, headline=HEADLINE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log.close()
