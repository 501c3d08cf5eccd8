"""The SFT stage: TRL's SFTTrainer on rows whose ids and labels are made here.

    rekatrain train recipes/smollm2/sft.yaml

Packing is TRL's: rows lie end to end, and position ids that start again at 0 keep a row from attending to another one
on every attention backend (tests/trainer/test_sft.py holds packed and separate losses equal).
"""

import copy
import logging
from dataclasses import dataclass

from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rekatrain.data.chat import EncodedRow
from rekatrain.data.mixture import load_mixture
from rekatrain.data.training_rows import encode_rows
from rekatrain.trainer.agreement import Repeatable
from rekatrain.trainer.models import check_model, load_model_tokenizer, load_policy
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run_folder import RunFolder
from rekatrain.trainer.training_probe import choose_texts
from rekatrain.trainer.trl_guards import GuardedTrainer
from rekatrain.trainer.trl_run import check_start, is_finished, make_config, run_trainer

logger = logging.getLogger(__name__)

HEADLINE = ["loss", "mean_token_accuracy", "tokens_per_second", "epoch", "grad_norm"]


@dataclass(frozen=True, kw_only=True)
class SFTTask:
    """Everything of a run that is checked before weights are loaded."""

    config: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    rows: list[EncodedRow]


def prepare(recipe: Recipe) -> SFTTask:
    """Check the recipe against its data and its model's config; raise InputError for a mistake."""
    tokenizer = load_model_tokenizer(recipe)
    context = check_model(recipe, tokenizer).max_position_embeddings
    config = make_config("sft", recipe.sft, recipe, SFTConfig)
    max_length = min(config.max_length or context, context)
    rows = encode_rows(load_mixture(recipe.dataset).rows, tokenizer, max_length, **recipe.chat)
    return SFTTask(config=config, tokenizer=tokenizer, rows=rows)


class _GuardedSFTTrainer(GuardedTrainer, SFTTrainer):
    """TRL's trainer with our guards and schedules."""


def train(recipe: Recipe, *, resume: bool) -> None:
    """Run the stage; with `resume`, go on from the newest checkpoint if there is one."""
    with RunFolder(recipe.output_dir) as run:
        _train(recipe, run, resume=resume)


def _train(recipe: Recipe, run: RunFolder, *, resume: bool) -> None:
    run.check(recipe, resume=resume)
    task = prepare(recipe)
    rows = Repeatable(lambda: ((row.input_ids, row.labels) for row in task.rows))
    checkpoint = check_start(run, recipe, task.config, rows, resume=resume)
    if checkpoint and is_finished(run, recipe, checkpoint, task.config):
        return
    set_seed(recipe.seed)
    trainer = _GuardedSFTTrainer(
        model=load_policy(recipe),
        args=task.config,
        train_dataset=Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in task.rows]),
        processing_class=copy.deepcopy(task.tokenizer),
    )
    texts = choose_texts(task.tokenizer, [row.input_ids for row in task.rows])
    run_trainer(trainer, run, recipe, tokenizer=task.tokenizer, checkpoint=checkpoint, headline=HEADLINE, texts=texts)
