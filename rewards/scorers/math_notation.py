"""Notations of one meaning: counting (`C_{10}^3`), repeating decimals, `gcd`, French intervals, sets by a condition."""

import re
from collections.abc import Callable

Replacement = str | Callable[[re.Match[str]], str]

# The shortest start, then the shortest period, at least twice: 1666 is 1 and 6, 121212 is 12.
PERIOD = re.compile(r"(\d{0,20}?)(\d{1,20}?)\2+")
DIGITS = r"(?:\{\s*(\d{1,4})\s*\}|(\d))"
ABOVE, BELOW = r"(\d{1,4}|\d?[nm](?:\s*[+-]\s*\d)?)", r"(\d{1,4}|[nmkr](?:\s*[+-]\s*\d)?)"


def _repeat(match: re.Match[str]) -> str:
    """Return `0.1\\overline{6}` for `0.1666...`; a decimal without a period stays as it is."""
    period = PERIOD.fullmatch(match[2])
    return rf"{match[1]}{period[1]}\overline{{{period[2]}}}" if period else match[0]


def _count(kind: str, above: str, below: str, written: str) -> str:
    """Return the number of combinations (C) or permutations (P, A) as a formula; any other text as written."""
    if above.isdecimal() and below.isdecimal() and not (int(above) >= max(2, int(below))):
        return written
    if kind == "C":
        return rf"\binom{{{above}}}{{{below}}}"
    return rf"(\frac{{({above})!}}{{({above}-({below}))!}})"


# Columns as those of math_text.SPELLING_TABLE, which these rows follow.
NOTATION_TABLE: list[tuple[str, str, Replacement]] = [
    (
        r"... … \ldots \dots \cdots \dotsc",
        r"(?<![\d.])(\d*\.)(\d{2,40})\s*(?:\.{3,}|…|\\(?:[lc]?dots|dotsc)(?![A-Za-z]))(?!\d)",
        _repeat,
    ),
    (
        r"\dot",
        r"(\d*\.\d*)\\dot\s*(?:\{\s*(\d)\s*\}|(\d))(?:(\d*)\\dot\s*(?:\{\s*(\d)\s*\}|(\d)))?",
        lambda m: rf"{m[1]}\overline{{{''.join(group or '' for group in m.groups()[1:])}}}",
    ),
    (r"\bar \overline", r"(?<=[\d.])\\(?:bar|overline)\s*(?:\{\s*(\d+)\s*\}|(\d))", r"\\overline{\1\2}"),
    (r"\choose", r"\{([^{}]{1,80})\\choose(?![A-Za-z])([^{}]{1,80})\}", r"\\binom{\1}{\2}"),
    (
        "C P",
        rf"(?<![A-Za-z\\_^])(?:(nCr|nPr|C|P)|\\text\s*\{{\s*(nCr|nPr)\s*\}})\s*\(\s*{ABOVE}\s*,\s*{BELOW}\s*\)",
        lambda m: _count((m[1] or m[2]).strip("nr"), m[3], m[4], m[0]),
    ),
    (
        "_",
        rf"(?<![A-Za-z\\])([CPA])(?:\s*_\s*{DIGITS}\s*\^\s*{DIGITS}|\s*\^\s*{DIGITS}\s*_\s*{DIGITS})(?!\s*[(\d])",
        lambda m: (
            _count(m[1], m[2] or m[3] or m[8] or m[9], m[4] or m[5] or m[6] or m[7], m[0])
            if is_count_only(m[1], m.string)
            else m[0]
        ),
    ),
    (
        "P_ P",
        r"(?:\{\}\s*|(?<![\w)}\]!]))[_^]\s*(?:\{\s*(\w+)\s*\}|(\w))\s*P\s*_\s*(?:\{\s*(\w+)\s*\}|(\w))",
        lambda m: _count("P", m[1] or m[2], m[3] or m[4], m[0]),
    ),
    (
        "C P",
        r"(?<![\w.\\])(\d{1,4})\s*([CP])\s*(\d{1,4})(?!\w|\.\d|\s*[({])",
        lambda m: _count(m[2], m[1], m[3], m[0]),
    ),
    (
        "gcd lcm GCD LCM gcf GCF hcf HCF",
        r"(?:\\text\s*\{\s*(gcd|lcm|gcf|hcf)\s*\}|(?<![A-Za-z\\])(gcd|lcm|gcf|hcf))(?=\s*\()",
        lambda m: r"\lcm" if "lcm" in m[0].lower() else r"\gcd",
    ),
    ("mod", r"(?<!\()(?:\\b?mod(?![A-Za-z])|\\text\s*\{\s*mod\s*\}|(?<![A-Za-z\\])mod(?![A-Za-z]))", r"\\mod "),
    (r"\varnothing \emptyset ∅", r"\\(?:varnothing|emptyset)(?![A-Za-z])|∅", r"\\{\\}"),
    (
        r"\angle ∠",
        r"(?:\bm\s*)?(?:\\(?:measured)?angle(?![a-z])|∠)\s*(?:\{\s*([A-Z]{1,3})\s*\}|([A-Z]{1,3}))(?=\s*=)",
        r"\\theta_{\1\2}",
    ),
]

INTERVAL = re.compile(
    r"\s*([\[\]()])((?:[^\[\]]|(?<=\\sqrt)\[[^\[\]]*\])*[,;](?:[^\[\]]|(?<=\\sqrt)\[[^\[\]]*\])*)([\[\]()])\s*"
)
INTERVAL_JOINT = re.compile(r"(∪|∈|\sor\s)")
CONDITION = re.compile(
    r"\\\{\s*([A-Za-z])\s*(?:∈\s*\(-\\infty,\\infty\)\s*)?(?:\\(?:mid|vert|colon)(?![A-Za-z])|[|:])(.+)\\\}"
)
REALS = re.compile(
    r"(?:[a-z] (?:is|can be) )?(?:(?:the )?set of )?(?:all |any |every )?(?:the )?"
    r"real(?: numbers?| values?|s| [a-z])(?: of [a-z]| [a-z])?"
)
SET_WORDS = re.compile("real|solution|empty|no such", re.IGNORECASE)
EMPTY = re.compile(
    r"(?:there (?:is|are) )?no (?:solutions?|such [a-z])(?: exists?)?|(?:the )?empty set|"
    r"(?:the|this) (?:equation|inequality|system) has no solutions?"
)


def is_count_only(letter: str, text: str) -> bool:
    """Return True if each use of a letter in a text has a number below and one above: `C_5^2`, but not C_1 e^x."""
    pair = rf"{letter}\s*(?:_\s*(?:\{{[^{{}}]*\}}|\d)\s*\^|\^\s*(?:\{{[^{{}}]*\}}|\d)\s*_)"
    is_constant = re.search(rf"{letter}\s*_\s*(?:\{{\s*[01]\s*\}}|[01])", text) is not None
    return not is_constant and len(re.findall(pair, text)) == len(re.findall(rf"(?<![A-Za-z\\]){letter}", text))


def respell_intervals(text: str) -> str:
    """Return a text with its French intervals in round brackets: `]0,1]` is `(0,1]`; any other text as it is."""
    if not ("[" in text and text.rstrip().endswith("[")) and "]" not in text:
        return text
    parts = INTERVAL_JOINT.split(text)
    for index, part in enumerate(parts):
        match = INTERVAL.fullmatch(part)
        if match is not None and (match[1] == "]" or match[3] == "["):
            opening, closing = ("(" if match[1] == "]" else match[1]), (")" if match[3] == "[" else match[3])
            parts[index] = f" {opening}{match[2]}{closing} "
    return "".join(parts).strip()


def split_condition(text: str) -> tuple[str, str] | None:
    """Return the letter and the condition of `\\{x \\mid x > 2\\}`, a set of real numbers; None for any other text."""
    match = CONDITION.fullmatch(text)
    return (match[1], match[2].strip()) if match is not None else None


def read_set_words(words: str) -> str:
    """Return the LaTeX of a set that is named in words: `all real numbers`, `no solution`; "" for other words."""
    if REALS.fullmatch(words):
        return r"(-\infty,\infty)"
    return r"\{\}" if EMPTY.fullmatch(words) else ""
