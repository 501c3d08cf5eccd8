"""Accuracy and means with their 95 % intervals, and pass@k: functions of numbers alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rekatrain.data.errors import InputError

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Right answers among the graded ones, and the Wilson 95 % interval of their fraction."""

    num_right: float
    num_graded: int
    accuracy: float
    low: float
    high: float


def wilson_interval(*, num_right: float, num_graded: int) -> Accuracy:
    """Return the Wilson score interval at 95 % (Wilson 1927), which stays inside [0, 1] and holds for small counts.

    `num_right` may have a fraction, as the expected number of right majorities has; the interval is then a little wide.

    >>> interval = wilson_interval(num_right=5, num_graded=10)
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.2366, 0.7634)
    """
    if num_graded == 0:
        raise InputError("no held-out answer could be graded: the reward was None for all of them")
    z = 1.959963984540054
    fraction = num_right / num_graded
    center = fraction + z * z / (2 * num_graded)
    spread = z * math.sqrt(fraction * (1 - fraction) / num_graded + z * z / (4 * num_graded**2))
    scale = 1 + z * z / num_graded
    # At fractions of 0 and 1 one end is the fraction itself, which rounding would miss.
    low, high = min((center - spread) / scale, fraction), max((center + spread) / scale, fraction)
    return Accuracy(num_right=num_right, num_graded=num_graded, accuracy=fraction, low=low, high=high)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of independent values by the percentile bootstrap, always the same one.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    sample = np.asarray(values, dtype=float)
    generator = np.random.default_rng(0)
    # In parts: all draws at once would take 80 MB for 1,000 values.
    means = np.concatenate([generator.choice(sample, (RESAMPLES // 10, len(sample))).mean(axis=1) for _ in range(10)])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """Return the chance that k of a prompt's answers, drawn without replacement, contain a right one.

    It is 1 - C(n - c, k) / C(n, k), an unbiased estimate of the chance for k fresh answers (Chen et al.,
    arXiv 2107.03374).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def pass_rates(scores: Sequence[Sequence[float | None]]) -> dict[int, float]:
    """Return pass@1, 2, 4 and so on, up to the number of answers per prompt.

    Each is the mean over the prompts that have at least so many graded answers.

    scores: per prompt, the deciding reward of each answer: 1.0 is right, None is not graded
    """
    counts = [(sum(value is not None for value in values), values.count(1.0)) for values in scores]
    return {
        k: fmean(pass_at_k(num_answers, num_right, k) for num_answers, num_right in counts if num_answers >= k)
        for k in powers_of_two(max(num_answers for num_answers, _ in counts))
    }


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4 and so on, and the largest number itself.

    >>> powers_of_two(6)
    [1, 2, 4, 6]
    """
    return sorted({*(2**exponent for exponent in range(most.bit_length())), most} - {0})
