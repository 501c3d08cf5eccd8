"""The scores of a batch of completions, combined from the outcomes of its rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rekatrain.rewards.compose import RewardFunction
from rekatrain.rewards.outcome import Outcome
from rekatrain.rewards.total import reward_terms, total_reward


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of a batch of completions.

    by_name: for each reward, one value per completion, without its weight; None if it does not apply or has failed
    total:   the weighted sum per completion; nan if every reward with a weight is None or one has failed
    terms:   for each completion, the weight and the value of each reward that counts; None if it cannot be scored
    errors:  for each completion, the rewards that failed: name -> the error as one line
    metrics: for each completion, further numbers of its rewards: name -> metric -> number
    notes:   for each completion, notes of its rewards for rollouts.jsonl: name -> a JSON value
    """

    by_name: dict[str, list[float | None]]
    total: list[float]
    terms: list[dict[str, tuple[float, float]] | None]
    errors: list[dict[str, str]]
    metrics: list[dict[str, Mapping[str, float]]]
    notes: list[dict[str, Any]]


def combine(
    functions: Sequence[RewardFunction], outcomes: Mapping[str, Sequence[Outcome]], size: int, step: int
) -> Scores:
    """Add the rewards of each completion up, with the weights of the step.

    outcomes: for each reward, an outcome per completion
    """
    by_one = [{function.name: outcomes[function.name][index] for function in functions} for index in range(size)]
    values = [{name: outcome.value for name, outcome in one.items()} for one in by_one]
    errors = [{name: outcome.error for name, outcome in one.items() if outcome.error} for one in by_one]
    both = list(zip(values, errors, strict=True))
    return Scores(
        by_name={function.name: [one[function.name] for one in values] for function in functions},
        total=[total_reward(functions, *one, step) for one in both],
        terms=[reward_terms(functions, *one, step) for one in both],
        errors=errors,
        metrics=[{name: outcome.metrics for name, outcome in one.items() if outcome.metrics} for one in by_one],
        notes=[{name: outcome.notes for name, outcome in one.items() if outcome.notes is not None} for one in by_one],
    )
