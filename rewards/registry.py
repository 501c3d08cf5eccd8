"""From the name of a reward to something callable, and what its signature says it needs.

The training process and its workers both look rewards up here: only names and options travel between them, never code.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.options import did_you_mean

# The built-in rewards: name in a recipe -> where it is. As text: a reward that no recipe names is not imported.
REWARDS: dict[str, str] = {
    "math_answer": "rekatrain.rewards.scorers.math_answer:math_answer",
    "exact_match": "rekatrain.rewards.scorers.answers:exact_match",
    "numeric_close": "rekatrain.rewards.scorers.answers:numeric_close",
    "multiple_choice": "rekatrain.rewards.scorers.answers:multiple_choice",
    "regex": "rekatrain.rewards.scorers.answers:Regex",
    "json_schema": "rekatrain.rewards.scorers.answers:JsonSchema",
    "reasoning_gym": "rekatrain.rewards.scorers.answers:reasoning_gym",
    "code_tests": "rekatrain.rewards.code.code_tests:CodeTests",
    "reward_model": "rekatrain.rewards.models.local:RewardModel",
    "remote_reward_model": "rekatrain.rewards.models.remote:RemoteRewardModel",
    "judge": "rekatrain.rewards.models.judge:Judge",
    "instruction_following": "rekatrain.rewards.scorers.instructions:InstructionFollowing",
    "reasoning_format": "rekatrain.rewards.scorers.text:reasoning_format",
    "length": "rekatrain.rewards.scorers.text:Length",
    "repetition": "rekatrain.rewards.scorers.text:repetition",
    "language": "rekatrain.rewards.scorers.text:Language",
}

# What TRL's convention gives every batch function besides the columns.
BATCH_ARGUMENTS = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a reward takes.

    is_scorer: whether it judges one completion, else it is a batch function in TRL's convention
    columns:   columns that every row must have for it
    options:   what a recipe may set
    required:  those of them that it must set
    """

    is_scorer: bool
    columns: tuple[str, ...]
    options: tuple[str, ...]
    required: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A reward as a recipe writes it: enough to make it in any process."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)  # Any: a YAML value, checked by the reward

    def make(self) -> Callable[..., Any]:  # Any: checked when it returns
        """The reward with its options, ready to be called with a completion or a batch, and with columns."""
        target = find(self.name)
        if isinstance(target, type):
            return target(**self.options)
        return partial(target, **self.options) if self.options else target


def find(name: str) -> Callable[..., Any]:
    """The function or class behind a name of the table or `module:name`; InputError where there is none."""
    module_name, _, attribute = REWARDS.get(name, name).partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        known = ", ".join(REWARDS)
        raise InputError(
            f"there is no reward {name}{did_you_mean(name, REWARDS)}; the built-in ones are: {known}; "
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
    found = getattr(module, attribute, None)
    if not callable(found):
        nearest = did_you_mean(attribute, vars(module))
        raise InputError(f"reward {name}: {module_name} has no function {attribute}{nearest}")
    return found


def read_signature(name: str) -> Signature:
    """What the reward takes; InputError where it has neither of the two forms."""
    target = find(name)
    is_class = isinstance(target, type)
    called = inspect.signature(getattr(target, "__call__") if is_class else target).parameters  # noqa: B004, B009
    parameters = list(called.values())[1:] if is_class else list(called.values())
    names = [parameter.name for parameter in parameters]
    takes_all_columns = any(p.kind is p.VAR_KEYWORD for p in parameters)
    is_scorer = names[:1] == ["completion"]
    if not is_scorer and not ("completions" in names and takes_all_columns):
        raise InputError(
            f"reward {name} has the parameters ({', '.join(names)}); a scorer's first parameter is completion, "
            "and a TRL reward function takes completions and **kwargs"
        )
    given = ("completion",) if is_scorer else BATCH_ARGUMENTS
    named = [p for p in parameters if p.name not in given and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    columns = tuple(p.name for p in named if p.default is p.empty)
    if not is_class:
        options = tuple(p.name for p in named if p.default is not p.empty)
        return Signature(is_scorer=is_scorer, columns=columns, options=options, required=())
    settings = inspect.signature(target).parameters.values()
    return Signature(
        is_scorer=is_scorer,
        columns=columns,
        options=tuple(p.name for p in settings),
        required=tuple(p.name for p in settings if p.default is p.empty),
    )
