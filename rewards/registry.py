"""Look a reward up by its name, and read from its signature which columns and options it takes.

The training process and its workers both look rewards up here: only names and options travel between them, never code.
"""

import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.options import did_you_mean

# The built-in rewards: name in a recipe -> module and attribute. Text, so that a recipe imports only its own rewards.
REWARDS: dict[str, str] = {
    "math_answer": "rekatrain.rewards.scorers.math_answer:math_answer",
    "exact_match": "rekatrain.rewards.scorers.answers:exact_match",
    "numeric_close": "rekatrain.rewards.scorers.answers:numeric_close",
    "multiple_choice": "rekatrain.rewards.scorers.answers:multiple_choice",
    "regex": "rekatrain.rewards.scorers.answers:Regex",
    "json_schema": "rekatrain.rewards.scorers.answers:JsonSchema",
    "reasoning_gym": "rekatrain.rewards.code.verifiers:ReasoningGym",
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

# The arguments that TRL passes to every reward function besides the columns.
BATCH_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The parameters of a reward, by their use.

    is_scorer: True for a scorer of one completion, False for a batch function in TRL's convention
    columns:   columns that every row must have
    options:   what a recipe may set -> the annotated type; Any where there is no annotation
    required:  options that the recipe must set
    optional:  options whose default is None, so that a recipe may set them to null
    """

    is_scorer: bool
    columns: tuple[str, ...]
    options: Mapping[str, Any]  # Any: a type form
    required: tuple[str, ...]
    optional: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A reward as a recipe writes it: enough to make it in any process."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)  # Any: YAML values, checked against the signature

    def make(self) -> Callable[..., Any]:  # Any: checked when it returns
        """Return the reward with its options, ready to be called with a completion or a batch, and with columns."""
        target = find(self.name)
        if isinstance(target, type):
            return target(**self.options)
        return partial(target, **self.options) if self.options else target


def find(name: str) -> Callable[..., Any]:
    """Return the function or class of a built-in name or of `module:name`; raise InputError if there is none."""
    module_name, _, attribute = REWARDS.get(name, name).partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        known = ", ".join(REWARDS)
        raise InputError(
            f"there is no reward {name}{did_you_mean(name, REWARDS)}; the built-in ones are: {known}; "
            "your own is written module:function"
        )
    if module_name == "__main__":
        raise InputError(
            f"reward {name}: workers cannot import the script or notebook that runs; move {attribute} to a file of its "
            f"own, such as my_rewards.py, and write my_rewards:{attribute}"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: the user's files must not shadow installed modules
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The user's module may exist and itself import a missing one: that error says more than ours.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"reward {name}: no module {module_name} in the current directory or installed; "
            f"run from the folder that holds it{_describe_shadowing(module_name)}"
        ) from error
    except SystemExit as error:
        raise InputError(
            f"reward {name}: the import of {module_name} called sys.exit({error.code!r}): put its commands below "
            'if __name__ == "__main__":'
        ) from error
    target = getattr(module, attribute, None)
    if not callable(target):
        nearest = did_you_mean(attribute, vars(module))
        shadowing = _describe_shadowing(module_name)
        raise InputError(f"reward {name}: {module_name} has no function {attribute}{shadowing or nearest}")
    return target


def read_signature(name: str) -> Signature:
    """Return the columns and options of a reward; raise InputError if it has neither of the two forms."""
    target = find(name)
    is_class = isinstance(target, type)
    called = inspect.signature(getattr(target, "__call__") if is_class else target).parameters  # noqa: B004, B009
    parameters = list(called.values())[1:] if is_class else list(called.values())
    names = [parameter.name for parameter in parameters]
    takes_all_columns = any(p.kind is p.VAR_KEYWORD for p in parameters)
    is_scorer = names[:1] == ["completion"]
    # TRL's get_soft_overlong_punishment takes completion_ids alone.
    is_batch = takes_all_columns and any(name in names for name in ("prompts", "completions", "completion_ids"))
    if not is_scorer and not is_batch:
        raise InputError(
            f"reward {name} has the parameters ({', '.join(names)}); a scorer's first parameter is completion, "
            "and a TRL reward function takes completions and **kwargs"
        )
    passed = ("completion",) if is_scorer else BATCH_ARGUMENTS
    named = [p for p in parameters if p.name not in passed and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    settings = (
        inspect.signature(target).parameters.values() if is_class else [p for p in named if p.default is not p.empty]
    )
    return Signature(
        is_scorer=is_scorer,
        columns=tuple(p.name for p in named if p.default is p.empty),
        options={p.name: _read_annotation(target, p) for p in settings},
        required=tuple(p.name for p in settings if p.default is p.empty),
        optional=tuple(p.name for p in settings if p.default is None),
    )


class Unresolved:
    """The annotation of an option that cannot be evaluated here, as where it is imported for type checkers only."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _read_annotation(target: Callable[..., Any], parameter: inspect.Parameter) -> Any:  # a type form
    """Return the type that a parameter is annotated with, evaluated where it is text; an Unresolved if that fails."""
    if parameter.annotation is parameter.empty:
        return Any
    function = inspect.unwrap(target.__init__ if isinstance(target, type) else target)  # type: ignore[misc]
    names = getattr(function, "__globals__", None) or vars(sys.modules.get(target.__module__, typing))
    holder = SimpleNamespace(__annotations__={"option": parameter.annotation})
    try:
        return typing.get_type_hints(holder, globalns=names, include_extras=True)["option"]
    except Exception as error:  # evaluating a user's text can raise anything
        return Unresolved(f"{type(error).__name__}: {error}")


def _describe_shadowing(module_name: str) -> str:
    """Return how to resolve it if the current folder holds a module of that name and Python found another; else ""."""
    top = module_name.partition(".")[0]
    file = next((path for path in (Path(f"{top}.py"), Path(top)) if path.exists()), None)
    module = sys.modules.get(top)
    if file is None or module is None or _is_at(module, file):
        return ""
    where = getattr(module, "__file__", None) or "Python itself"
    return (
        f": Python found the installed module {top} ({where}) before {file} in the current directory; "
        "rename yours, for installed modules come first"
    )


def _is_at(module: ModuleType, file: Path) -> bool:
    found = [path for path in [getattr(module, "__file__", None), *getattr(module, "__path__", [])] if path]
    return file.resolve() in {Path(path).resolve() for path in found}
