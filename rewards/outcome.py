"""The value that a reward returns: a number, None, or a Score with metrics and notes; and the outcome of a call."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rekatrain.rewards.errors import RewardError, describe_error, show

MAX_REWARD = 3.4028234663852886e38  # the largest float32
MAX_METRICS, MAX_NAME = 16, 60
# Characters of JSON. A worker's result must fit into one message of its pipe (workers/process.py).
MAX_NOTES, MAX_WORKER_NOTES = 10_000, 1_500


@dataclass(frozen=True)
class Score:
    """A reward with more to report, which a scorer or a batch function may return in place of a number.

    value:   the reward, or None
    metrics: name -> a finite number: the mean over the step is logged as `rewards/REWARD/NAME`
    notes:   a JSON value for rollouts.jsonl, such as the reason for the score
    """

    value: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Any = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one reward for one completion.

    value:     the reward; None if it does not apply or has failed
    metrics:   further numbers, for the metrics of the step
    notes:     a JSON value for rollouts.jsonl; None if there is none
    error:     one line if the grader failed; else ""
    traceback: of that failure, if there is one
    seconds:   time in the grader
    is_late:   True if the grader reached its time limit
    is_input:  True if the grader says that the recipe or the row is wrong
    """

    value: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Any = None
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0
    is_late: bool = False
    is_input: bool = False


def read_value(value: Any, *, seconds: float = 0.0, max_notes: int = MAX_NOTES) -> Outcome:
    """Read the value that a reward returned for one completion; Any: whatever a user's function returns.

    An error as the value, and a value that is no finite number, None or Score, is a failure.
    """
    try:
        if isinstance(value, Exception):
            return Outcome(error=describe_error(value), seconds=seconds)
        score = value if isinstance(value, Score) else Score(value)
        return Outcome(
            value=check_number(score.value),
            metrics=_check_metrics(score.metrics),
            notes=limit_notes(to_json(score.notes), max_notes),
            seconds=seconds,
        )
    except Exception as error:  # not a number, or one of no finite size
        return Outcome(error=describe_error(error), seconds=seconds)


def check_number(value: Any) -> float | None:
    """Return a number as a float and None as it is; raise RewardError for any other value.

    numpy's and torch's scalars are numbers. A number must also be finite in float32, in which advantages are computed.
    """
    if value is None:
        return None
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(number, int | float) or not abs(number) <= MAX_REWARD:
        raise RewardError(f"returned {show(value)}; expected one finite number or None per completion")
    return float(number)


def check_metric(name: Any, value: Any) -> float:
    """Return a metric as a float; raise RewardError for a name that is no short text and for any other value."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise RewardError(f"the name of a metric is {show(name)}; expected text of 1 to {MAX_NAME} characters")
    try:
        number = check_number(value)
    except RewardError:
        number = None
    if number is None:
        raise RewardError(f"the metric {name} is {show(value)}; expected a finite number")
    return number


def to_json(value: Any) -> Any:
    """Return the nearest JSON value: arrays as lists, and text in place of whatever JSON cannot hold.

    >>> to_json({1: (float("inf"), None)})
    {'1': ['inf', None]}
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]
    return to_json(value.tolist()) if hasattr(value, "tolist") else str(value)


def limit_notes(notes: Any, limit: int) -> Any:
    """Return notes, which are cut, as text with an ellipsis, if they have more than `limit` characters of JSON."""
    if len(json.dumps(notes)) <= limit:
        return notes
    text = notes if isinstance(notes, str) else json.dumps(notes, ensure_ascii=False)
    text = text[:limit]
    while len(json.dumps(text)) > limit:  # a character has up to 12 in JSON
        text = text[: len(text) * 3 // 4]
    return f"{text}..."


def _check_metrics(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping) or len(metrics) > MAX_METRICS:
        raise RewardError(
            f"the metrics of a score are {show(metrics)}; expected names with numbers, at most {MAX_METRICS}"
        )
    return {name: check_metric(name, value) for name, value in metrics.items()}
