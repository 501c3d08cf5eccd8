"""From the recipe's `rewards:` section to reward functions, and from their values to one total a completion.

A reward is a scorer (one completion at a time, graded in worker processes) or a batch function in TRL's convention
(called in this process). `rewards/README.md` has both forms; `rewards/grader.py` runs them.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.options import did_you_mean
from rekatrain.rewards.registry import Spec, read_signature
from rekatrain.rewards.workers.pool import LiftedScorer

# Keys of a reward that are not options of its function.
OWN_KEYS = ("weight", "timeout", "requires")


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """One reward of the recipe.

    name:     its key in the recipe
    weight:   its factor in the total; 0 means computed for the log only
    function: TRL's convention, `(prompts, completions, completion_ids, **columns) -> list[float | None]`
    columns:  the columns that the rows must have for it
    scorer:   how a worker makes it, where it judges one completion at a time
    timeout:  seconds, for each completion where it is a scorer, else for a batch; None: the recipe's `scoring:`
    requires: rewards that must give 1.0 for this one to count in the total
    """

    name: str
    weight: float
    function: Callable[..., Any]  # Any: checked when it returns; a coroutine function too
    columns: tuple[str, ...]
    scorer: Spec | None = None
    timeout: float | None = None
    requires: tuple[str, ...] = ()


def build_reward_functions(specs: Mapping[str, Mapping[str, Any] | None]) -> list[RewardFunction]:
    """The rewards of a recipe, in its order; raises InputError for what the recipe got wrong.

    >>> build_reward_functions({"math_answer": None, "my_rewards:brevity": {"weight": 0.1, "limit": 50}})
    """
    functions = [_build(name, {} if spec is None else spec, specs) for name, spec in specs.items()]
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


def total_reward(
    functions: Sequence[RewardFunction], values: Mapping[str, float | None], failed: Collection[str]
) -> float:
    """One completion's weighted sum; nan where no reward with a weight applies, or one that decides has failed.

    A reward counts 0 where one that it `requires` gives less than 1.0. One that does not apply holds nothing back.
    """
    terms = []
    for function in functions:
        if function.weight and any(name in failed for name in (function.name, *function.requires)):
            return math.nan
        value = values[function.name]
        if function.weight and value is not None:
            gates = [values[name] for name in function.requires]
            is_open = all(gate is None or gate >= 1.0 for gate in gates)
            terms.append(function.weight * value if is_open else 0.0)
    return math.fsum(terms) if terms else math.nan


def _build(name: str, spec: Mapping[str, Any], specs: Mapping[str, object]) -> RewardFunction:
    if not isinstance(spec, Mapping):
        raise InputError(f"reward {name} takes a weight and options, as in {{weight: 1.0}}, not {spec!r}")
    signature = read_signature(name)
    clashing = [option for option in signature.options if option in OWN_KEYS]
    if clashing:
        raise InputError(f"reward {name} has an option {clashing[0]}, which every reward has already: rename it")
    options = {key: value for key, value in spec.items() if key not in OWN_KEYS}
    known = [*OWN_KEYS, *signature.options]
    for option in options:
        if option not in known:
            nearest = did_you_mean(str(option), known)
            raise InputError(f"reward {name} has no option {option}{nearest}; its options are: {', '.join(known)}")
    for option in signature.required:
        if option not in options:
            raise InputError(f"reward {name} needs the option {option}: add it beside its weight")
    maker = Spec(name=name, options=options)
    made = maker.make()  # a class checks its options here
    timeout = _positive(name, "timeout", spec.get("timeout", getattr(made, "timeout", None)))
    return RewardFunction(
        name=name,
        weight=_weight(name, spec.get("weight", 1.0)),
        function=LiftedScorer(maker, signature.columns, timeout) if signature.is_scorer else made,
        columns=(*signature.columns, *getattr(made, "columns", ())),  # an option may name a column, too
        scorer=maker if signature.is_scorer else None,
        timeout=timeout,
        requires=_required_rewards(name, spec.get("requires", []), specs),
    )


def _weight(name: str, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"reward {name}: weight must be a finite number, not {weight!r}")
    return float(weight)


def _positive(name: str, key: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"reward {name}: {key} must be a number of seconds above 0, not {value!r}")
    return float(value)


def _required_rewards(name: str, required: object, specs: Mapping[str, object]) -> tuple[str, ...]:
    names = [required] if isinstance(required, str) else required
    if not isinstance(names, list) or not all(isinstance(other, str) for other in names):
        raise InputError(f"reward {name}: requires must be a reward of the recipe or a list of them, not {required!r}")
    for other in names:
        if other == name or other not in specs:
            nearest = did_you_mean(other, specs)
            raise InputError(
                f"reward {name} requires {other}, which is no other reward of the recipe{nearest}; "
                "add it, with weight 0 if it is only to be checked"
            )
    return tuple(names)
