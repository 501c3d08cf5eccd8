"""Rule-based scorers: each judges one parsed completion and returns a float, or None where it does not apply.

A scorer is a plain function. Its first parameter is the completion; a further parameter without a default is a column
of the row, one with a default is an option of the recipe. A scorer judges the answer, never the reasoning before it.
Text that makes no sense scores 0.0; only a grader that cannot run raises.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

from math_verify import parse, verify

from data.chat import REASONING_CLOSE, REASONING_OPEN, Ending, ParsedCompletion
from data.errors import InputError

BOX = r"\boxed{"
# Unit words after a number: math-verify drops "km", but reads "dollars" as the product d*o*l*l*a*r*s.
UNIT_WORDS = re.compile(r"(?:(?<=[\d%}])|\s)\s*[A-Za-z]{3,}(?:\s+[A-Za-z]{2,})*$")
# A word that is left is prose, and a product of its letters would equal that of any anagram ("east", "seat").
PROSE = re.compile(r"(?<![\\\w])[A-Za-z]{3,}")
COMMAND_WITH_WORDS = re.compile(r"\\[a-z]+\s*\{[A-Za-z .]*\}")  # \text{east}, \begin{pmatrix}
THOUSANDS_SPACE = re.compile(r"(?<=\d)(?: |\\,|\\!)(?=\d{3}\b)")
# Longer is no answer, and takes the parser seconds: its time grows with the square of the length.
MAX_FORMULA_LENGTH = 500
EXPONENT = re.compile(r"(?<=\d)[eE]([+-]?\d+)\b")


def math_answer(completion: ParsedCompletion, *, answer: str | float | None) -> float | None:
    """1.0 where the completion's answer equals the column `answer` mathematically, else 0.0.

    None where the row has no answer or its answer is neither a number nor a formula. What is compared is the last
    `\\boxed{...}`; without one, the whole answer if it is a single formula; else what math-verify finds in the text:
    the number after the last word "answer", or failing that the last number. 50% equals both 0.5 and 50.
    Must run on the main thread: math-verify stops after 5 seconds of parsing or comparing (0.0) by signal.alarm, and
    raises ValueError elsewhere. Raises InputError where the column holds neither text nor a number.
    """
    if answer is None:
        return None
    if not isinstance(answer, str | int | float):
        raise InputError(f"the column answer must be text or a number, not {type(answer).__name__}: {answer!r}")
    gold = _parse_gold(str(answer))
    if not gold:
        return None
    return float(verify(gold, _parse_answer(completion.answer)))


def reasoning_format(completion: ParsedCompletion) -> float:
    """1.0 where a closed, non-empty reasoning block comes first and a non-empty answer follows, else 0.0.

    A further reasoning tag in the thought or the answer, or a completion that was cut off, scores 0.0.
    """
    texts = [completion.reasoning or "", completion.answer]
    has_stray_tag = any(tag in text for text in texts for tag in (REASONING_OPEN, REASONING_CLOSE))
    return float(all(texts) and not has_stray_tag and completion.ending is not Ending.LENGTH)


def reasoning_gym(
    completion: ParsedCompletion, *, reasoning_gym_task: str, reasoning_gym_entry: Mapping[str, Any]
) -> float:
    """1.0 where the task's own verifier gives the answer full marks, else 0.0: part credit is for answers not right.

    Raises ValueError for an unknown task, and what the verifier raises on the gold answer of the entry.
    """
    score = _load_verifier(reasoning_gym_task)
    try:
        return float(score(completion.answer, reasoning_gym_entry) == 1.0)
    except Exception:
        # Verifiers raise whatever their parsing raises (prime_factorization: ValueError from int("two")). A verifier
        # that can judge the gold answer is sound, so the text is at fault; one that cannot raises again, here.
        score(reasoning_gym_entry["answer"], reasoning_gym_entry)
        return 0.0


@cache
def _load_verifier(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    # Imported late: it takes over a second, and only rows of this kind need it.
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


@lru_cache(maxsize=4096)
def _parse_gold(text: str) -> list[Any]:  # Any: sympy objects
    return _parse_formula(text)


def _parse_answer(text: str) -> list[Any]:
    # math-verify merges neighbouring boxes into a set, so the last box is cut out here.
    _, is_boxed, after = text.rpartition(BOX)
    if is_boxed:
        return _parse_formula(_until_closing_brace(after))
    return (not re.search(r"\s", text) and _parse_formula(text)) or _parse(text.replace("−", "-").replace(r"\$", "$"))


def _parse_formula(text: str) -> list[Any]:
    """The parse of a text that is nothing but a number or formula, with or without a unit; empty for anything else."""
    if len(text) > MAX_FORMULA_LENGTH:
        return []
    text = text.strip().rstrip(".,;!").replace("−", "-").replace("€", "").replace("£", "")
    text = UNIT_WORDS.sub("", text)
    text = EXPONENT.sub(r"\\cdot10^{\1}", THOUSANDS_SPACE.sub("", text))
    return [] if PROSE.search(COMMAND_WITH_WORDS.sub("", text)) else _parse(f"{BOX}{text}}}")


def _parse(text: str) -> list[Any]:
    # Without no_fallback, what cannot be parsed comes back as its own text and equals itself.
    return parse(text, fallback_mode="no_fallback")


def _until_closing_brace(text: str) -> str:
    """The text before the brace that closes an already opened one; empty where it never closes."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return ""
