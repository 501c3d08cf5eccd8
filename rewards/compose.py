"""From the recipe's `rewards:` section to one total a completion.

A reward of the recipe is a scorer of this package or of the user (one completion at a time, see `rewards/rules.py`),
or a TRL reward function (a whole batch). Both become functions in TRL's calling convention, are called one after
another, and are summed by weight.
"""

import importlib
import inspect
import math
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from data.chat import parse_completion
from data.errors import InputError
from rewards.rules import math_answer, reasoning_format, reasoning_gym

Scorer = Callable[..., float | None]

SCORERS: dict[str, Scorer] = {
    "math_answer": math_answer,
    "reasoning_format": reasoning_format,
    "reasoning_gym": reasoning_gym,
}

# What TRL's convention gives every reward function besides the columns.
BATCH_ARGUMENTS = ("prompts", "completions", "completion_ids")


class RewardError(RuntimeError):
    """A reward function raised: the grader is broken, which says nothing about the completion."""


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """One reward of the recipe.

    name:     its key in the recipe
    weight:   its factor in the total; 0 means computed for the log only
    function: TRL's convention, `(prompts, completions, completion_ids, **columns) -> list[float | None]`
    columns:  the columns that the rows must have for it
    """

    name: str
    weight: float
    function: Callable[..., Sequence[float | None]]
    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a batch of completions earned.

    by_name: for each reward, one value a completion, unweighted; None where it does not apply
    total:   the weighted sum of each completion, nan where every reward with a weight is None
    """

    by_name: dict[str, list[float | None]]
    total: list[float]


def build_reward_functions(specs: Mapping[str, Mapping[str, Any] | None]) -> list[RewardFunction]:
    """The rewards of a recipe, in its order; raises InputError for what the recipe got wrong.

    >>> build_reward_functions({"math_answer": None, "my_rewards:brevity": {"weight": 0.1, "limit": 50}})
    """
    functions = [_build(name, {} if spec is None else spec) for name, spec in specs.items()]
    if not any(function.weight for function in functions):
        weights = {function.name: function.weight for function in functions}
        raise InputError(
            f"rewards: at least one reward must have a weight other than 0; the recipe has {weights or None}"
        )
    return functions


def check_columns(functions: Sequence[RewardFunction], column_names: Collection[str]) -> None:
    """Raise InputError where the rows lack a column that a reward needs; needs no model, so call it first."""
    for function in functions:
        for column in function.columns:
            if column not in column_names:
                known = ", ".join(sorted(column_names)) or "none"
                raise InputError(
                    f"reward {function.name} needs the column {column}, which the rows do not have (columns: {known}); "
                    "add it to the data or take the reward out of the recipe"
                )


def score_completions(
    functions: Sequence[RewardFunction],
    *,
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    columns: dict[str, list[Any]],
) -> Scores:
    """Score each completion by each reward; all lists have one entry a completion.

    Raises RewardError where a reward function raises, InputError where it returns something else than its values.
    """
    check_columns(functions, columns)
    by_name: dict[str, list[float | None]] = {}
    for reward in functions:
        try:
            returned = reward.function(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
            )
        except Exception as error:
            raise RewardError(f"reward {reward.name} failed: {type(error).__name__}: {error}") from error
        by_name[reward.name] = _check_returned(reward.name, returned, len(completions))
    total = [
        _weighted_sum((function.weight, by_name[function.name][index]) for function in functions)
        for index in range(len(completions))
    ]
    return Scores(by_name=by_name, total=total)


def _build(name: str, spec: Mapping[str, Any]) -> RewardFunction:
    if not isinstance(spec, Mapping):
        raise InputError(f"reward {name} takes a weight and options, as in {{weight: 1.0}}, not {spec!r}")
    options = dict(spec)
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"reward {name}: weight must be a finite number, not {weight!r}")
    function = SCORERS[name] if name in SCORERS else _load(name)
    parameters = inspect.signature(function).parameters
    is_scorer = next(iter(parameters), None) == "completion"
    takes_all_columns = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not is_scorer and not ("completions" in parameters and takes_all_columns):
        raise InputError(
            f"reward {name} has the parameters ({', '.join(parameters)}); a scorer's first parameter is completion, "
            "and a TRL reward function takes completions and **kwargs"
        )
    given = ("completion",) if is_scorer else BATCH_ARGUMENTS
    named = [p for p in parameters.values() if p.name not in given and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    columns = tuple(p.name for p in named if p.default is p.empty)
    known_options = [p.name for p in named if p.default is not p.empty]
    for option in options:
        if option not in known_options:
            known = ", ".join(["weight", *known_options])
            nearest = _did_you_mean(option, ["weight", *known_options])
            raise InputError(f"reward {name} has no option {option}{nearest}; its options are: {known}")
    bound: Callable[..., Any] = partial(function, **options)  # Any: checked when it returns
    in_trl_convention = partial(_score_each, bound, columns) if is_scorer else bound
    return RewardFunction(name=name, weight=float(weight), function=in_trl_convention, columns=columns)


def _load(name: str) -> Callable[..., Any]:
    """The user's function `module:function`; the module is found as an installed one or in the current directory."""
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        known = ", ".join(SCORERS)
        raise InputError(
            f"there is no reward {name}{_did_you_mean(name, SCORERS)}; the built-in ones are: {known}; "
            "your own is written module:function"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: a file of the user's must not shadow an installed module
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The user's module may be there and itself import one that is not: that error says more than ours.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"reward {name}: no module {module_name} in the current directory or installed; "
            "run from the folder that holds it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        nearest = _did_you_mean(function_name, vars(module))
        raise InputError(f"reward {name}: {module_name} has no function {function_name}{nearest}")
    return function


def _did_you_mean(word: str, known: Collection[str]) -> str:
    nearest = get_close_matches(word, known, n=1)
    return f", did you mean {nearest[0]}?" if nearest else ""


def _score_each(
    scorer: Scorer,
    column_names: tuple[str, ...],
    /,  # so that a column may have one of these names
    *,
    completions: Sequence[str],
    **columns: Sequence[Any],
) -> list[float | None]:
    """A scorer in TRL's convention: each completion is parsed and judged with its own values of the columns."""
    return [
        scorer(parse_completion(completion), **{name: columns[name][index] for name in column_names})
        for index, completion in enumerate(completions)
    ]


def _check_returned(name: str, returned: Any, num_completions: int) -> list[float | None]:
    """What a reward function returned as floats and None; arrays and tensors of one dimension are lists too."""
    expected = f"expected a list of {num_completions}, one finite number or None a completion"
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InputError(f"reward {name} returned {type(returned).__name__} {reprlib.repr(returned)}; {expected}")
    if len(values) != num_completions:
        raise InputError(f"reward {name} returned {len(values)} values; {expected}")
    return [None if value is None else _check_number(name, value, expected) for value in values]


def _check_number(name: str, value: Any, expected: str) -> float:
    number = value.item() if getattr(value, "ndim", None) == 0 else value  # a numpy or torch scalar
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise InputError(f"reward {name} returned the value {reprlib.repr(value)}; {expected}")
    return float(number)


def _weighted_sum(weighted_values: Iterable[tuple[float, float | None]]) -> float:
    terms = [weight * value for weight, value in weighted_values if weight and value is not None]
    return math.fsum(terms) if terms else math.nan
