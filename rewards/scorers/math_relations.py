"""Equations, inequalities and unions of the values that their sides have."""

from collections.abc import Sequence
from typing import Any

from rekatrain.rewards.scorers.arithmetic import MP, TooLarge, to_mp
from rekatrain.rewards.scorers.formula import Formula
from rekatrain.rewards.scorers.math_values import SYMBOL, Equation, Items, Number, Union, is_equal


def equation(sides: list[str], values: list[Any], signs: list[str]) -> Any:
    """Return the equation of a chain of sides, some without a value; None if it states a falsehood, such as 41 = 42."""
    numbers = [(value, sign) for value, sign in zip(values, ["=", *signs], strict=True) if _is_constant(value)]
    for (one, _), (other, sign) in zip(numbers, numbers[1:], strict=False):
        if not (is_equal(one, other) or _is_rounded(one, other, is_about=sign == "≈")):
            return None
    if len(numbers) == len(values):  # 1 + 2 = 3, 1/3 ≈ 0.33
        if is_equal(values[0], values[-1]):
            return values[-1]
        return Equation(name="", left=None, sides=(values[0], values[-1]))
    if values[-1] is None or (_is_constant(values[0]) and not _is_constant(values[-1])):
        sides, values = sides[::-1], values[::-1]  # 5 = x
    if values[-1] is None:
        return None
    is_named = SYMBOL.fullmatch(sides[-1]) is not None and SYMBOL.fullmatch(sides[0]) is None and values[0] is not None
    if is_named:
        sides, values = sides[::-1], values[::-1]
    results = (values[-1],) if "≈" not in signs else tuple(value for value in values[1:] if value is not None)
    return Equation(name=" ".join(sides[0].split()), left=values[0], sides=results)


def _is_constant(value: Any) -> bool:
    return isinstance(value, Number) and not value.formula.names


def _is_rounded(exact: Number, rounded: Number, *, is_about: bool) -> bool:
    """Return True if one number is the other, rounded to the decimals that it is written with."""
    for one, other in ((exact, rounded), (rounded, exact)):
        decimals = len(other.formula.text.partition(".")[2]) if other.is_decimal else 0
        if (other.is_decimal or is_about) and other.formula.text.replace(".", "").strip("-").isdigit():
            try:
                difference = abs(to_mp(one.formula.at(0)) - to_mp(other.formula.at(0)))
            except TooLarge:
                return False
            if difference <= MP.mpf(10) ** -decimals * MP.mpf("0.5001"):
                return True
    return False


def inequality(sides: list[str], values: list[Any], signs: list[str]) -> Union | None:
    """Return the interval of `1 < x ≤ 2`, `x < 2` or `x ≠ 2`; None where the letter does not stand alone."""
    alone = [index for index, side in enumerate(sides) if SYMBOL.fullmatch(side)]
    if len(alone) != 1 or len(sides) > 3 or (len(sides) == 3 and alone != [1]):
        return None
    bounds = [value if index != alone[0] else None for index, value in enumerate(values)]
    if any(not isinstance(bound, Number) for index, bound in enumerate(bounds) if index != alone[0]):
        return None
    infinite = {sign: Number(formula=Formula(f"{sign}\\infty")) for sign in ("", "-")}
    if signs == ["≠"]:
        bound = bounds[1 - alone[0]]
        below = Items(brackets="()", items=(infinite["-"], bound))
        return Union(parts=(below, Items(brackets="()", items=(bound, infinite[""]))))
    lower: Any = (infinite["-"], "(")
    upper: Any = (infinite[""], ")")
    for position, sign in enumerate(signs):
        is_left = position < alone[0]  # the bound stands left of the letter
        if sign not in "<>≤≥":
            return None
        bound = bounds[position if is_left else position + 1]
        is_strict = sign in "<>"
        if (sign in "<≤") == is_left:
            lower = (bound, "(" if is_strict else "[")
        else:
            upper = (bound, ")" if is_strict else "]")
    if len(signs) == 2 and (is_infinite(lower[0]) or is_infinite(upper[0])):
        return None  # 1 < x > 2
    return Union(parts=(Items(brackets=lower[1] + upper[1], items=(lower[0], upper[0])),))


def is_interval(value: Any) -> bool:
    """Return True for a value in brackets that an interval may have."""
    return isinstance(value, Items) and value.brackets in ("()", "[)", "(]", "[]") and len(value.items) == 2


def unite(values: Sequence[Any]) -> Union | None:
    """Return the union of intervals, sets and unions; None if another value is among them."""
    parts: list[Items] = []
    for value in values:
        if isinstance(value, Union):
            parts.extend(value.parts)
        elif isinstance(value, Items) and value.brackets:
            parts.append(value)
        else:
            return None
    return Union(parts=tuple(parts))


def intersect(values: Sequence[Union]) -> Any:
    """Return the interval of `x > 1 and x < 3`, of a lower and an upper bound; None for anything else."""
    parts = [part for value in values for part in value.parts]
    if len(parts) != 2:
        return None
    lower = next((part for part in parts if is_infinite(part.items[1])), None)
    upper = next((part for part in parts if is_infinite(part.items[0])), None)
    if lower is None or upper is None:
        return None
    return Union(parts=(Items(brackets=lower.brackets[0] + upper.brackets[1], items=(lower.items[0], upper.items[1])),))


def is_infinite(value: Any) -> bool:
    return isinstance(value, Number) and r"\infty" in value.formula.text
