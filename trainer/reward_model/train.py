"""The reward stage: TRL's RewardTrainer on pairs that are already encoded.

    rekatrain train recipes/smollm2/reward.yaml

The loss is Bradley and Terry's, -log sigmoid(r_chosen - r_rejected - margin), with the rows' margin if they have one
(Llama 2, arXiv 2307.09288), plus center_rewards_coefficient * (r_chosen + r_rejected)^2 (arXiv 2312.09244).
"""

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.reward_model.evaluate_pairs import evaluate_pairs
from rekatrain.trainer.reward_model.measures import show_evaluation
from rekatrain.trainer.reward_model.model import check_reward_model, load_reward_model, load_reward_tokenizer
from rekatrain.trainer.reward_model.pairs import Pair, leave_out_trained, load_pairs
from rekatrain.trainer.reward_model.score_probe import SaveScores
from rekatrain.trainer.run.folder import RunFolder
from rekatrain.trainer.trl_stages.best import make_best
from rekatrain.trainer.trl_stages.guards import GuardedTrainer
from rekatrain.trainer.trl_stages.run import check_start, is_finished, make_config, run_trainer

logger = logging.getLogger(__name__)

HEADLINE = ["loss", "accuracy", "margin", "grad_norm", "epoch", "tokens_per_second"]
EVALUATION_FILE = "evaluation.json"
# TRL's metrics of the held-out pairs.
EVALUATION_METRICS = [
    f"eval_{name}" for name in ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")
]


@dataclass(frozen=True, kw_only=True)
class RewardTask:
    """The parts of a run that are checked before weights are loaded; `held_out` may be empty."""

    config: RewardConfig
    tokenizer: PreTrainedTokenizerBase
    pairs: list[Pair]
    held_out: list[Pair]

    def trained_rows(self) -> Iterator[Sequence[object]]:
        """Return the parts of each trained pair, which a fingerprint is taken of."""
        return ((pair.chosen.input_ids, pair.rejected.input_ids, pair.margin) for pair in self.pairs)


def prepare(recipe: Recipe) -> RewardTask:
    """Check the recipe against its data and its model's config; raise InputError at the first fault."""
    tokenizer = load_reward_tokenizer(recipe)
    context = check_reward_model(recipe, tokenizer)
    config = make_config("reward", recipe.reward, recipe, RewardConfig)
    limit = min(config.max_length or context, context)
    pairs = load_pairs(recipe.dataset, tokenizer, recipe.chat, max_length=limit)
    held_out: list[Pair] = []
    if recipe.eval_dataset is not None:
        candidates = load_pairs(recipe.eval_dataset, tokenizer, recipe.chat, max_length=limit, name="eval_dataset")
        held_out = leave_out_trained(candidates, pairs)
    make_best(recipe).check_metric("reward.metric_for_best_model", EVALUATION_METRICS)
    return RewardTask(config=config, tokenizer=tokenizer, pairs=pairs, held_out=held_out)


class _GuardedRewardTrainer(GuardedTrainer, RewardTrainer):
    """TRL's trainer with our guards and schedules."""


def train(recipe: Recipe, *, resume: bool) -> None:
    """Train, from the newest checkpoint if `resume` finds one, and evaluate on the held-out pairs at the end."""
    with RunFolder(recipe.output_dir) as run:
        _train(recipe, run, resume=resume)


def _train(recipe: Recipe, run: RunFolder, *, resume: bool) -> None:
    run.check(recipe, resume=resume)
    task = prepare(recipe)
    checkpoint = check_start(run, recipe, task.config, task.trained_rows(), resume=resume)
    if checkpoint and is_finished(run, recipe, checkpoint, task.config):
        return
    set_seed(recipe.seed)  # the new head, and an adapter, start from the same random weights on every process
    trainer = _GuardedRewardTrainer(
        model=load_reward_model(task.tokenizer, **recipe.model, lora=recipe.lora),
        args=task.config,
        train_dataset=_dataset(task.pairs),
        eval_dataset=_dataset(task.held_out) if task.held_out else None,
        processing_class=copy.deepcopy(task.tokenizer),
    )
    kept = sorted((pair.chosen for pair in task.pairs), key=lambda sequence: len(sequence.input_ids))
    trainer.add_callback(SaveScores(run, [kept[0], kept[-1], task.pairs[0].rejected]))
    run_trainer(trainer, run, recipe, tokenizer=task.tokenizer, checkpoint=checkpoint, headline=HEADLINE)
    if not task.held_out:
        logger.warning("the recipe has no eval_dataset section, so the reward model is not evaluated")
    elif is_deepspeed_zero3_enabled():
        logger.info(
            "the weights are sharded; evaluate with: rekatrain evaluate RECIPE model.pretrained_model_name_or_path=%s",
            run.path,
        )
    elif PartialState().is_main_process:
        evaluation = evaluate_pairs(trainer.accelerator.unwrap_model(trainer.model), task.held_out)
        show_evaluation(evaluation, recipe.output_dir)
        text = json.dumps(asdict(evaluation), indent=1)
        (run.path / EVALUATION_FILE).write_text(text + "\n", encoding="utf-8")


def _dataset(pairs: Sequence[Pair]) -> Dataset:
    return Dataset.from_list(
        [
            {"chosen_ids": pair.chosen.input_ids, "rejected_ids": pair.rejected.input_ids}
            | ({} if pair.margin is None else {"margin": pair.margin})
            for pair in pairs
        ]
    )
