"""Check a section of a recipe against the signature of the callable that receives it as keyword arguments.

Data, rewards and trainer share this check, so a wrong key, a missing key or a wrong type gives the same message
everywhere.
"""

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from rekatrain.data.errors import InputError


def check_keywords(
    name: str, section: Mapping[str, Any], target: Callable[..., Any], *, reserved: Collection[str] = ()
) -> None:
    """Raise InputError unless `section` can be passed to `target` as keyword arguments of the right types.

    `reserved` are parameters of `target` that the program itself passes.
    """
    signature = inspect.signature(target)
    known = [key for key in signature.parameters if key not in reserved]
    prefix = "" if name == "recipe" else f"{name}."
    for key in section:
        if key in reserved:
            raise InputError(f"{prefix}{key} is set by the program: remove it from the recipe")
        if key not in known:
            nearest = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"known keys: {', '.join(sorted(known))}"
            raise InputError(f"unknown key {prefix}{key}: {hint}")
    for key in known:
        if key not in section and signature.parameters[key].default is inspect.Parameter.empty:
            raise InputError(f"{prefix}{key} is missing: add it to the recipe")
    check_types(prefix, section, target)


def check_types(prefix: str, section: Mapping[str, Any], target: Callable[..., Any]) -> None:
    """Raise InputError unless each value has the type that `target` annotates its parameter with."""
    hints = typing.get_type_hints(target, include_extras=True)
    for key, value in section.items():
        _check_type(f"{prefix}{key}", value, hints.get(key, Any))


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return `, did you mean X?` where a known word resembles `word`, else an empty text."""
    nearest = get_close_matches(word, known, n=1)
    return f", did you mean {nearest[0]}?" if nearest else ""


def _check_type(name: str, value: object, hint: Any) -> None:  # Any: typing has no class for all type forms
    try:
        TypeAdapter(hint, config=None if is_dataclass(hint) else _ANY_TYPE).validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise InputError(f"{name} is {value!r}; it should be {reason}") from None


_ANY_TYPE = ConfigDict(arbitrary_types_allowed=True)
