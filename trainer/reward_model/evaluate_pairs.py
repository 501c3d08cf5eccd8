"""Accuracy and calibration of a reward model on held-out pairs, beside the accuracy of length alone.

rekatrain evaluate recipes/smollm2/reward.yaml [model.pretrained_model_name_or_path=FOLDER]
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import correlation, fmean, pstdev

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rekatrain.data.errors import InputError
from rekatrain.rewards.models.classifier import classify
from rekatrain.trainer.intervals import Accuracy, wilson_interval
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.reward_model.model import check_reward_model, load_reward_model, load_reward_tokenizer
from rekatrain.trainer.reward_model.pairs import Pair, leave_out_trained, load_pairs

NUM_BINS = 10
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs with a confidence in [low, high): their number, mean confidence, and the fraction ranked right."""

    low: float
    high: float
    num_pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class RewardEvaluation:
    """Measurements of a reward model on held-out pairs.

    accuracy:           fraction of pairs whose chosen answer scores higher, with its 95 % Wilson interval
    longer_wins:        fraction of pairs whose chosen answer has more tokens; equal lengths count half
    length_correlation: Pearson's, of score and number of tokens over all answers; None if either is constant
    calibration_error:  expected calibration error (Guo et al., arXiv 1706.04599): mean of |confidence - accuracy| over
                        `bins`, weighted by their number of pairs. The confidence in the answer that scores higher
                        is sigmoid(|margin|), so ten bins of equal width divide [0.5, 1]
    mean, std:          of the scores of all answers, chosen and rejected
    """

    accuracy: Accuracy
    longer_wins: float
    length_correlation: float | None
    calibration_error: float
    bins: list[Bin]
    mean: float
    std: float


def evaluate_pairs(model: Policy, pairs: Sequence[Pair]) -> RewardEvaluation:
    """Evaluate the model on the pairs, on its own device; leave it in evaluation mode."""
    encoded = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    # PEFT puts the adapter's layers into the base model.
    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(classifier, PreTrainedModel)
    scores = classify(classifier.eval(), encoded, micro_batch_tokens=MICRO_BATCH_TOKENS)[:, 0].tolist()
    lengths = [len(answer.input_ids) for answer in encoded]
    return summarize_scores(scores[: len(pairs)], scores[len(pairs) :], lengths[: len(pairs)], lengths[len(pairs) :])


def summarize_scores(
    chosen: Sequence[float], rejected: Sequence[float], chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]
) -> RewardEvaluation:
    """Evaluate pairs from their scores and lengths in tokens; equal scores count as wrong."""
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    longer = [math.copysign(1, a - b) if a != b else 0.0 for a, b in zip(chosen_lengths, rejected_lengths, strict=True)]
    scores, lengths = [*chosen, *rejected], [*chosen_lengths, *rejected_lengths]
    is_defined = len(set(scores)) > 1 and len(set(lengths)) > 1
    bins = calibration_bins(margins)
    return RewardEvaluation(
        accuracy=wilson_interval(num_right=sum(margin > 0 for margin in margins), num_graded=len(margins)),
        longer_wins=(1 + fmean(longer)) / 2,
        length_correlation=correlation(scores, lengths) if is_defined else None,
        calibration_error=sum(each.num_pairs * abs(each.confidence - each.accuracy) for each in bins) / len(margins),
        bins=bins,
        mean=fmean(scores),
        std=pstdev(scores),
    )


def calibration_bins(margins: Sequence[float]) -> list[Bin]:
    """Return the bins that are not empty, by the confidence sigmoid(|margin|) in the answer that scores higher.

    >>> [(each.low, each.num_pairs, each.accuracy) for each in calibration_bins([0.0, 0.1, -0.1, 9.0])]
    [(0.5, 3, 0.3333333333333333), (0.95, 1, 1.0)]
    """
    members: dict[int, list[float]] = {}
    for margin in margins:
        index = int((_confidence(margin) - 0.5) * 2 * NUM_BINS)
        members.setdefault(min(index, NUM_BINS - 1), []).append(margin)
    width = 0.5 / NUM_BINS
    return [
        Bin(
            low=0.5 + index * width,
            high=0.5 + (index + 1) * width,
            num_pairs=len(inside),
            confidence=fmean(_confidence(margin) for margin in inside),
            accuracy=fmean(margin > 0 for margin in inside),
        )
        for index, inside in sorted(members.items())
    ]


def show_evaluation(evaluation: RewardEvaluation, name: str) -> None:
    """Print the evaluation as one line after the model's name."""
    print(f"{name}: {describe_evaluation(evaluation)}")


def describe_evaluation(evaluation: RewardEvaluation, pairs: str = "held-out pairs") -> str:
    """Return the evaluation as one line; `pairs` names the kind of the pairs."""
    accuracy = evaluation.accuracy
    length = evaluation.length_correlation
    return (
        f"accuracy {accuracy.accuracy:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}] of {accuracy.num_graded} {pairs}; "
        f"the longer answer wins {evaluation.longer_wins:.1%}; correlation of score and length "
        f"{'-' if length is None else format(length, '+.2f')}; calibration error {evaluation.calibration_error:.3f} "
        f"({NUM_BINS} bins); scores {evaluation.mean:.3g} +- {evaluation.std:.3g}"
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


def _confidence(margin: float) -> float:
    return 1 / (1 + math.exp(-abs(margin)))
