"""Checks of all values of a recipe, whatever section they are in."""

import math
import re
from collections.abc import Mapping
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.options import shorten

# Above it a number is a slip: seconds overflow clocks, weights and rates overflow float32 a few products later.
MAX_NUMBER = 1e15
MAX_KEY = 200
# A run uploads nothing, and its keys would need a secret.
HUB_KEY = re.compile(r"hub_\w+|push_to_hub\w*")
# A recipe is printed, logged and copied to the run folder. `api_key_env`, `eos_token` and the like are no secrets.
SECRET_KEY = re.compile(
    r"\w*(password|passwd|passphrase|secret|secret_key|credentials?|api_?key|access_?key|private_?key)"
    r"|(\w*_)?(hf|hub|auth|access|api|bearer|refresh|session)_?token|authorization",
    re.IGNORECASE,
)


def check_values(tree: object, name: str = "") -> None:
    """Raise InputError for a number that is not finite or far too large, and for text that no file or path can hold.

    name: the dotted name of `tree` within the recipe
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if not str(key).isprintable() or len(str(key)) > MAX_KEY:
                raise InputError(
                    f"{name or 'the recipe'} has the key {shorten(key)}, too long or not printable: remove it"
                )
            check_values(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for number, item in enumerate(tree):
            check_values(item, f"{name}.{number}")
    elif isinstance(tree, str):
        _check_text(tree, name)
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        if not math.isfinite(tree):
            raise InputError(f"{name} is {tree}; it should be a finite number")
        if abs(tree) > MAX_NUMBER:
            raise InputError(f"{name} is {tree:.3g}; no number of a recipe is above {MAX_NUMBER:.0e}")


def check_secrets(tree: Mapping[str, Any]) -> None:
    """Raise InputError for a key anywhere in a recipe whose name says that its value is a secret.

    Also raises it for the keys by which TRL uploads models. The message does not show the value.
    """
    for stage in ("sft", "reward"):
        for key in tree.get(stage) or {}:
            if HUB_KEY.fullmatch(str(key)):
                raise InputError(
                    f"{stage}.{key}: a run uploads nothing: remove it from the recipe; `hf upload` uploads an export"
                )
    _check_secrets("", tree)


def _check_secrets(prefix: str, tree: object) -> None:
    if isinstance(tree, list):
        for number, item in enumerate(tree):
            _check_secrets(f"{prefix}{number}.", item)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            if SECRET_KEY.fullmatch(str(key)):
                raise InputError(
                    f"{prefix}{key} would be written to the run folder: remove it from the recipe; secrets are read "
                    "from the environment (HF_TOKEN, WANDB_API_KEY, `api_key_env` of a reward, `scoring.environment`)"
                )
            _check_secrets(f"{prefix}{key}.", value)


def _check_text(text: str, name: str) -> None:
    if "\0" in text:
        raise InputError(f"{name} holds a NUL character, which no file name and no argument can: remove it")
