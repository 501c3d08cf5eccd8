"""How well a reward model tells held-out pairs apart, beside what their lengths alone would tell.

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
from rekatrain.data.errors import InputError
from rekatrain.rewards.models.classifier import classify
from rekatrain.trainer.evaluate import Accuracy, wilson_interval
from rekatrain.trainer.models import Policy
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.reward_model.model import check_reward_model, load_reward_model, load_reward_tokenizer
from rekatrain.trainer.reward_model.pairs import Pair, leave_out_trained, load_pairs
from transformers import PreTrainedModel

NUM_BINS = 10
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs whose confidence lies in [low, high): how many, how sure the model is of them, how often it is right."""

    low: float
    high: float
    num_pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class RewardEvaluation:
    """What held-out pairs say of a reward model.

    accuracy:           share of pairs whose chosen answer scores higher, with its Wilson 95 % interval
    longer_wins:        the same for a judge who prefers the answer with more tokens; equal lengths count half
    length_correlation: Pearson's, of score and number of tokens over all answers; None where either is constant
    calibration_error:  expected calibration error (Guo et al., arXiv 1706.04599): mean of |confidence - accuracy| over
                        `bins`, weighted by their pairs. The confidence in the answer that scores higher is
                        sigmoid(|margin|), so the ten bins of equal width divide [0.5, 1]
    mean, std:          of all scores, of chosen and rejected answers alike
    """

    accuracy: Accuracy
    longer_wins: float
    length_correlation: float | None
    calibration_error: float
    bins: list[Bin]
    mean: float
    std: float


def evaluate_pairs(model: Policy, pairs: Sequence[Pair]) -> RewardEvaluation:
    """Score the pairs where the model is; leaves it in evaluation mode."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    # Under an adapter, the base model holds the adapter's layers.
    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(classifier, PreTrainedModel)
    scores = classify(classifier.eval(), rows, micro_batch_tokens=MICRO_BATCH_TOKENS)[:, 0].tolist()
    lengths = [len(row.input_ids) for row in rows]
    return judge_scores(scores[: len(pairs)], scores[len(pairs) :], lengths[: len(pairs)], lengths[len(pairs) :])


def judge_scores(
    chosen: Sequence[float], rejected: Sequence[float], chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]
) -> RewardEvaluation:
    """The evaluation of pairs with these scores and lengths; equal scores count as wrong."""
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    longer = [math.copysign(1, a - b) if a != b else 0.0 for a, b in zip(chosen_lengths, rejected_lengths, strict=True)]
    scores, lengths = [*chosen, *rejected], [*chosen_lengths, *rejected_lengths]
    varies = len(set(scores)) > 1 and len(set(lengths)) > 1
    bins = calibration_bins(margins)
    return RewardEvaluation(
        accuracy=wilson_interval(num_right=sum(margin > 0 for margin in margins), num_graded=len(margins)),
        longer_wins=(1 + fmean(longer)) / 2,
        length_correlation=correlation(scores, lengths) if varies else None,
        calibration_error=sum(each.num_pairs * abs(each.confidence - each.accuracy) for each in bins) / len(margins),
        bins=bins,
        mean=fmean(scores),
        std=pstdev(scores),
    )


def calibration_bins(margins: Sequence[float]) -> list[Bin]:
    """The bins that hold a pair, by the confidence sigmoid(|margin|) in the answer that scores higher.

    >>> [(each.low, each.num_pairs, each.accuracy) for each in calibration_bins([0.0, 0.1, -0.1, 9.0])]
    [(0.5, 3, 0.3333333333333333), (0.95, 1, 1.0)]
    """
    members: dict[int, list[float]] = {}
    for margin in margins:
        place = int((_confidence(margin) - 0.5) * 2 * NUM_BINS)
        members.setdefault(min(place, NUM_BINS - 1), []).append(margin)
    width = 0.5 / NUM_BINS
    return [
        Bin(
            low=0.5 + place * width,
            high=0.5 + (place + 1) * width,
            num_pairs=len(held),
            confidence=fmean(_confidence(margin) for margin in held),
            accuracy=fmean(margin > 0 for margin in held),
        )
        for place, held in sorted(members.items())
    ]


def show_evaluation(evaluation: RewardEvaluation, name: str) -> None:
    """Print it for a person."""
    print(f"{name}: {describe_evaluation(evaluation)}")


def describe_evaluation(evaluation: RewardEvaluation, pairs: str = "held-out pairs") -> str:
    """The measures in one line; `pairs` says which pairs they are of."""
    right = evaluation.accuracy
    length = evaluation.length_correlation
    return (
        f"accuracy {right.accuracy:.1%} [{right.low:.1%}, {right.high:.1%}] of {right.num_graded} {pairs}; "
        f"the longer answer wins {evaluation.longer_wins:.1%}; score and length correlate "
        f"{'-' if length is None else format(length, '+.2f')}; calibration error {evaluation.calibration_error:.3f} "
        f"({NUM_BINS} bins of confidence); scores {evaluation.mean:.3g} +- {evaluation.std:.3g}"
    )


def evaluate(recipe: Recipe, *, out: Path | None = None) -> RewardEvaluation:
    """Judge the recipe's model, an export or a run, on the held-out pairs; print the result, and write it to `out`."""
    if recipe.eval_dataset is None:
        raise InputError("the recipe has no eval_dataset section: name the held-out preferences there")
    tokenizer = load_reward_tokenizer(recipe)
    context = check_reward_model(recipe, tokenizer)
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
