"""Rows that reasoning_gym generates."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rekatrain.data.errors import InputError, first_line
from rekatrain.data.files import Located

PROCEDURAL_PREFIX = "reasoning_gym:"


def generate_entries(path: str, size: int, seed: int, options: Mapping[str, Any]) -> Iterator[Located]:
    """Yield `size` entries of the task that `path` names; raise InputError for an unknown task or option."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task = path.removeprefix(PROCEDURAL_PREFIX)
    check_choice("reasoning_gym task", task, sorted(DATASETS))
    _, config = DATASETS[task]
    known = [field.name for field in dataclasses.fields(config) if field.name not in ("size", "seed")]
    for option in options:
        if option in ("size", "seed"):
            raise InputError(f"task: {option} is a key of the dataset section: write it beside task, not inside it")
        check_choice(f"option of the reasoning_gym task {task}", option, known)
    try:
        entries = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:  # each task has its own checks
        raise InputError(f"{path} does not accept task: {dict(options)}: {first_line(error)}") from error
    for index in range(size):
        yield f"{path}[{index}]", entries[index]


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """Raise InputError, with the most similar known value, unless `value` is known."""
    if value not in known:
        nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "there are none"
        raise InputError(f"{key} {value!r} is not known; {hint}")
