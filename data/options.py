"""Check a section of a recipe against the signature of the callable that receives it as keyword arguments.

Data, rewards and trainer share this check, so a wrong key, a missing key or a wrong type gives the same message
everywhere.
"""

import inspect
import json
import re
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rekatrain.data.errors import InputError

# Below it the nearest word is another word: `log_completions` is not `truncated_completions` (0.67).
SIMILARITY = 0.75
# Characters of a key that a message shows as it is.
MAX_KEY = 80
# Keys of TRL, verl and OpenRLHF -> ours.
OTHER_NAMES = {
    "kl_coef": "beta",
    "init_kl_coef": "beta",
    "kl_loss_coef": "beta",
    "kl_estimator": "kl_placement",
    "use_kl_loss": "kl_placement",
    "lr": "learning_rate",
    "actor_learning_rate": "learning_rate",
    "max_response_length": "max_completion_length",
    "response_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "generate_max_len": "max_completion_length",
    "rloo_k": "num_generations",
    "n": "num_generations",
    "n_samples_per_prompt": "num_generations",
    "train_batch_size": "prompts_per_step",
    "rollout_batch_size": "prompts_per_step",
    "per_device_train_batch_size": "prompts_per_step",
    "ppo_epochs": "num_iterations",
    "num_ppo_epochs": "num_iterations",
    "cliprange": "epsilon",
    "clip_ratio": "epsilon",
    "num_train_epochs": "max_steps",
    "total_training_steps": "max_steps",
    "loss_agg_mode": "loss_type",
    "mask_truncated_completions": "truncated_completions",
    "path": "pretrained_model_name_or_path",
    "name": "pretrained_model_name_or_path",
    "torch_dtype": "dtype",
}

SUBJECT = re.compile(r"^\w+ should ")  # of a message of pydantic's: "Input should be a valid integer"


def check_keywords(
    name: str, section: Mapping[str, Any], target: Callable[..., Any], *, reserved: Collection[str] = ()
) -> None:
    """Raise InputError unless `section` can be passed to `target` as keyword arguments of the right types.

    `reserved` are parameters of `target` that the program itself passes.
    """
    parameters = inspect.signature(target).parameters
    prefix = "" if name == "recipe" else f"{name}."
    for key in section:
        if key in reserved:
            raise InputError(f"{prefix}{key} is set by the program: remove it from the recipe")
    known = [key for key in parameters if key not in reserved]
    required = [key for key in known if parameters[key].default is inspect.Parameter.empty]
    check_keys(prefix, section, known, required=required)
    check_types(prefix, section, target)


def check_keys(prefix: str, section: Mapping[str, Any], known: Collection[str], *, required: Collection[str]) -> None:
    """Raise InputError for a key of `section` that is not known, and for a required one that it lacks."""
    for key in section:
        if key not in known:
            nearest = _nearest(str(key), known)
            hint = f"did you mean {prefix}{nearest}?" if nearest else f"known keys: {', '.join(sorted(known))}"
            named = key if str(key).isprintable() and len(str(key)) <= MAX_KEY else shorten(key)
            raise InputError(f"unknown key {prefix}{named}: {hint}")
    for key in required:
        if key not in section:
            raise InputError(f"{prefix}{key} is missing: add it to the recipe")


def check_types(prefix: str, section: Mapping[str, Any], target: Callable[..., Any]) -> None:
    """Raise InputError unless each value has the type that `target` annotates its parameter with."""
    hints = typing.get_type_hints(target, include_extras=True)
    for key, value in section.items():
        check_type(f"{prefix}{key}", value, hints.get(key, Any))


def check_type(name: str, value: object, hint: Any) -> None:  # Any: typing has no class for all type forms
    """Raise InputError unless a value of a recipe has the annotated type.

    YAML has no tuples, paths or enums: a list is accepted as a tuple, and text as whatever is written as text in JSON.
    """
    adapter = TypeAdapter(hint, config=None if is_dataclass(hint) else _ANY_TYPE)
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        if not _is_valid_json(adapter, value):
            where, wrong = _locate(name, value, error)
            raise InputError(f"{where} is {shorten(wrong)}; it should {_reason(error)}") from None


def shorten(value: object, limit: int = 200) -> str:
    """Return `repr(value)` on one line, cut in the middle where it is longer than `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a value that holds itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 4 :]}"


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return `, did you mean X?` where a known word resembles `word`, else an empty text."""
    nearest = _nearest(word, known)
    return f", did you mean {nearest}?" if nearest else ""


def _nearest(word: str, known: Collection[str]) -> str | None:
    """Return our name of a key of TRL, verl or OpenRLHF, or else the most similar known word, or None."""
    if OTHER_NAMES.get(word) in known:
        return OTHER_NAMES[word]
    return next(iter(get_close_matches(word, known, n=1, cutoff=SIMILARITY)), None)


def _is_valid_json(adapter: TypeAdapter[Any], value: object) -> bool:
    try:
        text = json.dumps(value)
        adapter.validate_json(text, strict=True)
    except (ValidationError, TypeError, ValueError):
        return False
    return bool(json.loads(text) == value)  # JSON turns a key that is a number into text


def _locate(name: str, value: object, error: ValidationError) -> tuple[str, object]:
    """Return the dotted name and the value of the wrong item of a mapping; of any other value, its own."""
    for key in error.errors()[0]["loc"]:
        if not isinstance(value, Mapping) or key not in value:
            break
        name, value = f"{name}.{key}", value[key]
    return name, value


def _reason(error: ValidationError) -> str:
    """Return what the value should be or have, by the first two reasons: those of a union are alternatives."""
    messages = [item["msg"].replace(" after validation", "") for item in error.errors()]
    return " or ".join(dict.fromkeys(SUBJECT.sub("", message) for message in messages[:2]))


_ANY_TYPE = ConfigDict(arbitrary_types_allowed=True)
