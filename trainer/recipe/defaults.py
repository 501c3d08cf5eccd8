"""The values of two recipes, key by key, so that a default that is written out equals one that is not."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Final

from rekatrain.data.errors import InputError
from rekatrain.data.sources import load_rows
from rekatrain.rewards.compose import OwnKeys
from rekatrain.rewards.registry import find
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()


def values_with_defaults(one: Recipe, other: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of two recipes by dotted key; a key that only one of them sets has its default in the other.

    A section, or a reward, that only one of them has is one key. A section that is equal in both is left out. A key
    that may change whatever its default is, such as `evaluate.temperature`, is ABSENT instead.
    """
    left: dict[str, Any] = {}
    right: dict[str, Any] = {}
    ours, theirs = _by_section(one), _by_section(other)
    for name in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(name, ABSENT), theirs.get(name, ABSENT)
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            left[name], right[name] = a, b
        elif a != b:
            defaults = _defaults_of(name)
            for key in dict.fromkeys([*a, *b]):
                default = defaults.get(key, ABSENT)
                left[f"{name}.{key}"], right[f"{name}.{key}"] = a.get(key, default), b.get(key, default)
    return left, right


def bf16_default() -> bool:
    """Return True where the stages of TRL's trainers compute in bfloat16 unless the recipe sets `bf16`."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _by_section(recipe: Recipe) -> dict[str, Any]:
    """Return the sections that a recipe has, each reward as a separate section."""
    tree = {key: value for key, value in asdict(recipe).items() if value is not None}
    rewards = {f"rewards.{name}": options or {} for name, options in tree.pop("rewards").items()}
    return {**tree, **rewards}


def _defaults_of(name: str) -> dict[str, Any]:
    """Return the defaults of a section, if some of its keys must stay, or of a reward's options."""
    if name.startswith("rewards."):
        try:
            return {**_defaults(OwnKeys), **_defaults(find(name.removeprefix("rewards.")))}
        except InputError:  # of the earlier recipe, and its module is gone
            return {}
    # Imported here: they take seconds, and the model's module imports the run folder, which compares recipes.
    from peft import LoraConfig
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.sft_config import SFTConfig

    from rekatrain.trainer.models.load import load_model

    callables: dict[str, Callable[..., Any]] = {
        "model": load_model,
        "dataset": load_rows,
        "lora": LoraConfig,
        "sft": SFTConfig,
        "reward": RewardConfig,
        "rloo": RLOOConfig,
        "scoring": ScoringConfig,
    }
    if name not in callables:
        return {}
    ours: dict[str, dict[str, Any]] = {
        "sft": {"bf16": bf16_default()},
        "reward": {"bf16": bf16_default()},
        "dataset": {"order": "shuffled"},
    }
    return _defaults(callables[name]) | ours.get(name, {})


def _defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of a callable's parameters, those of a dataclass with its factories called."""
    if isinstance(target, type) and is_dataclass(target):
        return {
            field.name: field.default_factory() if field.default_factory is not MISSING else field.default
            for field in fields(target)
        }
    return {
        name: parameter.default
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.default is not parameter.empty
    }
