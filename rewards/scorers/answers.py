"""Scorers of a final answer, which compare it with a column of the row or with an option of the recipe.

All judge the answer after the reasoning. Text that makes no sense scores 0.0; a row that cannot be graded gives None.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jsonschema
from annotated_types import Ge
from jsonschema.protocols import Validator
from pydantic import FiniteFloat

from rekatrain.data.chat import ParsedCompletion
from rekatrain.data.errors import InputError
from rekatrain.rewards.gold import first_text, has_gold
from rekatrain.rewards.scorers.boxes import find_boxes
from rekatrain.rewards.scorers.fences import find_fences

ANSWER_MARK = re.compile(r"\b(?:final\s+)?answer\b\W*(?:\bis\b|:)\W*", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?!\w|\.\d)")
# A letter that is used as an option: alone, or marked by brackets, a full stop, a colon or stars.
OPTION = re.compile(
    r"(?<![\w'])(?:option\s+|choice\s+)?[*(\[{]{0,8}([A-Z])[*)\]}]{0,8}(?![\w'’])(?:[.:)](?=\s|$))?", re.IGNORECASE
)
WORD_FOLLOWS = re.compile(r"\s+(?!or\b|and\b|nor\b)[a-z]")  # so that "A" is an article and "I" a pronoun


def final_answer(text: str) -> str:
    """Return the last `\\boxed{...}`, else the rest of the line after the last "answer is" or "answer:", else all.

    >>> final_answer("Both fit. The answer is **Paris**.")
    'Paris**.'
    """
    boxes = find_boxes(text)
    if boxes:
        return boxes[-1].strip()
    marks = list(ANSWER_MARK.finditer(text))
    return text[marks[-1].end() :].strip().partition("\n")[0] if marks else text.strip()


@has_gold(first_text)
def exact_match(
    completion: ParsedCompletion, *, answer: str | float | list[Any] | None, ignore_case: bool = True
) -> float | None:
    """Return 1.0 if the final answer equals the column `answer`, or one of its items if that is a list, else 0.0.

    White space, outer punctuation and, with `ignore_case`, case do not count. A longer text that contains the answer
    scores 0.0. Returns None if the row has no answer.
    """
    accepted = answer if isinstance(answer, list) else [answer]
    golds = {_normalize(str(gold), ignore_case) for gold in accepted if gold is not None} - {""}
    if not golds:
        return None
    return float(_normalize(final_answer(completion.answer), ignore_case) in golds)


@has_gold(first_text)
def numeric_close(
    completion: ParsedCompletion,
    *,
    answer: str | float | None,
    rel_tol: Annotated[FiniteFloat, Ge(0)] = 0.01,
    abs_tol: Annotated[FiniteFloat, Ge(0)] = 0.0,
) -> float | None:
    """Return 1.0 if the number of the final answer is close to the column `answer`, else 0.0.

    A marked final answer (see `final_answer`) must hold one number; of a whole text, the last number counts. Close is
    meant as in `math.isclose`, relative to the larger of the two. Returns None if the column holds no number.
    """
    golds = _numbers(str(answer)) if answer is not None else []
    if len(golds) != 1:
        return None
    numbers = _numbers(final_answer(completion.answer))
    is_marked = final_answer(completion.answer) != completion.answer.strip()
    if not numbers or (is_marked and len(set(numbers)) > 1):
        return 0.0
    return float(math.isclose(numbers[-1], golds[0], rel_tol=rel_tol, abs_tol=abs_tol))


@has_gold(lambda choice: first_text(choice))
def multiple_choice(completion: ParsedCompletion, *, choice: str | None) -> float | None:
    """Return 1.0 if the final answer names the option of the column `choice`, a letter, and no other one, else 0.0.

    Reads `B`, `(b)`, `**B**`, `B. Paris`, `\\boxed{B}`, `The answer is B`. A text without such a mark counts if it uses
    exactly one letter as an option: naming them all is no answer. Returns None if the column holds no letter.
    """
    gold = re.fullmatch(r"\W*([A-Za-z])\W*", str(choice)) if choice is not None else None
    if gold is None:
        return None
    return float(_options(final_answer(completion.answer)) == {gold[1].upper()})


class Regex:
    """1.0 if the regular expression `pattern` is found in the answer, or with `whole: true` matches all of it."""

    def __init__(self, *, pattern: str, whole: bool = False) -> None:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InputError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        self._match = compiled.fullmatch if whole else compiled.search

    def __call__(self, completion: ParsedCompletion) -> float:
        return float(self._match(completion.answer) is not None)


class JsonSchema:
    """1.0 if the answer is JSON that fits `schema`, an object of the recipe or the path of a file with one, else 0.0.

    The JSON is the whole answer, or its only fenced block with nothing but white space around it. With
    `text_around: true` it is the last fenced block. A repeated key and NaN are no JSON.
    """

    def __init__(self, *, schema: Mapping[str, Any] | str, text_around: bool = False) -> None:
        if isinstance(schema, str):
            path = schema
            try:
                schema = json.loads(Path(path).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"schema {path!r} cannot be read as JSON: {error}") from error
            if not isinstance(schema, dict):
                raise InputError(f"schema {path!r} holds no JSON object but {type(schema).__name__}")
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise InputError(f"schema is not a JSON schema: {error.message}") from error
        self._validator: Validator = kind(schema)
        self._text_around = text_around

    def __call__(self, completion: ParsedCompletion) -> float:
        fences = [fence for fence in find_fences(completion.answer) if fence.info.lower() in ("", "json")]
        blocks = [fence.code for fence in fences]
        is_alone = (
            len(fences) == 1
            and not f"{completion.answer[: fences[0].start]}{completion.answer[fences[0].end :]}".strip()
        )
        text = blocks[-1] if is_alone or (blocks and self._text_around) else completion.answer
        try:
            value = json.loads(text, object_pairs_hook=_unique, parse_constant=_reject)
        except (ValueError, RecursionError):
            return 0.0
        return float(self._validator.is_valid(value))


def _normalize(text: str, ignore_case: bool) -> str:
    text = " ".join(text.replace("\\text", "").split()).strip("*_`'\"“”‘’{}()[]$.,;:!? ")
    return text.casefold() if ignore_case else text


def _numbers(text: str) -> list[float]:
    numbers = [match.group().replace(",", "").replace("−", "-") for match in NUMBER.finditer(text)]
    return [float(number) for number in numbers if number.strip("+-")]


def _options(text: str) -> set[str]:
    """Return the letters that a text uses as options."""
    letters = set()
    for match in OPTION.finditer(text):
        letter, whole = match[1], match.group()
        is_bare = whole == letter and text.strip() != letter
        if is_bare and (letter.islower() or (letter in "AI" and WORD_FOLLOWS.match(text, match.end()))):
            continue
        letters.add(letter.upper())
    return letters


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a repeated key")
    return dict(pairs)


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
