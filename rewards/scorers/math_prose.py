"""Find the answer in a text without a box: after the last word "answer" or `####`, else the last formula."""

import re
from collections.abc import Iterator
from typing import Any

from rekatrain.rewards.scorers.math_text import CLOCK, DAY_MONTH, MONTH_DAY
from rekatrain.rewards.scorers.math_values import Exactly, Items, Union

MARK = re.compile(r"\banswers?\b|####|^A:", re.IGNORECASE | re.MULTILINE)
LEAD_IN = re.compile(
    r"(?:[\s*:=_\"'`(-]|\b(?:is|are|equals|equal to|therefore|thus|simply|then|be)\b)*(?<![-(])", re.IGNORECASE
)
SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|\n")
# Bounded in length, so that a text of many signs costs time in proportion to its length.
LATEX = re.compile(
    r"\$\$([^$]{1,300})\$\$|(?<!\\)\$([^$\n]{1,300})\$|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]", re.DOTALL
)
WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
JOINED = re.compile(r"\s*(?:,?\s*(?:and|or)\b|,)\s*")
PLAIN = re.compile(
    r"(?<![\w\\.])(?:-\s?)?\(?[$€£]?-?(?:\d|\.\d|\\frac|\\sqrt)"
    r"(?:\\?[\d.,+\-*/^()=$€£%×÷·!_{}:−]|\\(?:frac|sqrt|times|cdot|pi|text|div)|[^\S\n](?=[\d.+\-*/^()=$€£%×÷·−(\\])){0,120}"
)
# A run of signs ends between two numbers, and where a sentence does.
PIECE_END = re.compile(r"[.,;:!?)]+\s+|(?<=[\d%)])\s+(?=[\d(])(?!\d+/\d)|\s+-\s+(?=[A-Za-z])")
LETTER_FOLLOWS = re.compile(r"[A-Za-z](?![A-Za-z])(?<![mgshlLJNWVA])|[A-Za-z]?\^|_")
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
NUMBER = r"(-?\d+(?:,\d{3})*(?:\.\d+)?|-?\.\d+)"
BETWEEN = r"(?:[^\d.!?\n]|[.!?]\s){0,40}?"
UNSURE = r"\b(?:or|maybe|perhaps|possibly|alternatively|might\s+be|may\s+be|could\s+(?:also\s+)?be|and/or)\b"
HEDGE = re.compile(
    rf"{NUMBER}{BETWEEN}{UNSURE}(?:{BETWEEN}{NUMBER}|\W{{1,3}}(?:{UNSURE}\W)?({'|'.join(WORDS)})\b)", re.IGNORECASE
)
# Without a mark, "or" may join the steps of a calculation: "or 20 - 4 = 16 cups".
ALTERNATIVES = re.compile(rf"{NUMBER}\W{{0,4}}(?:{UNSURE}\W{{1,4}})+{NUMBER}(?!\s*[-+*/=×]|\d)", re.IGNORECASE)
ENUMERATION = re.compile(
    rf"{NUMBER}\W{{0,5}}\band\W{{1,5}}{NUMBER}|{NUMBER}\s?,\s+{NUMBER}\s?(?:,|and\b|or\b|\.|$)", re.IGNORECASE
)


def find_answer(text: str, gold: Any) -> Iterator[str]:
    """Yield texts that may be the answer, of which the first that can be read counts; none if the text hedges."""
    marks = list(MARK.finditer(text))
    if marks:
        tail = text[marks[-1].end() :]
        tail = tail[LEAD_IN.match(tail).end() :]  # type: ignore[union-attr]  # the pattern matches ""
        line = tail.partition("\n")[0]
        end = SENTENCE_END.search(tail)
        sentence = tail[: end.start()] if end else tail
        if _hedges(line, gold, is_marked=True):
            return
        yield line.strip(" *\"'`")
        yield sentence.strip(" *\"'`")
        if end and end.group() == "!":
            yield f"{sentence}!"
        if isinstance(gold, Exactly) and gold.kind == "words":
            return
        found = False
        for formula in _formulas(tail[:2000], gold):
            found = True
            yield formula
            break
        if found:
            return
    text = text[-4000:].rstrip()
    formulas = list(_formulas(text, gold))
    if formulas and not _hedges(text[-1000:].rpartition("\n")[2], gold, is_marked=False):
        # Without a mark, 10/3 = 3.33 is a step of a calculation.
        yield formulas[-1].rpartition("=")[2] if isinstance(gold, Exactly) or "=" in formulas[-1] else formulas[-1]


def _hedges(text: str, gold: Any, *, is_marked: bool) -> bool:
    """Return True if the text names two different numbers as the answer to a gold of one."""
    if isinstance(gold, Items | Union):
        return False
    patterns = (HEDGE, ENUMERATION) if not isinstance(gold, Exactly) else (HEDGE,)
    for pattern in patterns if is_marked else (ALTERNATIVES,):
        for match in pattern.finditer(text[:1000]):
            numbers = {_value(number) for number in match.groups() if number}
            if len(numbers) > 1:
                return True
    return False


def _value(number: str) -> float:
    return float(WORDS.index(number.lower())) if number[0].isalpha() else float(number.replace(",", ""))


def _formulas(text: str, gold: Any) -> Iterator[str]:
    """Yield the formulas of a text in order; several in LaTeX that are joined by commas or "and" are one list."""
    if isinstance(gold, Exactly) and gold.kind in ("time", "date"):
        for pattern in (CLOCK,) if gold.kind == "time" else (MONTH_DAY, DAY_MONTH):
            yield from (match.group() for match in pattern.finditer(text))
        return
    segments: list[tuple[int, int, str]] = []
    for match in LATEX.finditer(text):
        inside = next(group for group in match.groups() if group is not None)
        is_price = match[2] is not None and (
            inside[-1:].isspace() or re.search(r"(?<![\\A-Za-z{])[A-Za-z]{3,}", inside)
        )
        if is_price:
            continue
        if segments and JOINED.fullmatch(text[segments[-1][1] : match.start()]):
            start, end, before = segments[-1]
            segments[-1] = (start, match.end(), f"{before}{text[end : match.start()]}{inside}")
        else:
            segments.append((match.start(), match.end(), inside))
    position = 0
    for start, end, inside in [*segments, (len(text), len(text), "")]:
        yield from _plain(text[position:start])
        if inside:
            yield inside
        position = end


def _plain(text: str) -> Iterator[str]:
    for match in PLAIN.finditer(text):
        if LETTER_FOLLOWS.match(text, match.end()):
            continue
        for piece in PIECE_END.split(match.group()):
            piece = piece.strip(" .,;:=*_{")
            piece = piece.rstrip("(+-/") if not piece.endswith(")") or "(" in piece else piece.rstrip(")(+-/ ")
            if piece.count("(") == piece.count(")") + 1 and piece.startswith("("):
                piece = piece[1:]
            if re.search(r"\d", piece):
                yield piece
