"""Build the reward functions of a recipe's `rewards:` section.

A reward is a scorer (one completion at a time, in worker processes) or a batch function in TRL's convention (called in
this process). `rewards/README.md` describes both forms; `rewards/grader.py` runs them.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal

from annotated_types import Len, MinLen

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keys, check_type, check_types, did_you_mean
from rekatrain.data.ranges import CountOrZero, Seconds, SignedWeight
from rekatrain.rewards.gold import GOLDS
from rekatrain.rewards.progress import Schedule
from rekatrain.rewards.registry import Signature, Spec, Unresolved, find, read_signature
from rekatrain.rewards.workers.pool import LiftedScorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OwnKeys:
    """The keys that every reward has beside the options of its function."""

    weight: SignedWeight | list[tuple[int, float]] = 1.0
    timeout: Seconds | None = None
    requires: str | list[str] = field(default_factory=list)
    on_timeout: Literal["error", "zero"] = "error"
    conversational: bool | None = None


WeightByStep = Annotated[list[Annotated[list[Any], Len(2, 2)]], MinLen(1)]
OWN_KEYS = tuple(key.name for key in fields(OwnKeys))


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """One reward of the recipe.

    name:     its key in the recipe
    weight:   its factor in the total at the first step; a reward of weight 0 is only logged
    schedule: its factor by the number of steps; None: `weight` at every step
    function: a function in TRL's convention, `(prompts, completions, completion_ids, **columns) -> list[float | None]`
    columns:  columns that the rows must have
    scorer:   for a scorer, the name and options by which a worker makes it; None for a batch function
    timeout:  seconds, per completion of a scorer or per batch of a batch function; None: that of `scoring:`
    requires: rewards that must give 1.0 for this one to count in the total
    on_timeout: "error", or "zero" for a scorer whose time limit is part of the task
    check_row: raises InputError for the columns of a row that it cannot read; None if it reads any
    conversational: True if a batch function takes completions as messages, False as text, None if it is to be found out
    gold:     makes a right answer from the columns of a row (gold.py); None if the reward has none
    row_timeout: seconds of a completion by the columns of its row, in place of `timeout`, where the recipe sets none
    """

    name: str
    weight: float
    function: Callable[..., Any]  # Any: checked when it returns; a coroutine function too
    columns: tuple[str, ...]
    scorer: Spec | None = None
    timeout: float | None = None
    requires: tuple[str, ...] = ()
    on_timeout: Literal["error", "zero"] = "error"
    check_row: Callable[..., None] | None = None
    schedule: Schedule | None = None
    conversational: bool | None = None
    gold: Callable[..., str | None] | None = None
    row_timeout: Callable[..., float] | None = None

    def seconds_for(self, columns: Mapping[str, Any]) -> float | None:
        """Return the time limit of a completion to a row with these columns; None: that of `scoring:`."""
        return self.timeout if self.row_timeout is None else self.row_timeout(**columns)

    def weight_at(self, step: int) -> float:
        """Return its factor in the total after `step` steps."""
        return self.weight if self.schedule is None else self.schedule.at(step)

    @property
    def is_counted(self) -> bool:
        """True if it has a weight other than 0 at some step."""
        return bool(self.weight) if self.schedule is None else not self.schedule.is_zero


def build_reward_functions(specs: Mapping[str, Mapping[str, Any] | None]) -> list[RewardFunction]:
    """Return the rewards of a recipe, in its order; raise InputError if a name, an option or a value is wrong.

    >>> build_reward_functions({"math_answer": None, "my_rewards:brevity": {"weight": 0.1, "limit": 50}})
    """
    functions = [_build(name, {} if spec is None else spec, specs) for name, spec in specs.items()]
    if not any(function.is_counted for function in functions):
        weights = {function.name: function.weight for function in functions}
        raise InputError(
            f"rewards: at least one reward must have a weight other than 0; the recipe has {weights or None}"
        )
    return functions


def _build(name: str, spec: Mapping[str, Any], specs: Mapping[str, object]) -> RewardFunction:
    if not isinstance(spec, Mapping):
        raise InputError(f"rewards.{name} is {spec!r}; it should be a weight and options, as in {{weight: 1.0}}")
    signature = read_signature(name)
    _check_options(name, spec, signature)
    own = OwnKeys(**{key: value for key, value in spec.items() if key in OWN_KEYS})
    maker = Spec(name=name, options={key: value for key, value in spec.items() if key not in OWN_KEYS})
    try:
        made = maker.make()  # a class checks here what its annotations cannot say
    except InputError as error:
        raise InputError(f"rewards.{name}: {error}") from error
    except SystemExit as error:
        raise InputError(
            f"rewards.{name}: its __init__ called sys.exit({error.code!r}); raise InputError there"
        ) from error
    if own.on_timeout != "error" and not signature.is_scorer:
        raise InputError(
            f"rewards.{name}.on_timeout is {own.on_timeout!r}, but {name} scores a whole batch: its time limit is no "
            "fault of one completion; take the key out"
        )
    if own.conversational is not None and signature.is_scorer:
        raise InputError(
            f"rewards.{name}.conversational is {own.conversational}, but {name} is a scorer, which gets a "
            "ParsedCompletion: take the key out"
        )
    timeout = own.timeout or getattr(made, "timeout", None)
    schedule = Schedule.read(own.weight)
    if not schedule.is_increasing:
        raise InputError(
            f"rewards.{name}.weight is {own.weight}; write [step, weight] pairs in the order of their steps, each once"
        )
    return RewardFunction(
        name=name,
        weight=schedule.at(0),
        schedule=None if schedule.is_constant else schedule,
        function=LiftedScorer(maker, signature.columns, timeout) if signature.is_scorer else made,
        columns=(*signature.columns, *getattr(made, "columns", ())),  # an option may name a column, too
        scorer=maker if signature.is_scorer else None,
        timeout=None if timeout is None else float(timeout),
        requires=_find_required(name, own.requires, specs),
        on_timeout=own.on_timeout,
        check_row=getattr(made, "check_row", None),
        conversational=own.conversational,
        row_timeout=None if own.timeout else getattr(made, "row_timeout", None),
        gold=getattr(made, "gold", None) or getattr(find(name), "gold", None) or GOLDS.get(name),
    )


def _check_options(name: str, spec: Mapping[str, Any], signature: Signature) -> None:
    """Raise InputError for an option that is unknown, missing or of the wrong type."""
    prefix = f"rewards.{name}."
    for option in signature.options:
        if option in OWN_KEYS:
            raise InputError(f"reward {name} has an option {option}, which every reward has already: rename it")
    for key in spec:
        if key in signature.columns and key not in signature.options:
            raise InputError(f"{prefix}{key} is a column of the rows and not an option; take it out of the recipe")
    check_keys(prefix, spec, [*OWN_KEYS, *signature.options], required=signature.required)
    weight = spec.get("weight", 1.0)
    if isinstance(weight, list):
        check_type(f"{prefix}weight", weight, WeightByStep)
        for number, (step, value) in enumerate(weight):
            check_type(f"{prefix}weight.{number}.0", step, CountOrZero)
            check_type(f"{prefix}weight.{number}.1", value, SignedWeight)
    else:
        check_type(f"{prefix}weight", weight, SignedWeight)
    check_types(prefix, {key: value for key, value in spec.items() if key in OWN_KEYS and key != "weight"}, OwnKeys)
    for key, value in spec.items():
        is_default = value is None and key in signature.optional  # `limit: int = None` is not annotated with None
        if key in signature.options and not is_default:
            _check_option(f"{prefix}{key}", value, signature.options[key])


def _check_option(name: str, value: object, hint: Any) -> None:  # a type form
    if isinstance(hint, Unresolved):
        _warn_unchecked(name, hint.reason)
        return
    try:
        check_type(name, value, hint)
    except InputError:
        raise
    except Exception as error:  # pydantic raises several unrelated classes for what it cannot read as a type
        _warn_unchecked(name, f"{type(error).__name__}: {str(error).splitlines()[0]}")


@cache  # a recipe's rewards are built more than once
def _warn_unchecked(name: str, reason: str) -> None:
    logger.warning("%s: its value is not checked, for its annotation cannot be read (%s)", name, reason)


def _find_required(name: str, required: str | list[str], specs: Mapping[str, object]) -> tuple[str, ...]:
    names = [required] if isinstance(required, str) else required
    for other in names:
        if other == name or other not in specs:
            nearest = did_you_mean(other, [known for known in specs if known != name])
            raise InputError(
                f"rewards.{name}.requires is {required!r}: {other} is no other reward of the recipe{nearest}; "
                "add it, with weight 0 if it is only to be checked"
            )
    return tuple(names)
