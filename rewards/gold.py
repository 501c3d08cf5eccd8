"""Right answers of rows, by which `rekatrain check-rewards` tests a reward: the gold of a reward.

A reward declares how a right answer looks: a function by `has_gold`, a class by a method `gold`. Its parameters are
columns of the row, or `response`, the answer of the row's reference response; it returns None for a row without one.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from rekatrain.rewards.scorers.fences import find_fences

Function = TypeVar("Function", bound=Callable[..., Any])
Gold = Callable[..., str | None]

# Columns with a solution, as data sets name them.
SOLUTIONS = ("canonical_solution", "solution", "solutions", "code", "gold_standard_solution", "completion")


def has_gold(build: Gold) -> Callable[[Function], Function]:
    """Return a decorator that declares the gold of a function.

    >>> @has_gold(lambda color: color)
    ... def names_color(completion, *, color):
    ...     return float(completion.answer == color)
    """

    def declare(function: Function) -> Function:
        setattr(function, "gold", build)  # noqa: B010 - a function has no such attribute for mypy
        return function

    return declare


def gold_answer(build: Gold, columns: Mapping[str, Any], response: str | None) -> str | None:
    """Return the right answer to a row; None if it has none."""
    known = {**columns, "response": columns.get("response") or response}
    parameters = inspect.signature(build).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return build(**known)
    return build(**{parameter.name: known.get(parameter.name) for parameter in parameters})


def boxed(answer: Any) -> str | None:
    """Return an answer in a box; None without an answer."""
    return None if answer is None or answer == "" else f"\\boxed{{{answer}}}"


def first_text(answer: Any) -> str | None:
    """Return an answer, or the first of a list, as text; None if there is none."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    return None if first is None or first == [] or first == "" else str(first)


def solution_code(response: Any = None, **columns: Any) -> str | None:
    """Return a reference solution as a fenced block of Python; None if the row has none.

    The response comes first, as a layout completes a solution that continues its prompt (HumanEval).
    """
    texts = [response, *(columns.get(name) for name in SOLUTIONS)]
    for text in texts:
        code = _python_of(text)
        if code is not None:
            return f"```python\n{code}\n```"
    return None


def answer_of_entry(reasoning_gym_entry: Mapping[str, Any]) -> str | None:
    """Return the answer of an entry of reasoning_gym; None for a task that has none."""
    return first_text(reasoning_gym_entry.get("answer"))


def _python_of(value: Any) -> str | None:
    """Return the code in a column: text, a list of texts, or CodeContests' `{language: [...], solution: [...]}`."""
    if isinstance(value, Mapping) and isinstance(value.get("solution"), list):
        languages = value.get("language") or [3] * len(value["solution"])
        python = [
            code for code, language in zip(value["solution"], languages, strict=False) if language in (3, "PYTHON3")
        ]
        return _python_of(python)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _python_of(value[0]) if value else None
    if not isinstance(value, str) or not value.strip():
        return None
    if value.lstrip().startswith("["):  # APPS and TACO write the list as JSON
        with suppress(ValueError):
            return _python_of(json.loads(value))
    fences = find_fences(value)
    return (fences[-1].code if fences else value).strip("\n")


# Golds of the built-in rewards that run code.
GOLDS: dict[str, Gold] = {"code_tests": solution_code, "reasoning_gym": answer_of_entry}
