"""Read a formula of numbers and letters, in LaTeX or plain, and evaluate it: exactly where it is rational.

math-verify's parser needs 1 to 50 milliseconds for such a formula, this one about 0.05: a reward reads thousands per
step. It reads a whole text or nothing, and each sign of it: a factorial, a fraction without braces. What it does not
know (matrices, sums, integrals) is left to math-verify.

>>> Formula(r"\\frac \\pi4 + 2!").at(0)
mpf('2.78539816339744830961566084581987568')
"""

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache

from rekatrain.rewards.scorers import arithmetic
from rekatrain.rewards.scorers.arithmetic import FUNCTIONS, MP, TooLarge, Value

Node = Callable[[Mapping[str, Value]], Value]

MAX_DEPTH = 40
# Where a letter stands for any real number, two formulas are compared at these points.
NUM_POINTS = 4

NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
GREEK = "alpha|beta|gamma|delta|theta|lambda|mu|omega|phi|rho|sigma|tau|varphi|ell"
NAME = re.compile(rf"(?:[A-Za-z]|\\(?:{GREEK})(?![A-Za-z]))(?:_(?:[A-Za-z0-9]|\{{[A-Za-z0-9]+\}}))?'*")
RECURRING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
COMMAND = re.compile(r"\\[A-Za-z]+")
INTEGER_FRACTION = re.compile(r"\s*\\frac\s*(?:\{\s*\d+\s*\}|\d)\s*(?:\{\s*\d+\s*\}|\d)")


class Unreadable(ValueError):
    """The text is no formula of this module's grammar."""


class Formula:
    """A formula: its text, the letters in it, and its value at each of NUM_POINTS choices of the letters."""

    def __init__(self, text: str) -> None:
        reader = _Reader(text)
        self.text = text
        self._node = reader.read()
        self.names = frozenset(reader.names)
        self._values: dict[int, Value] = {}

    def at(self, point: int) -> Value:
        """Return the value, where each letter is a real number that the index `point` chooses; raise TooLarge."""
        if point not in self._values:
            letters = {name: _choose(name, point) for name in self.names}
            try:
                self._values[point] = self._node(letters)
            except (ArithmeticError, ValueError, TypeError, NotImplementedError) as error:
                raise TooLarge(f"{self.text!r} has no value: {error}") from error
        return self._values[point]


@lru_cache(maxsize=4_096)
def _choose(name: str, point: int) -> Value:
    seed = sum(ord(character) * 31**index for index, character in enumerate(name)) * 7919 + point * 104_729
    magnitude = MP.mpf(seed % 9973 + 1000) / 3571
    return -magnitude if point % 2 else magnitude


class _Reader:
    """A recursive descent over one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0
        self.names: set[str] = set()

    def read(self) -> Node:
        node = self.sum()
        if self.peek():
            raise Unreadable(f"unexpected {self.peek()!r}")
        return node

    def peek(self) -> str:
        """Return the next character that is no space; "" at the end."""
        following = self.text[self.position : self.position + 1]
        while following.isspace():
            self.position += 1
            following = self.text[self.position : self.position + 1]
        return following

    def take(self, start: str) -> bool:
        if self.peek() == start[0] and self.text.startswith(start, self.position):
            self.position += len(start)
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise Unreadable(f"no {text!r}")

    def command(self) -> str:
        """Return the command that comes next, without moving; "" if none does."""
        match = COMMAND.match(self.text, self.position) if self.peek() == "\\" else None
        return match.group() if match else ""

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        node = self.product()
        if self.take(r"\mod"):
            node = _apply(arithmetic.modulo, node, self.signed(self.power))
            if self.names:
                raise Unreadable("a remainder of letters")
            if self.peek() in ("+", "-"):
                raise TooLarge("a remainder with two readings")
            self.depth -= 1
            return node
        while (sign := self.peek()) in ("+", "-") and sign:
            self.position += 1
            node = _apply(arithmetic.add if sign == "+" else arithmetic.subtract, node, self.product())
        self.depth -= 1
        return node

    def product(self) -> Node:
        if self.take("-"):
            return _apply(arithmetic.multiply, _constant(Fraction(-1)), self.product())
        if self.take("+"):
            return self.product()
        node = self.power()
        while True:
            if self.take("*"):
                node = _apply(arithmetic.multiply, node, self.signed(self.power))
            elif self.take("/"):
                node = _apply(arithmetic.divide, node, self.signed(self.power))
            elif self.starts_factor():
                node = _apply(arithmetic.multiply, node, self.power())
            else:
                return node

    def signed(self, read: Callable[[], Node]) -> Node:
        return _apply(arithmetic.multiply, _constant(Fraction(-1)), read()) if self.take("-") else read()

    def starts_factor(self) -> bool:
        """Return True if a factor follows without a sign; a number does so only after something else than a number."""
        following = self.peek()
        if following.isdigit() or following == ".":
            return not re.search(r"[\d.]\s*$", self.text[: self.position])
        if following == "\\":
            return self.command() not in ("", r"\rfloor", r"\rceil", r"\rvert", r"\mod")
        return following.isalpha() or following == "("

    def power(self) -> Node:
        node = self.atom()
        while (following := self.peek()) and following in "!%^":
            if self.take("!!"):
                node = _map(arithmetic.double_factorial, node)
            elif self.take("!"):
                node = _map(arithmetic.factorial, node)
            elif self.take("%"):
                node = _apply(arithmetic.divide, node, _constant(Fraction(100)))
            elif self.take("^"):
                if self.take(r"\circ") or self.take(r"{\circ}"):
                    node = _apply(arithmetic.multiply, node, _constant(MP.pi / 180))
                else:
                    node = _apply(arithmetic.power, node, self.exponent())
        return node

    def exponent(self) -> Node:
        if self.peek() == "{":
            return self.group("{", "}")
        return self.signed(self.power)

    def argument(self) -> Node:
        """Read the argument of a command: a group, one digit, one letter, or one command."""
        following = self.peek()
        if following in ("{", "("):
            return self.group(following, "}" if following == "{" else ")")
        if following.isdigit():
            self.position += 1
            return _constant(Fraction(int(following)))
        return self.atom()

    def group(self, opening: str, closing: str) -> Node:
        self.expect(opening)
        node = self.sum()
        self.expect(closing)
        return node

    def atom(self) -> Node:
        following = self.peek()
        recurring = RECURRING.match(self.text, self.position)
        if recurring:
            self.position = recurring.end()
            return _constant(_recurring_value(*recurring.groups()))
        number = NUMBER.match(self.text, self.position)
        if number:
            self.position = number.end()
            is_integer = number.group().isdigit()
            node = _constant(Fraction(int(number.group()) if is_integer else number.group()))
            if is_integer and INTEGER_FRACTION.match(self.text, self.position):
                return _apply(arithmetic.add, node, self.atom())  # 2\frac12, a mixed number
            return node
        for opening, closing in (("(", ")"), ("{", "}"), ("|", "|")):
            if following == opening:
                inside = self.group(opening, closing)
                return _map(abs, inside) if opening == "|" else inside
        name = NAME.match(self.text, self.position)
        if name:
            self.position = name.end()
            return self.letter(name.group())
        return self.apply_command()

    def letter(self, name: str) -> Node:
        if name == "e":
            return _constant(MP.e)
        if name == "i":
            return _constant(MP.mpc(0, 1))
        self.names.add(name)
        return lambda letters: letters[name]

    def apply_command(self) -> Node:
        command = self.command()
        self.position += len(command)
        if command == r"\pi":
            return _constant(+MP.pi)
        if command == r"\infty":
            return _constant(MP.inf)
        if command == r"\frac":
            return _apply(arithmetic.divide, self.argument(), self.argument())
        if command == r"\binom":
            return _apply(arithmetic.binomial, self.argument(), self.argument())
        if command == r"\sqrt":
            degree = self.group("[", "]") if self.peek() == "[" else _constant(Fraction(2))
            return _apply(arithmetic.root, self.argument(), degree)
        if command in (r"\gcd", r"\lcm"):
            function, nodes = (math.gcd if command == r"\gcd" else math.lcm), self.arguments()
            return lambda letters: arithmetic.common(function, [node(letters) for node in nodes])
        for name, rounded in ((r"floor", MP.floor), (r"ceil", MP.ceil), (r"vert", abs)):
            if command == rf"\l{name}":
                return _map(rounded, self.group_until(rf"\r{name}"))
        if command == r"\log":
            base = self.subscript() if self.take("_") else _constant(Fraction(10))
            return _apply(arithmetic.logarithm, self.function_argument(), base)
        if command in FUNCTIONS:
            exponent = self.exponent() if self.take("^") else None
            node = _map(arithmetic.bounded(command), self.function_argument())
            return node if exponent is None else _apply(arithmetic.power, node, exponent)
        raise Unreadable(f"unknown {command or self.peek()!r}")

    def arguments(self) -> list[Node]:
        self.expect("(")
        nodes = [self.sum()]
        while self.take(","):
            nodes.append(self.sum())
        self.expect(")")
        return nodes

    def group_until(self, closing: str) -> Node:
        node = self.sum()
        self.expect(closing)
        return node

    def subscript(self) -> Node:
        return self.argument()

    def function_argument(self) -> Node:
        """Read a group, or a product without signs: \\sin 2x is the sine of 2x."""
        if self.peek() in ("{", "("):
            return self.power()
        node = self.signed(self.power)
        while self.starts_factor() and self.command() not in FUNCTIONS and self.peek() != "(":
            node = _apply(arithmetic.multiply, node, self.power())
        return node


def _recurring_value(whole: str, fixed: str, period: str) -> Fraction:
    """Return the value of a decimal whose last digits repeat: 0.1\\overline{6} is 1/6."""
    value = Fraction(f"{whole or 0}.{fixed or 0}")
    return value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))


def _constant(value: Value) -> Node:
    return lambda _: value


def _map(function: Callable[[Value], Value], node: Node) -> Node:
    return lambda letters: function(node(letters))


def _apply(function: Callable[[Value, Value], Value], left: Node, right: Node) -> Node:
    return lambda letters: function(left(letters), right(letters))


def constant(text: str) -> Formula:
    """Return the formula of a decimal number or a fraction."""
    formula = Formula.__new__(Formula)
    value = Fraction(text)
    formula.text, formula.names, formula._node = text, frozenset(), _constant(value)
    formula._values = {0: value}
    return formula
