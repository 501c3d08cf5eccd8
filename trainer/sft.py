"""The SFT stage: TRL's SFTTrainer on rows whose ids and labels are made here.

    rekatrain train recipes/smollm2/sft.yaml

Packing is TRL's: rows lie end to end, and position ids that start again at 0 keep a row from attending to another one
on every attention backend (tests/trainer/test_sft.py holds packed and separate losses equal).
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rekatrain.data.chat import EncodedRow
from rekatrain.data.encoded import EncodedRows
from rekatrain.data.encoded_mixture import encode_mixture
from rekatrain.data.errors import InputError
from rekatrain.data.streaming import is_streaming, stream_mixture
from rekatrain.trainer.models.load import check_model, load_model_tokenizer, load_policy
from rekatrain.trainer.models.probe import choose_texts
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.folder import RunFolder
from rekatrain.trainer.trl_stages.best import make_best
from rekatrain.trainer.trl_stages.guards import GuardedTrainer
from rekatrain.trainer.trl_stages.held_out import measure_held_out, metric_names
from rekatrain.trainer.trl_stages.run import check_start, is_finished, make_config, run_trainer

logger = logging.getLogger(__name__)

HEADLINE = ["loss", "mean_token_accuracy", "tokens_per_second", "epoch", "grad_norm"]


@dataclass(frozen=True, kw_only=True)
class SFTTask:
    """Everything of a run that is checked before weights are loaded.

    rows:     the rows to train; with `dataset.streaming`, the first of them
    stream:   the rows to train with `dataset.streaming`
    contents: of the sources of a stream, for its fingerprint
    held_out: rows to measure while the run trains, by the name of their source; empty without `sft.eval_strategy`
    """

    config: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    rows: EncodedRows
    stream: IterableDataset | None = None
    contents: list[object] | None = None
    held_out: dict[str, EncodedRows]

    def trained_rows(self) -> Iterator[Sequence[object]]:
        """Return the ids and the labels of each row, which a fingerprint is taken of; of a stream, its contents."""
        if self.contents is not None:
            return iter([[self.contents]])
        return self.rows.arrays()


def prepare(recipe: Recipe) -> SFTTask:
    """Check the recipe against its data and its model's config; raise InputError for a mistake."""
    tokenizer = load_model_tokenizer(recipe)
    context = check_model(recipe, tokenizer).max_position_embeddings
    config = make_config("sft", recipe.sft, recipe, SFTConfig)
    max_length = min(config.max_length or context, context)
    stream, contents = None, None
    if is_streaming(recipe.dataset):
        if config.max_steps <= 0:
            raise InputError(
                "dataset.streaming needs sft.max_steps: the number of rows is not known before they are read"
            )
        stream, first, contents = stream_mixture(recipe.dataset, tokenizer, max_length, recipe.chat, seed=recipe.seed)
        rows = EncodedRows(Dataset.from_list([vars(row) for row in first]))
    else:
        rows = encode_mixture(recipe.dataset, tokenizer, max_length, recipe.chat).rows
    held_out: dict[str, EncodedRows] = {}
    if config.eval_strategy != "no" and recipe.eval_dataset is not None:
        held_out = encode_mixture(recipe.eval_dataset, tokenizer, max_length, recipe.chat, "eval_dataset").by_source
    make_best(recipe).check_metric("sft.metric_for_best_model", metric_names([*held_out]))
    if not config.packing:  # the rows are as the trainer needs them: TRL would copy them once more
        config.dataset_kwargs = {"skip_prepare_dataset": True}
    return SFTTask(config=config, tokenizer=tokenizer, rows=rows, stream=stream, contents=contents, held_out=held_out)


class _GuardedSFTTrainer(GuardedTrainer, SFTTrainer):
    """TRL's trainer with our guards, schedules and held-out loss; `held_out` is set before it trains."""

    held_out: Mapping[str, Sequence[EncodedRow]]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:  # transformers names the data set, which is ours
        """Measure the held-out rows, and log the result."""
        batch_size = self.args.per_device_eval_batch_size
        assert self.model is not None
        metrics = measure_held_out(self.model, self.held_out, self.accelerator, batch_size=batch_size)
        self.model.eval()  # TRL adds its means of training steps to a log in training mode
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def train(recipe: Recipe, *, resume: bool) -> None:
    """Run the stage; with `resume`, go on from the newest checkpoint if there is one."""
    with RunFolder(recipe.output_dir) as run:
        _train(recipe, run, resume=resume)


def _train(recipe: Recipe, run: RunFolder, *, resume: bool) -> None:
    run.check(recipe, resume=resume)
    task = prepare(recipe)
    checkpoint = check_start(run, recipe, task.config, task.trained_rows(), resume=resume)
    if checkpoint and is_finished(run, recipe, checkpoint, task.config):
        return
    set_seed(recipe.seed)
    trainer = _GuardedSFTTrainer(
        model=load_policy(recipe),
        args=task.config,
        train_dataset=task.stream if task.stream is not None else task.rows.dataset,
        # transformers evaluates only with a data set; `evaluate` reads the rows.
        eval_dataset=next(iter(task.held_out.values()))[:1].dataset if task.held_out else None,
        processing_class=copy.deepcopy(task.tokenizer),
    )
    trainer.held_out = task.held_out
    lengths = task.rows.lengths()
    own = [task.rows[int(index)].input_ids for index in (lengths.argmin(), lengths.argmax())]
    texts = choose_texts(task.tokenizer, own)
    run_trainer(trainer, run, recipe, tokenizer=task.tokenizer, checkpoint=checkpoint, headline=HEADLINE, texts=texts)
