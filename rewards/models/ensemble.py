"""Rewards of several reward models that judge the same answers, against over-optimization of one of them.

A policy learns the mistakes of a reward model. The minimum of several is high only where all of them agree; the mean is
less noisy (Coste et al., "Reward model ensembles help mitigate overoptimization", arXiv 2310.02743).
"""

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Literal

from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.outcome import Score

Ensemble = Literal["mean", "minimum"]
Values = Sequence[float | None | RewardError | Score]


def combine_members(members: Sequence[Values], ensemble: Ensemble) -> list[Score | RewardError]:
    """Return the mean or the minimum of the members' rewards per answer; their deviation is the metric `uncertainty`.

    An answer that one of them cannot score is an error.

    >>> combine_members([[1.0], [3.0]], "minimum")
    [Score(value=1.0, metrics={'uncertainty': 1.0}, notes=[1.0, 3.0])]
    """
    combined: list[Score | RewardError] = []
    for values in zip(*members, strict=True):
        numbers = [value for value in values if isinstance(value, float)]
        if len(numbers) < len(values):
            error = next(value for value in values if not isinstance(value, float))
            combined.append(error if isinstance(error, RewardError) else RewardError(f"a member gave {error}"))
            continue
        value = fmean(numbers) if ensemble == "mean" else min(numbers)
        combined.append(Score(value, {"uncertainty": pstdev(numbers)}, notes=numbers))
    return combined
