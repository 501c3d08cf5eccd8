"""The values that answers have (a number, an interval, a list, an equation, a time, words), and their equality.

What has more than one reading (`(2, 3)` is a point and an interval, `3:10` a ratio
and a time) is equal to both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rekatrain.rewards.scorers import formula as formulas
from rekatrain.rewards.scorers import symbolic
from rekatrain.rewards.scorers.arithmetic import MP, TooLarge, is_close, scaled, to_mp
from rekatrain.rewards.scorers.formula import Formula

RADIANS = MP.pi / 180  # a degree
SYMBOL = re.compile(formulas.NAME.pattern + r"|\\text\s*\{[^{}]*\}")


@dataclass(frozen=True, kw_only=True)
class Number:
    """A scalar: an exact number or a formula, perhaps percent."""

    formula: Formula
    is_percent: bool = False
    is_degrees: bool = False
    is_decimal: bool = False  # written with a decimal point, so perhaps rounded


@dataclass(frozen=True, kw_only=True)
class Items:
    """Values in brackets: `()`, `[]`, `{}`, `[)`, `(]`; "" for a bare list, "matrix" for rows, ":" for a ratio."""

    brackets: str
    items: tuple[Any, ...]  # values


@dataclass(frozen=True, kw_only=True)
class Union:
    """Intervals, of which the value is in any."""

    parts: tuple[Items, ...]


@dataclass(frozen=True, kw_only=True)
class Equation:
    """`left = right`; `sides` are what a value may be compared with."""

    name: str  # the left side as it is written
    left: Any  # a value or None
    sides: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Exactly:
    """A time, a date, a numeral in a base, or words: equal where the parts are."""

    kind: str
    parts: tuple[Any, ...]
    other: Any = None  # the value of another reading


@dataclass(frozen=True, kw_only=True)
class Symbolic:
    """A text that math-verify may read."""

    text: str


def is_equal(gold: Any, answer: Any) -> bool:
    """Return True if two values that `read` returned are equal; None equals nothing."""
    if gold is None or answer is None:
        return False
    if isinstance(gold, Equation) or isinstance(answer, Equation):
        return _equal_equations(gold, answer)
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Exactly):
            if isinstance(other, Exactly) and one.kind == other.kind:
                return _equal_exactly(gold, answer)
            return one.other is not None and is_equal(one.other, other)
    if isinstance(gold, Number) and isinstance(answer, Number):
        return _equal_numbers(gold, answer)
    if isinstance(gold, Symbolic) or isinstance(answer, Symbolic):
        return symbolic.is_equal(_text(gold), _text(answer))
    if isinstance(gold, Union) or isinstance(answer, Union):
        left, right = _intervals(gold), _intervals(answer)
        return _equal_in_any_order(left, right)
    if isinstance(gold, Items) and isinstance(answer, Items):
        return _equal_items(gold, answer)
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Items) and len(one.items) == 1 and one.brackets in ("{}", ""):
            return is_equal(one.items[0], other)
    return False


def _equal_numbers(gold: Number, answer: Number) -> bool:
    """Compare at several points; 50% equals both 50 and 0.5, and 180 degrees both 180 and pi."""
    scales: list[Any] = [Fraction(1)]
    if gold.is_percent != answer.is_percent:
        scales.append(Fraction(1, 100))
    elif gold.is_degrees != answer.is_degrees:
        scales.append(RADIANS)
    return any(_equal_scaled(gold, answer, scale) for scale in scales)


def _equal_scaled(gold: Number, answer: Number, scale: Any) -> bool:
    if gold.formula.names != answer.formula.names and not (gold.formula.names and answer.formula.names):
        return False
    points = formulas.NUM_POINTS if gold.formula.names else 1
    try:
        for point in range(points):
            left, right = gold.formula.at(point), answer.formula.at(point)
            if gold.is_percent > answer.is_percent or gold.is_degrees > answer.is_degrees:
                left = scaled(left, scale)
            elif answer.is_percent > gold.is_percent or answer.is_degrees > gold.is_degrees:
                right = scaled(right, scale)
            if not is_close(left, right, rounded=(gold.is_decimal, answer.is_decimal)):
                return False
    except TooLarge:
        return False
    return True


def _equal_exactly(gold: Exactly, answer: Exactly) -> bool:
    if gold.kind == "time":
        # A gold without "PM" is less exact than an answer with it, and not the reverse.
        *times, half = gold.parts
        return [*times] == [*answer.parts[:3]] and half in ("", answer.parts[3])
    if gold.kind == "date":
        return gold.parts[:2] == answer.parts[:2] and "" in (gold.parts[2], answer.parts[2]) or gold == answer
    return gold.parts == answer.parts


def _equal_items(gold: Items, answer: Items) -> bool:
    """Compare in order, or in any order where both are sets or lists of alternatives; a point is no set."""
    kinds = {gold.brackets, answer.brackets}
    if "matrix" in kinds and len(kinds) == 2:
        is_gold = gold.brackets == "matrix"
        return _equal_matrix(*((gold, answer) if is_gold else (answer, gold)), is_gold=is_gold)
    if len(gold.items) != len(answer.items):
        return kinds <= {"{}", ""} and _equal_in_any_order(_distinct(gold.items), _distinct(answer.items))
    in_order = all(map(is_equal, gold.items, answer.items))
    if len(kinds) == 1:
        return in_order or (kinds <= {"{}", ""} and _equal_in_any_order(gold.items, answer.items))
    if kinds == {"{}", ""}:
        return _equal_in_any_order(gold.items, answer.items)
    is_pair = len(gold.items) == 2  # which may be an interval
    if kinds == {"{}", "[]"}:
        return not is_pair and _equal_in_any_order(gold.items, answer.items)
    if kinds == {"()", "[]"}:
        return not is_pair and in_order
    return "" in kinds and kinds <= {"", "()", "[]"} and in_order


def _equal_matrix(matrix: Items, other: Items, *, is_gold: bool) -> bool:
    """Compare a matrix with [[1, 0], [0, 1]], or one row or column with a point; a gold of [1, 2] is an interval."""
    rows = [row.items for row in matrix.items]
    if len(rows) > 1 and len(rows[0]) > 1:
        if other.brackets != "[]" or not all(isinstance(row, Items) and row.brackets == "[]" for row in other.items):
            return False
        others = [row.items for row in other.items]
        return [*map(len, rows)] == [*map(len, others)] and all(
            is_equal(cell, entry)
            for row, entries in zip(rows, others, strict=True)
            for cell, entry in zip(row, entries, strict=True)
        )
    cells = [cell for row in rows for cell in row]
    is_point = other.brackets == "()" or (other.brackets == "[]" and (is_gold or len(cells) > 2))
    return is_point and len(cells) == len(other.items) > 1 and all(map(is_equal, cells, other.items))


def _intervals(value: Any) -> list[Any]:
    """Return the parts of a union; a list of intervals is one."""
    if isinstance(value, Union):
        return [*value.parts]
    return [*value.items] if isinstance(value, Items) and value.brackets == "" else [value]


def _distinct(items: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if not any(is_equal(other, item) for other in found):
            found.append(item)
    return found


def _equal_in_any_order(gold: Sequence[Any], answer: Sequence[Any]) -> bool:
    rest = list(answer)
    for item in gold:
        match = next((index for index, other in enumerate(rest) if is_equal(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return not rest


def _equal_equations(gold: Any, answer: Any) -> bool:
    """Compare two equations, or the side of an equation with a value: `x = 5` gives 5."""
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        is_same_name = is_assignment(gold) and is_assignment(answer) and gold.name == answer.name
        return (is_same_name and is_equal(gold.sides[0], answer.sides[0])) or _equal_curves(gold, answer)
    if isinstance(answer, Equation):
        return any(is_equal(gold, side) for side in answer.sides)
    return is_assignment(gold) and any(is_equal(side, answer) for side in gold.sides)


def is_assignment(equation: Equation) -> bool:
    """Return True for `x = 5`, `f(x) = 5` and `(x, y) = (1, 2)`: the left side only names what is on the right."""
    return equation.left is None or SYMBOL.fullmatch(equation.name) is not None or "(" in equation.name


def _equal_curves(gold: Equation, answer: Equation) -> bool:
    """Return True if left - right of one is a constant times that of the other, as in 2x + y = 3 and 4x = 6 - 2y."""
    sides = [gold.left, gold.sides[0], answer.left, answer.sides[0]]
    if not all(isinstance(side, Number) for side in sides):
        return False
    ratios = []
    try:
        for point in range(formulas.NUM_POINTS):
            one, other, third, fourth = (to_mp(side.formula.at(point)) for side in sides)
            ratios.append((one - other) / (third - fourth))
    except (TooLarge, ZeroDivisionError):
        return False
    return all(is_close(ratios[0], ratio) for ratio in ratios) and ratios[0] != 0


def _text(value: Any) -> str:
    """Return a value as LaTeX, for math-verify; "" if it has none."""
    if isinstance(value, Symbolic):
        return value.text
    if isinstance(value, Number):
        return value.formula.text + (r"\%" if value.is_percent else "")
    if isinstance(value, Union):
        return r" \cup ".join(map(_text, value.parts))
    if isinstance(value, Items) and value.brackets not in ("matrix", ":"):
        opening, closing = value.brackets[:1], value.brackets[1:]
        escape = "\\" if opening == "{" else ""
        return f"{escape}{opening}{', '.join(map(_text, value.items))}{escape}{closing}"
    return ""
