"""Arithmetic on the numbers of formulas: exact where they are rational, else with 35 digits, and bounded in time."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

MP: Any = mpmath.MPContext()  # a context with its own precision; mpmath has no types
MP.dps = 35
Value = Any  # a Fraction, or a real or complex number of MP

MAX_BITS = 40_000  # of an exact power; a larger one is a number of MP
MAX_FACTORIAL = 10_000  # that is computed exactly
MAX_DEGREE = 50  # of a binomial coefficient as a polynomial
MAX_EXPONENT = 10**9  # of 2, of any number
MAX_ANGLE = 10**30
FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    **{rf"\{name}": getattr(MP, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")},
    **{rf"\arc{name}": getattr(MP, f"a{name}") for name in ("sin", "cos", "tan")},
    r"\ln": MP.log,
    r"\exp": MP.exp,
}
TRIGONOMETRIC = tuple(rf"\{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc"))


class TooLarge(ValueError):
    """The formula is read, but has no value that can be computed in a moment."""


def to_mp(value: Value) -> Value:
    """Return a number of MP."""
    if not isinstance(value, Fraction):
        return value
    number = MP.mpf(value.numerator)
    return number if value.denominator == 1 else number / value.denominator


def _both(left: Value, right: Value) -> tuple[Value, Value]:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left, right
    return to_mp(left), to_mp(right)


def add(left: Value, right: Value) -> Value:
    left, right = _both(left, right)
    return left + right


def subtract(left: Value, right: Value) -> Value:
    left, right = _both(left, right)
    return left - right


def multiply(left: Value, right: Value) -> Value:
    left, right = _both(left, right)
    return left * right


def divide(left: Value, right: Value) -> Value:
    left, right = _both(left, right)
    return left / right


def power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent.numerator) <= MAX_BITS:
            return base**exponent.numerator
    base, exponent = to_mp(base), to_mp(exponent)
    if base and abs(exponent) * (1 + abs(MP.log(abs(base)))) > MAX_EXPONENT:
        raise TooLarge("a power is too large")
    return MP.power(base, exponent)


def root(value: Value, degree: Value) -> Value:
    if isinstance(value, Fraction) and degree == 2 and value >= 0 and value.denominator.bit_length() < MAX_BITS:
        over, under = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if over * over == value.numerator and under * under == value.denominator:
            return Fraction(over, under)
    value, degree = to_mp(value), to_mp(degree)
    if MP.im(value) == 0 and MP.re(value) < 0 and degree == MP.floor(degree) and int(degree) % 2:
        return -MP.power(-value, 1 / degree)
    return MP.sqrt(value) if degree == 2 else MP.power(value, 1 / degree)


def factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) and abs(value) < MAX_FACTORIAL:
        return MP.gamma(value + 1)  # of a letter
    if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
        raise ValueError("the factorial of no whole number")
    if value > MAX_FACTORIAL:
        if value > 10**8:
            raise TooLarge("a factorial is too large")
        return MP.factorial(value.numerator)
    return Fraction(math.factorial(value.numerator))


def double_factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise ValueError("the double factorial of no whole number")
    return Fraction(math.prod(range(value.numerator, 0, -2)))


def binomial(above: Value, below: Value) -> Value:
    """Return a binomial coefficient: a polynomial of a letter above, or by the gamma function for one below."""
    is_whole = [isinstance(value, Fraction) and value.denominator == 1 for value in (above, below)]
    if not isinstance(above, Fraction) and is_whole[1] and 0 <= below <= MAX_DEGREE:
        return math.prod((above - MP.mpf(index)) / (index + 1) for index in range(below.numerator))
    if not (isinstance(above, Fraction) and isinstance(below, Fraction)):
        above, below = to_mp(above), to_mp(below)
        if max(abs(above), abs(below)) > MAX_FACTORIAL:
            raise TooLarge("a binomial coefficient is too large")
        return MP.binomial(above, below)
    if not all(is_whole):
        raise ValueError("a binomial coefficient of no whole numbers")
    if not 0 <= below <= MAX_FACTORIAL or not 0 <= above <= MAX_FACTORIAL:
        raise TooLarge("a binomial coefficient is too large")
    return Fraction(math.comb(above.numerator, below.numerator))


def common(function: Callable[..., int], values: list[Value]) -> Value:
    """Return the greatest common divisor or the least common multiple of whole numbers."""
    if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
        raise ValueError("a divisor of no whole numbers")
    return Fraction(function(*(value.numerator for value in values)))


def modulo(value: Value, divisor: Value) -> Value:
    if not all(isinstance(number, Fraction) and number.denominator == 1 for number in (value, divisor)) or divisor <= 0:
        raise ValueError("a remainder of no whole numbers")
    return value % divisor


def logarithm(value: Value, base: Value) -> Value:
    return MP.log(to_mp(value)) / MP.log(to_mp(base))


def bounded(command: str) -> Callable[[Value], Value]:
    def call(value: Value) -> Value:
        value = to_mp(value)
        if abs(value) > (MAX_ANGLE if command in TRIGONOMETRIC else MAX_EXPONENT if command != r"\ln" else MP.inf):
            raise TooLarge(f"the argument of {command} is too large")
        return FUNCTIONS[command](value)

    return call


def scaled(value: Value, scale: Fraction) -> Value:
    """Return the value times an exact scale."""
    return value if scale == 1 else multiply(value, scale)


def is_close(left: Value, right: Value, *, rounded: tuple[bool, bool] = (False, False)) -> bool:
    """Return True if two values are equal; one written as a decimal may be the other, rounded.

    Rounded means to the sixth decimal, or for a number below 1 to the sixth digit that is not zero. Two decimals are
    compared exactly, and a decimal with as many places as the exact value has is not rounded.
    """
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        if left == right:
            return True
        if rounded == (False, False):
            return False
        if _terminates(left) and _terminates(right):
            written, exact = (left, right) if rounded[0] else (right, left)
            if all(rounded) or _num_places(written) >= _num_places(exact):
                return False
    left, right = to_mp(left), to_mp(right)
    if left == right:
        return True
    difference, size = abs(left - right), max(abs(left), abs(right))
    if not MP.isfinite(difference):
        return False
    if difference <= size * MP.mpf(10) ** -25:
        return True
    if rounded == (False, False):
        return False
    return bool(difference <= MP.mpf("0.500001e-6") * min(MP.mpf(1), MP.mpf(10) ** (MP.floor(MP.log10(size)) + 1)))


def _num_places(value: Fraction) -> int:
    """Return the number of decimal places of a fraction that terminates, at most 100."""
    return next((places for places in range(100) if 10**places % value.denominator == 0), 100)


def _terminates(value: Fraction) -> bool:
    """Return True for a fraction that is a decimal with an end: its denominator has the factors 2 and 5 only."""
    denominator = value.denominator
    if denominator.bit_length() > 4096:
        return True  # a decimal of a thousand digits is no rounded one
    for prime in (5, 2):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1
