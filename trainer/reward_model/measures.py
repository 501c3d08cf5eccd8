"""Measurements of a reward model from the scores of pairs: functions of numbers alone, and their tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import correlation, fmean, pstdev

from rekatrain.trainer.intervals import Accuracy, wilson_interval

NUM_BINS = 10
BAR = 40  # characters of a bar of the plot


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs with a confidence in [low, high): number, mean confidence, mean |margin| and fraction ranked right."""

    low: float
    high: float
    num_pairs: int
    confidence: float
    margin: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class RewardEvaluation:
    """Measurements of a reward model on held-out pairs.

    accuracy:           fraction of pairs whose chosen answer scores higher, with its 95 % Wilson interval
    by_source:          the same for each source, or subset of a benchmark
    by_row:             the same for rows: right if the chosen answer scores above all rejected ones of the row
    longer_wins:        fraction of pairs whose chosen answer has more tokens; equal lengths count half
    if_longer:          accuracy on the pairs whose chosen answer is longer; None without any
    if_shorter:         accuracy where it is shorter: a model that counts tokens is right there in no pair
    length_correlation: Pearson's, of score and number of tokens over all answers; None if either is constant
    calibration_error:  expected calibration error (Guo et al., arXiv 1706.04599): mean of |confidence - accuracy| over
                        `bins`, weighted by their number of pairs. The confidence in the answer that scores higher
                        is sigmoid(|margin|), so ten bins of equal width divide [0.5, 1]
    mean, std:          of the scores of all answers, chosen and rejected
    """

    accuracy: Accuracy
    by_source: dict[str, Accuracy]
    by_row: Accuracy
    longer_wins: float
    if_longer: Accuracy | None
    if_shorter: Accuracy | None
    length_correlation: float | None
    calibration_error: float
    bins: list[Bin]
    mean: float
    std: float


def summarize_scores(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    *,
    sources: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> RewardEvaluation:
    """Evaluate pairs from their scores and lengths in tokens; equal scores count as wrong.

    sources: of each pair, if they have names
    rows:    a name for each pair, the same for the pairs of one row; without them each pair is a row
    """
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    longer = [math.copysign(1, a - b) if a != b else 0.0 for a, b in zip(chosen_lengths, rejected_lengths, strict=True)]
    scores, lengths = [*chosen, *rejected], [*chosen_lengths, *rejected_lengths]
    is_defined = len(set(scores)) > 1 and len(set(lengths)) > 1
    bins = calibration_bins(margins)
    is_right = [margin > 0 for margin in margins]
    by_source, by_row = (
        _grouped(is_right, sources),
        _grouped(is_right, rows or [str(number) for number in range(len(margins))]),
    )
    return RewardEvaluation(
        accuracy=_accuracy(is_right),
        by_source={name: _accuracy(of_source) for name, of_source in sorted(by_source.items()) if name},
        by_row=_accuracy([all(of_row) for of_row in by_row.values()]),
        if_longer=_accuracy_where(is_right, [sign > 0 for sign in longer]),
        if_shorter=_accuracy_where(is_right, [sign < 0 for sign in longer]),
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
            margin=fmean(abs(margin) for margin in inside),
            accuracy=fmean(margin > 0 for margin in inside),
        )
        for index, inside in sorted(members.items())
    ]


def show_evaluation(evaluation: RewardEvaluation, name: str) -> None:
    """Print the evaluation as one line after the model's name, and its tables."""
    print(f"{name}: {describe_evaluation(evaluation)}")
    print(evaluation_tables(evaluation))


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


def evaluation_tables(evaluation: RewardEvaluation) -> str:
    """Return the tables: length bias, accuracy by source, and a plot of the accuracy over the confidence.

    A calibrated model is as often right as it is confident: its bar ends at the mark.
    """
    lines = []
    longer, shorter = evaluation.if_longer, evaluation.if_shorter
    if longer is not None and shorter is not None:
        lines.append(
            f"  length bias: accuracy {longer.accuracy:.1%} of {longer.num_graded} pairs whose chosen answer is longer "
            f"and {shorter.accuracy:.1%} of {shorter.num_graded} where it is shorter"
        )
    if evaluation.by_row.num_graded < evaluation.accuracy.num_graded:
        row = evaluation.by_row
        lines.append(f"  rows: chosen above every rejected answer in {row.accuracy:.1%} of {row.num_graded}")
    if len(evaluation.by_source) > 1:
        width = max(len(name) for name in evaluation.by_source)
        for name, accuracy in evaluation.by_source.items():
            interval = f"[{accuracy.low:.1%}, {accuracy.high:.1%}]"
            lines.append(f"  {name:{width}}  {accuracy.accuracy:6.1%} {interval} of {accuracy.num_graded}")
        lines.append(f"  mean of the sources: {fmean(one.accuracy for one in evaluation.by_source.values()):.1%}")
    lines.append("  confidence   pairs  |margin|  accuracy  (| marks the confidence)")
    for each in evaluation.bins:
        mark, end = round(BAR * each.confidence), round(BAR * each.accuracy)
        bar = "".join("|" if place == mark else "#" if place < end else " " for place in range(BAR + 1))
        numbers = f"{each.num_pairs:5}  {each.margin:8.3f}  {each.accuracy:8.1%}"
        lines.append(f"  {each.low:.2f} - {each.high:.2f}  {numbers}  {bar}".rstrip())
    return "\n".join(lines)


def _accuracy(is_right: Sequence[bool]) -> Accuracy:
    return wilson_interval(num_right=sum(is_right), num_graded=len(is_right))


def _accuracy_where(is_right: Sequence[bool], is_counted: Sequence[bool]) -> Accuracy | None:
    counted = [right for right, is_in in zip(is_right, is_counted, strict=True) if is_in]
    return _accuracy(counted) if counted else None


def _grouped(is_right: Sequence[bool], names: Sequence[str]) -> dict[str, list[bool]]:
    groups: dict[str, list[bool]] = {}
    for right, name in zip(is_right, names, strict=False):
        groups.setdefault(name, []).append(right)
    return groups


def _confidence(margin: float) -> float:
    return 1 / (1 + math.exp(-abs(margin)))
