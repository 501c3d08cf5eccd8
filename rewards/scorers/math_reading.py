"""Read a text as the value of an answer: whole, or not at all."""

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from rekatrain.rewards.scorers import formula as formulas
from rekatrain.rewards.scorers import math_notation, math_text, symbolic
from rekatrain.rewards.scorers.arithmetic import TooLarge
from rekatrain.rewards.scorers.formula import Formula, Unreadable
from rekatrain.rewards.scorers.math_relations import equation, inequality, intersect, is_infinite, is_interval, unite
from rekatrain.rewards.scorers.math_values import Exactly, Items, Number, Symbolic, Union

# A longer text is no answer.
MAX_LENGTH = 500
PLAIN_NUMBER = re.compile(r"([-+]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)")
PLAIN_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d{1,18})\}\{([1-9]\d{0,17})\}")
THOUSANDS = re.compile(r"(?<![\d,.])(\d{1,3})((?:,\d{3})+)(?![\d,])")
NUMERAL = re.compile(r"(?<![A-Za-z\\])(?:\(\s*)?\d[0-9A-F]*\)?_(?:\{\s*\d+\s*\}|\d)")
# Other words are prose: read as a product of their letters they would equal any anagram ("east", "seat").
PROSE = re.compile(
    r"(?<![\\\w])(?<!_\{)(?:[A-Za-z]{3,}|(?i:so|at|is|it|in|on|of|to|he|we|my|me|be|by|do|if|as|an|no|up|us|go)(?![A-Za-z]))"
)
COMMAND_WITH_WORDS = re.compile(r"\\[a-z]+\s*\{[A-Za-z .]*\}")  # \text{east}, \begin{pmatrix}
RELATION = re.compile(r"[=<>≤≥≠≈∈]")
COMMA = re.compile(r"\s*,?\s+(?:and|or)\s+|\s*[,;]\s*")
MATRIX = re.compile(r"\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}")
CLOSING = {"(": ")", "[": "]", "{": "}"}
RATIO = re.compile(r"(\d+)\s*:\s*(\d+)")
COLON = re.compile(r"\s*:\s*")
REPEATING = re.compile(r"(-?\d+\.\d*)\((\d{1,20})\)")  # 0.1(6), where it is the whole answer
DEGREES = re.compile(r"(?:\^\\circ|degrees?\s*\}?)$")
MINUS_INFINITY = re.compile(r"-\s*\\infty|^\\infty")


@lru_cache(maxsize=16_384)
def read(text: str) -> Any:
    """Return the value of a text that is an answer and no more; None for any other text, and for a false equation."""
    if len(text) > MAX_LENGTH:
        return None
    number = _read_plain(text.strip().rstrip(".")) if "..." not in text else None
    if number is not None:
        return number
    text = REPEATING.sub(r"\1\\overline{\2}", text) if REPEATING.fullmatch(text.strip(" .$")) else text
    text = math_text.respell(text)
    is_named = math_notation.SET_WORDS.search(text) is not None
    named = math_notation.read_set_words(math_text.read_words(text)) if is_named else ""
    if named:
        return unite([_read_value(named)]) if "infty" in named else _read_value(named)
    judgment = math_text.read_judgment(text)
    if judgment:
        return Exactly(kind="judgment", parts=(judgment,))
    time = math_text.read_clock(text)
    if time is not None:
        return Exactly(kind="time", parts=time, other=_read_ratio(text))
    date = math_text.read_date(text)
    if date is not None:
        return Exactly(kind="date", parts=date)
    words = math_text.TEXT.fullmatch(text)
    if words is not None:
        # The words of \text{5} or \text{(2, 3)} are mathematics.
        inside = words[1].strip()
        if re.search(r"\d", inside) and (value := _read_value(inside)) is not None:
            return value
        other = _read_value(inside) if len(inside) <= 4 else None
        return Exactly(kind="words", parts=(math_text.read_words(inside),), other=other)
    return _read_value(text)


def read_text(text: str) -> Exactly | None:
    """Return the words of an answer to a gold that is text."""
    words = math_text.read_words(text)
    return Exactly(kind="words", parts=(words,)) if words else None


def _read_plain(text: str) -> Number | None:
    match = PLAIN_NUMBER.fullmatch(text)
    if match is None:
        fraction = PLAIN_FRACTION.fullmatch(text)
        return Number(formula=formulas.constant("{}{}/{}".format(*fraction.groups()))) if fraction else None
    digits = match[2].replace(",", "").rstrip(".")
    return Number(formula=formulas.constant(match[1].strip("+") + digits), is_decimal="." in digits)


def _read_ratio(text: str) -> Number | None:
    match = RATIO.fullmatch(text)
    # 12:30 is a time, for a ratio would be written 2:5; 5:07 is none either.
    if match is None or int(match[2]) == 0 or (match[2].startswith("0") and len(match[2]) > 1):
        return None
    return Number(formula=Formula(rf"\frac{{{match[1]}}}{{{match[2]}}}"))


def _read_value(text: str) -> Any:
    """Read a respelled text: relations first, then lists, brackets and scalars."""
    if not text:
        return None
    condition = math_notation.split_condition(text)
    if condition is not None:
        return _read_condition(*condition) or _read_symbolic(text)
    round_text = math_notation.respell_intervals(text)
    if round_text != text:
        return unite([_read_value(round_text)])
    based = math_text.read_based(text)
    if based is not None:
        digits, base = based
        value = Number(formula=formulas.constant(digits)) if base == 10 else None
        return value or Exactly(kind="numeral", parts=based)
    if PROSE.search(COMMAND_WITH_WORDS.sub("", math_text.drop_unit(text)).replace(" and ", ",").replace(" or ", ",")):
        return None
    parts = split_top(text, COMMA)
    if len(parts) > 1 and not _is_thousands(text):
        return _read_list(text, parts)
    if "∪" in text:
        return unite([_read_value(part.strip()) for part in text.split("∪")]) or _read_symbolic(text)
    sides = split_top(text, RELATION)
    if len(sides) > 1:
        return _read_relation(text, sides)
    matrix = MATRIX.fullmatch(text)
    if matrix is not None:
        rows = [row for row in matrix[2].split(math_text.NEXT_ROW) if row.strip()]
        cells = [tuple(_read_value(cell.strip()) for cell in row.split("&")) for row in rows]
        if not cells or any(cell is None for row in cells for cell in row):
            return None
        return Items(brackets="matrix", items=tuple(Items(brackets="matrix", items=row) for row in cells))
    brackets = _find_brackets(text)
    if brackets:
        return _read_brackets(text, brackets)
    ratio = _read_ratio(text)
    if ratio is not None:
        return ratio
    terms = split_top(text, COLON)
    if len(terms) > 2:
        return _read_terms(terms)
    shorter = math_text.drop_unit(text)
    value = _read_scalar(shorter)
    is_angle = shorter != text and isinstance(value, Number) and DEGREES.search(text) is not None
    return replace(value, is_degrees=True) if is_angle else value


def _read_terms(terms: list[str]) -> Items | None:
    """Read a ratio such as 2:3:4 as the quotients of its terms by the first."""
    try:
        values = [Number(formula=Formula(f"({term})/({terms[0]})")) for term in terms]
    except (Unreadable, TooLarge):
        return None
    return Items(brackets=":", items=tuple(values))


def _read_condition(name: str, condition: str) -> Union | None:
    """Return the real numbers for which an inequality of the letter holds; commas join what must hold at once."""
    parts = split_top(condition.replace("∈ ", "∈"), re.compile(r"\s*[,;]\s*|\s+and\s+"))
    if not all(name in map(str.strip, split_top(part, RELATION)) for part in parts):
        return None
    parts = [part for part in parts if split_top(part, RELATION)[1:] != [r"(-\infty,\infty)"]]
    value = _read_value(" and ".join(part.strip() for part in parts))
    return value if isinstance(value, Union) else None


def _read_scalar(text: str) -> Any:
    for sign, other in ((r"\pm", r"\mp"), ("±", "∓")):
        if sign in text:
            plus = _read_value(text.replace(sign, "+").replace(other, "-"))
            minus = _read_value(text.replace(sign, "-").replace(other, "+"))
            return None if plus is None or minus is None else Items(brackets="", items=(plus, minus))
    plain = _read_plain(text.removesuffix("%").rstrip())
    is_percent = text.endswith("%")
    if plain is not None:
        return Number(formula=plain.formula, is_decimal=plain.is_decimal, is_percent=is_percent)
    text = THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), text)
    try:
        written = NUMERAL.sub(_numeral_value, text.removesuffix("%"))
        formula = Formula(written)
        formula.at(0)
    except Unreadable:
        return _read_symbolic(text)
    except TooLarge:
        return None
    return Number(formula=formula, is_percent=is_percent, is_decimal="." in text and r"\overline" not in text)


def _numeral_value(match: re.Match[str]) -> str:
    based = math_text.read_based(match.group())
    if based is None:
        raise TooLarge("a numeral without a value")
    return f"({math_text.based_value(*based)})"


def _read_list(text: str, parts: list[str]) -> Any:
    """Read the parts of a bare list; intervals and inequalities joined by "or" are a union."""
    values = [_read_value(part) for part in parts]
    if any(value is None for value in values):
        return None
    if all(isinstance(value, Union) for value in values):
        has_and = re.search(r"\sand\s", text) is not None
        return intersect(values) if has_and else unite(values)
    if " or " in text and r"\infty" in text and all(is_interval(value) for value in values):
        return unite(values)
    flat: list[Any] = []
    for value in values:
        flat.extend(value.items if isinstance(value, Items) and value.brackets == "" else [value])
    return Items(brackets="", items=tuple(flat))


def _read_relation(text: str, sides: list[str]) -> Any:
    signs = RELATION.findall(text)
    if len(signs) != len(sides) - 1 or not all(side.strip() for side in sides):
        return None
    sides = [side.strip() for side in sides]
    if set(signs) <= {"=", "≈"}:
        return equation(sides, [_read_side(side) for side in sides], signs)
    if signs == ["∈"]:
        value = _read_value(sides[1])
        return Union(parts=(value,)) if isinstance(value, Items) and value.brackets not in ("", "{}") else value
    return inequality(sides, [_read_value(side) for side in sides], signs) or _read_symbolic(text)


def _read_symbolic(text: str) -> Symbolic | None:
    return Symbolic(text=text) if symbolic.can_read(text) else None


def _read_side(side: str) -> Any:
    """Read a side of an equation, which may be a name of any length."""
    return None if PROSE.search(COMMAND_WITH_WORDS.sub("", side)) and not re.search(r"\d", side) else _read_value(side)


def _find_brackets(text: str) -> str:
    """Return the two brackets that a whole text is in, such as "[)" or "{}"; "" if it is in none."""
    opening = text[:2] if text.startswith(r"\{") else text[:1]
    closing = text[-2:] if text.endswith(r"\}") else text[-1:]
    is_whole = (
        opening in ("(", "[", r"\{") and closing in (")", "]", r"\}") and _closes_at_end(text[len(opening) - 1 :])
    )
    return opening[-1] + closing[-1] if is_whole else ""


def _read_brackets(text: str, brackets: str) -> Any:
    """Read a text in brackets; round and square ones around one value mean nothing."""
    inside = text[1 + (brackets[0] == "{") : -1 - (brackets[1] == "}")].strip()
    if not inside:
        return Items(brackets="{}", items=()) if brackets == "{}" else None
    parts = split_top(inside, re.compile(r"\s*[,;]\s*"))
    if len(parts) == 1:
        value = _read_value(inside) if brackets in ("()", "[]", "{}") else None
        if brackets != "{}":
            return value
        if value is None:
            return _read_symbolic(text)
        is_list = isinstance(value, Items) and value.brackets == ""
        return Items(brackets="{}", items=value.items if is_list else (value,))
    values = [_read_value(part) for part in parts]
    if any(value is None for value in values) or (brackets not in ("()", "[]", "{}") and len(values) != 2):
        return None
    if (brackets[0] == "[" and is_infinite(values[0])) or (brackets[1] == "]" and is_infinite(values[-1])):
        return None  # no interval contains infinity
    return Items(brackets=brackets, items=tuple(values))


def _closes_at_end(text: str) -> bool:
    """Return True if the bracket that opens a text closes at its end, not before."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return index == len(text) - 1
    return False


def split_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text at the separators that are in no bracket."""
    if separator.search(text) is None:
        return [text]
    parts, start, depth, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        if depth == 0:
            match = separator.match(text, position)
            if match is not None and match.group():
                parts.append(text[start:position])
                start = position = match.end()
                continue
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        position += 1
    return [*parts, text[start:]]


def _is_thousands(text: str) -> bool:
    """Return True if each comma of a text groups the digits of a number: 1,000 dollars, -2,500."""
    rest = THOUSANDS.sub("", text)
    return rest != text and not COMMA.search(rest)
