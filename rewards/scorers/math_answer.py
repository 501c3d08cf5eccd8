"""The reward `math_answer`: mathematical equivalence by math-verify, in answers as people write them.

It judges the answer, never the reasoning before it. Text that makes no sense scores 0.0.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from rekatrain.data.chat import ParsedCompletion
from rekatrain.data.errors import InputError

BOX = r"\boxed{"
# Unit words after a number: math-verify drops "km", but reads "dollars" as the product d*o*l*l*a*r*s.
UNIT_WORDS = re.compile(r"(?:(?<=[\d%}])|\s)\s*[A-Za-z]{3,}(?:\s+[A-Za-z]{2,})*$")
# Any other word is prose: read as a product of its letters it would equal any anagram ("east", "seat").
PROSE = re.compile(r"(?<![\\\w])[A-Za-z]{3,}")
COMMAND_WITH_WORDS = re.compile(r"\\[a-z]+\s*\{[A-Za-z .]*\}")  # \text{east}, \begin{pmatrix}
THOUSANDS_SPACE = re.compile(r"(?<=\d)(?: |\\,|\\!)(?=\d{3}\b)")
# A longer text is no answer, and the parser's time grows with the square of the length.
MAX_FORMULA_LENGTH = 500
MIXED_NUMBER = re.compile(r"^\s*(-?\d+)\s+(\d+)/(\d+)\s*$")
RATIO_UNIT = re.compile(r"(?<=\d)\s*(?:km|m|cm|mi|ft|g|kg|lb|l|L|ml|kJ|J)/(?:s|h|hr|min|day|m|cm|kg|L|l|ml|mol)$")
HEDGE = re.compile(r"\d\W*(?:or|and/or)\W*\d")
# Seconds. A call of C that hears no signal is killed with its worker.
TIMEOUT = 1
PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")
PLAIN_FRACTION = re.compile(
    r"(?P<sign>-?)(?:\\[dt]?frac\{(?P<over>\d{1,18})\}\{(?P<under>[1-9]\d{0,17})\}|(?P<left>\d{1,18})/(?P<right>[1-9]\d{0,17}))"
)
EXPONENT = re.compile(r"(?<=\d)[eE]([+-]?\d+)\b")


def math_answer(completion: ParsedCompletion, *, answer: str | float | None) -> float | None:
    """Return 1.0 if the completion's answer equals the column `answer` mathematically, else 0.0.

    The last `\\boxed{...}` is compared; without one, the whole answer if it is a single formula; else the number after
    the last word "answer", or else the last number. 50% equals both 0.5 and 50. A gold of several values, `2, 3`, may
    be answered in as many boxes. Text that takes math-verify more than a second to parse or to compare scores 0.0:
    math-verify stops by signal.alarm, and so must run on a main thread, as in a worker.

    Returns None if the row has no answer, or one that is neither a number nor a formula. Raises InputError if the
    column holds neither text nor a number.
    """
    if answer is None:
        return None
    if not isinstance(answer, str | int | float):
        raise InputError(f"the column answer must be text or a number, not {type(answer).__name__}: {answer!r}")
    gold = str(answer)
    if _plain_number(gold) is None and not _parse_formula(gold):
        return None
    boxes = find_boxes(completion.answer)
    if not boxes:
        return float(_is_equal_in_text(gold, completion.answer))
    num_values = len(_split_list(gold))
    if len(boxes) == num_values > 1:
        return float(_is_equal(gold, ", ".join(boxes)))
    return float(_is_equal(gold, boxes[-1]))


def find_boxes(text: str) -> list[str]:
    """Return the contents of each outermost `\\boxed{...}`; "" for one that never closes."""
    boxes = []
    start = text.find(BOX)
    while start >= 0:
        inside = _until_closing_brace(text[start + len(BOX) :])
        boxes.append(inside)
        start = text.find(BOX, start + len(BOX) + len(inside))
    return boxes


@lru_cache(maxsize=8192)
def _is_equal(gold: str, formula: str) -> bool:
    """Compare two texts that are a number or formula and no more; cached, for the answers of a group repeat."""
    ours, theirs = _plain_number(gold), _plain_number(formula)
    if ours is not None and theirs is not None:
        return ours == theirs
    return _verify(gold, _parse_formula(formula))


def _is_equal_in_text(gold: str, text: str) -> bool:
    if _plain_number(text) is not None and _plain_number(gold) is not None:
        return _is_equal(gold, text)
    if (not re.search(r"\s", text.strip()) or MIXED_NUMBER.fullmatch(text)) and _parse_formula(text):
        return _is_equal(gold, text)
    if HEDGE.search(text, max(text.lower().rfind("answer"), 0)):
        return False  # "42 or 43" is no answer
    return _verify(gold, _parse(text.replace("−", "-").replace(r"\$", "$")))


def _verify(gold: str, parsed: list[Any]) -> bool:  # Any: sympy objects
    return bool(parsed) and bool(verify(_parse_formula(gold), parsed, timeout_seconds=TIMEOUT))


def _plain_number(text: str) -> Fraction | None:
    """Return the value of a decimal number, with or without thousands commas, or of a fraction of integers."""
    text = text.strip().rstrip(".")
    if len(text) > MAX_FORMULA_LENGTH:
        return None
    if PLAIN_NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    fraction = PLAIN_FRACTION.fullmatch(text)
    if fraction is None:
        return None
    over, under = fraction["over"] or fraction["left"], fraction["under"] or fraction["right"]
    return Fraction(int(fraction["sign"] + over), int(under))


def _split_list(gold: str) -> list[str]:
    """Return the parts of a list `2, 3` without brackets; a comma within a number divides nothing."""
    return [] if _plain_number(gold) is not None or re.search(r"[()\[\]{}]", gold) else gold.split(",")


@lru_cache(maxsize=8192)
def _parse_formula(text: str) -> list[Any]:
    """Parse a text that is a number or formula, with or without a unit, and no more; return [] for any other text."""
    if len(text) > MAX_FORMULA_LENGTH:
        return []
    text = text.strip().rstrip(".,;!").replace("−", "-").replace("€", "").replace("£", "")
    text = MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", UNIT_WORDS.sub("", RATIO_UNIT.sub("", text)))
    text = EXPONENT.sub(r"\\cdot10^{\1}", THOUSANDS_SPACE.sub("", text))
    return [] if PROSE.search(COMMAND_WITH_WORDS.sub("", text)) else _parse(f"{BOX}{text}}}")


def _parse(text: str) -> list[Any]:
    # Without no_fallback, a text that cannot be parsed is returned as it is and equals itself.
    return parse(text, fallback_mode="no_fallback", parsing_timeout=TIMEOUT)


def _until_closing_brace(text: str) -> str:
    """Return the text before the brace that closes an already opened one; "" if it never closes."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return ""
