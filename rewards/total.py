"""The total of a completion: the weighted sum of its rewards, in which a reward may require others."""

import math
from collections.abc import Collection, Mapping, Sequence

from rekatrain.rewards.compose import RewardFunction
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.outcome import MAX_REWARD


def total_reward(
    functions: Sequence[RewardFunction],
    values: Mapping[str, float | None],
    failed: Collection[str],
    step: int = 0,
) -> float:
    """Return the weighted sum of one completion's rewards, or nan if the completion cannot be scored.

    A completion cannot be scored if no reward with a weight applies, or if one with a weight, or one that it requires,
    has failed. A reward counts 0 if one that it requires gives less than 1.0; a required one that does not apply is no
    obstacle. The weights are those after `step` steps.
    """
    terms = reward_terms(functions, values, failed, step)
    if terms is None:
        return math.nan
    total = math.fsum(weight * value for weight, value in terms.values())
    if abs(total) > MAX_REWARD:
        raise RewardError(
            f"the weighted rewards {[weight * value for weight, value in terms.values()]} of a completion add up to "
            f"{total:g}, which float32 cannot hold"
        )
    return total


def reward_terms(
    functions: Sequence[RewardFunction],
    values: Mapping[str, float | None],
    failed: Collection[str],
    step: int = 0,
) -> dict[str, tuple[float, float]] | None:
    """Return the weight and the value of each reward that counts for a completion; None if it cannot be scored.

    The value is 0 if a reward that it requires gives less than 1.0.
    """
    terms = {}
    for function in functions:
        weight = function.weight_at(step)
        if not weight:
            continue
        if any(name in failed for name in (function.name, *function.requires)):
            return None
        value = values[function.name]
        if value is not None:
            gates = [values[name] for name in function.requires]
            is_open = all(gate is None or gate >= 1.0 for gate in gates)
            terms[function.name] = (weight, value if is_open else 0.0)
    return terms or None
