"""Accuracy and calibration of a reward model on held-out pairs, beside the accuracy of length alone.

rekatrain evaluate recipes/smollm2/reward.yaml [model.pretrained_model_name_or_path=FOLDER]
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rekatrain.data.errors import InputError
from rekatrain.data.rewardbench import REJECTED
from rekatrain.rewards.models.classifier import classify
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.reward_model.measures import RewardEvaluation, show_evaluation, summarize_scores
from rekatrain.trainer.reward_model.model import check_reward_model, load_reward_model, load_reward_tokenizer
from rekatrain.trainer.reward_model.pairs import Pair, leave_out_trained, load_pairs

MICRO_BATCH_TOKENS = 4096


def evaluate_pairs(
    model: Policy, pairs: Sequence[Pair], *, micro_batch_tokens: int = MICRO_BATCH_TOKENS
) -> RewardEvaluation:
    """Evaluate the model on the pairs, on its own device; leave it in evaluation mode."""
    encoded = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    # PEFT puts the adapter's layers into the base model.
    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(classifier, PreTrainedModel)
    scores = classify(classifier.eval(), encoded, micro_batch_tokens=micro_batch_tokens)[:, 0].tolist()
    lengths = [len(answer.input_ids) for answer in encoded]
    return summarize_scores(
        scores[: len(pairs)],
        scores[len(pairs) :],
        lengths[: len(pairs)],
        lengths[len(pairs) :],
        sources=[pair.source for pair in pairs],
        rows=[pair.where.partition(REJECTED)[0] for pair in pairs],
    )


def evaluate(recipe: Recipe, *, out: Path | None = None) -> RewardEvaluation:
    """Evaluate the recipe's model (or export, or run) on the held-out pairs; print the result and write it to `out`."""
    if recipe.eval_dataset is None:
        raise InputError("the recipe has no eval_dataset section: name the held-out preferences there")
    tokenizer = load_reward_tokenizer(recipe)
    context = check_reward_model(recipe, tokenizer, may_lack_head=False)
    held_out = load_pairs(recipe.eval_dataset, tokenizer, recipe.chat, max_length=context, name="eval_dataset")
    trained = load_pairs(recipe.dataset, tokenizer, recipe.chat, max_length=context)
    held_out = leave_out_trained(held_out, trained)
    model = load_reward_model(tokenizer, **recipe.model)
    # transformers wraps `to` and loses its signature
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    evaluation = evaluate_pairs(model, held_out)
    show_evaluation(evaluation, recipe.model["pretrained_model_name_or_path"])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(asdict(evaluation), indent=1) + "\n", encoding="utf-8")
    return evaluation
