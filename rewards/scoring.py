"""The `scoring:` section of a recipe, and the scores of a batch of completions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import FiniteFloat

from rekatrain.data.ranges import Fraction, Seconds


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """The `scoring:` section of a recipe: how its rewards are run.

    num_workers:     worker processes per training process; None: one per core, at most 16
    timeout:         seconds per completion and scorer, after which the worker is killed; a reward can have its own
    batch_timeout:   seconds per batch function; a plain function that takes longer ends the run
    memory_limit_gb: address space of a worker, in GiB
    max_error_share: fraction of a reward's last 512 completions that may fail before the run stops
    environment:     names of variables that the workers get beside the allowed ones, such as the key of a user's scorer
    """

    num_workers: Annotated[int, Ge(1), Le(4096)] | None = None
    timeout: Seconds = 2.0
    batch_timeout: Seconds = 600.0
    memory_limit_gb: Annotated[FiniteFloat, Gt(0), Le(10**6)] = 4.0
    max_error_share: Fraction = 0.2
    environment: list[str] = field(default_factory=list)


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
