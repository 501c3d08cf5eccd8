"""The reward `math_answer`: mathematical equality, in answers as people write them.

It judges the answer, never the reasoning before it. Text that makes no sense scores 0.0.
"""

import re
from typing import Any

from rekatrain.data.chat import ParsedCompletion
from rekatrain.data.errors import InputError
from rekatrain.rewards.gold import boxed, has_gold
from rekatrain.rewards.scorers import math_prose, math_text
from rekatrain.rewards.scorers.boxes import locate_boxes
from rekatrain.rewards.scorers.math_reading import read, read_text
from rekatrain.rewards.scorers.math_values import Exactly, Items, Union, is_equal

# What joins two boxes of which only one can be meant. "or rather" corrects the first.
ALTERNATIVE = re.compile(
    r"[\s.,;()?/]*(?:,|/|\b(?:or|and|maybe|perhaps|possibly|alternatively|either|also|it|could|might|may|be)\b)"
    r"(?:[\s.,;()?/]|\b(?:or|and|maybe|perhaps|possibly|alternatively|either|also|it|could|might|may|be)\b)*",
    re.IGNORECASE,
)
MAX_BOXES = 50  # of one answer
LATEX = re.compile(r"\\[A-Za-z]+|[\\{}$\[\]]")


@has_gold(boxed)
def math_answer(completion: ParsedCompletion, *, answer: str | float | None) -> float | None:
    """Return 1.0 if the completion's answer equals the column `answer` mathematically, else 0.0.

    The last `\\boxed{...}` is compared; without one, the whole answer if it is a single formula; else what follows the
    last word "answer", or else the last number. Two alternatives ("42 or 43") are no answer, and neither is an equation
    that states a falsehood ("41 = 42"). A gold of several values, `2, 3`, may be answered in as many boxes.

    50% equals both 0.5 and 50. A rounded decimal equals a fraction or a root to six places. A numeral with a base
    equals the same numeral only; a point (2, 3) equals no set {2, 3}. Formulas with letters are compared at a few real
    values of the letters; math-verify compares what that does not cover (integrals, solution sets), and scores 0.0
    after a second: it stops by signal.alarm, and so must run on a main thread, as in a worker.

    Returns None if the row has no answer, or one that is neither mathematics, `\\text{...}`, a date, a time of day nor
    yes, no, true or false. Raises InputError if the column holds neither text nor a number.
    """
    if answer is None:
        return None
    if not isinstance(answer, str | int | float):
        raise InputError(f"the column answer must be text or a number, not {type(answer).__name__}: {answer!r}")
    gold = read(str(answer))
    if gold is None:
        return None
    text = completion.answer
    boxes = locate_boxes(text)
    if not boxes:
        return float(_is_answered_in_text(gold, text))
    last = read_as(gold, text[boxes[-1][0] : boxes[-1][1]])
    if len(boxes) > 1:
        values = _flatten([read_as(gold, text[start:end]) for start, end in boxes[-MAX_BOXES:]])
        if len(values) == _num_values(gold) > 1 and is_equal(gold, Items(brackets="", items=tuple(values))):
            return 1.0
        (start, end), (following, _) = boxes[-2:]
        between = text[end + 1 : following].rpartition("\\")[0][:200]
        other = read_as(gold, text[start:end])
        if ALTERNATIVE.fullmatch(LATEX.sub(" ", between)) and other is not None and not is_equal(other, last):
            return 0.0
    return float(is_equal(gold, last))


def read_as(gold: Any, text: str) -> Any:
    """Read a text as an answer to a gold: as words if that is text, and with the unit that a number may have."""
    if isinstance(gold, Exactly) and gold.kind == "words":
        return read_text(math_text.respell(text)) if len(text) <= 200 else None
    value = read(text)
    unit = math_text.ONE_LETTER_UNIT.match(text.strip(" .$"))
    if unit is not None and not is_equal(gold, value):
        return read(unit[1])  # "5m", which could be 5 times m
    multiple = math_text.MULTIPLE.match(text)
    if multiple is not None and not is_equal(gold, value):
        return read(f"{multiple[1]}*10^{math_text.MULTIPLES[multiple[2].lower()]}")  # "3 million" is 3, or 3000000
    return value


def _flatten(values: list[Any]) -> list[Any]:
    """Return the values of several boxes, of which one may hold a list; none if a box cannot be read."""
    flat: list[Any] = []
    for value in values:
        flat.extend(value.items if isinstance(value, Items) and value.brackets == "" else [value])
    return [] if None in flat else flat


def _num_values(gold: Any) -> int:
    if isinstance(gold, Union):
        return len(gold.parts)
    return max(1, len(gold.items)) if isinstance(gold, Items) and gold.brackets in ("", "{}", "()") else 1


def _is_answered_in_text(gold: Any, text: str) -> bool:
    whole = read_as(gold, text)
    if whole is not None and not (isinstance(gold, Exactly) and gold.kind == "words"):
        return is_equal(gold, whole)
    if whole is not None and is_equal(gold, whole):
        return True
    for candidate in math_prose.find_answer(text, gold):
        value = read_as(gold, candidate)
        if value is not None:
            if is_equal(gold, value):
                return True
            # An exclamation mark at the end of a sentence may be no factorial.
            return candidate.endswith("!") and is_equal(gold, read_as(gold, candidate.rstrip("!")))
    return False
