"""Texts as people write answers: one spelling of their LaTeX, and the answers that are words, dates or times."""

import re
from fractions import Fraction

from rekatrain.rewards.scorers.math_notation import NOTATION_TABLE, Replacement

# Ordered: each replacement sees the result of those before it. The first column has texts of which one is in each text
# that the pattern matches: most answers have few of them, and to look for them is faster than to try the pattern.
SPELLING_TABLE: list[tuple[str, str, Replacement]] = [
    (
        r"\left \right \middle \big \Big \displaystyle \textstyle \limits",
        r"\\(?:left|right|middle|bigl?|bigr?|Bigl?|Bigr?|displaystyle|textstyle|limits)(?![A-Za-z])\.?",
        "",
    ),
    (r"\lbrack \rbrack", r"\\[lr]brack(?![A-Za-z])", lambda m: "[" if m.group()[1] == "l" else "]"),
    (r"\lbrace \rbrace", r"\\(?:lbrace|rbrace)(?![A-Za-z])", lambda m: r"\{" if m.group()[1] == "l" else r"\}"),
    (r"\dfrac \tfrac \cfrac", r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\dbinom \tbinom", r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (
        r"\math \text \mbox \hbox \operatorname",
        r"\\(?:math(?:rm|bf|it|sf)|text(?:bf|it|rm|sf|normal)|mbox|hbox|operatorname)\s*(?=\{)",
        r"\\text",
    ),
    (r"\text", r"\\text\s*\{\s*([A-Za-z])\s*\}(?![A-Za-z])", r" \1"),  # \mathrm{e}
    (r"\! \,", r"(?<=\d)(?:\{,\}|,)?\\[!,](?=\d{3}(?!\d))", ""),  # 5,\!525 and 10\,000
    (r"{,}", r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ","),
    (" ", r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d.,])", lambda m: m[1] + m[2].replace(" ", "")),  # 10 000
    (r"\!", r"\\[!]", ""),
    (r"\ ~", r"\\[,;:> ]|\\q?quad(?![A-Za-z])|~", " "),
    (r"\text", r"\\text\s*\{\s*(,?\s*(?:and|or))\s*\}", r" \1 "),
    (r"\lor \vee", r"\\(?:lor|vee)(?![A-Za-z])", " or "),
    (r"\land \wedge", r"\\(?:land|wedge)(?![A-Za-z])", " and "),
    (
        "percent pct",
        r"\\text\s*\{\s*(?:percent|pct\.?|percentage)\s*\}|\b(?:percent|pct)\b",
        "%",
    ),
    (r"\%", r"\\[%]", "%"),
    ("$ € £ ` **", r"\\?\$|[€£`]|\*\*+(?!\s*\d)", ""),
    ("− –", r"[−–]", "-"),
    (
        r"\times \cdot \ast × · ∙ ⋅ *",
        r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·∙⋅]|\*\*?",
        lambda m: "^" if m.group() == "**" else "*",
    ),
    (r"\div ÷", r"\\div(?![A-Za-z])|÷", "/"),
    ("π pi", r"π|(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    ("∞ inf oo", r"∞|(?<![A-Za-z\\])(?:infinity|oo|inf)(?![A-Za-z])", r"\\infty "),
    ("√ sqrt", r"√|(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt"),
    (r"\le ≤ <=", r"\\(?:le|leq|leqslant)(?![A-Za-z])|≤|<=", "≤"),
    (r"\ge ≥ >=", r"\\(?:ge|geq|geqslant)(?![A-Za-z])|≥|>=", "≥"),
    (r"\ne != ≠", r"\\(?:ne|neq)(?![A-Za-z])|!=|≠", "≠"),
    (r"\lt", r"\\lt(?![A-Za-z])", "<"),
    (r"\gt", r"\\gt(?![A-Za-z])", ">"),
    (r"\approx \simeq ≈", r"\\(?:approx|simeq)(?![A-Za-z])|≈", "≈"),
    (r"\in", r"\\in(?![A-Za-z])", "∈"),
    (r"\cup", r"\\cup(?![A-Za-z])", "∪"),
    (r"\mathbb \mathbf ℝ", r"\\math(?:bb|bf)\s*\{?R\}?|ℝ", r"(-\\infty,\\infty)"),
    (r"\langle \rangle", r"\\(?:l|r)angle(?![A-Za-z])", lambda m: "(" if m.group() == r"\langle" else ")"),
    (r"\circ \degree °", r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])|°", r"^\\circ"),
    (
        "C_",  # combinations, as {}_{10}C_3
        r"(?:\{\}\s*|(?<![\w)}\]!]))[_^]\s*(?:\{\s*(\w+)\s*\}|(\w))\s*C_\s*(?:\{\s*(\w+)\s*\}|(\w))",
        lambda m: rf"\binom{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}",
    ),
    ("e E", r"(?<=\d)[eE]([+-]?\d+)(?![\w.])", r"*10^{\1}"),
    ("/", r"^(\s*-?\d+)\s+(\d+)\s*/\s*(\d+)(?=\s*$)", r"\1\\frac{\2}{\3}"),
    *NOTATION_TABLE,
]
SPELLINGS = [(tuple(starts.split()) or (starts,), re.compile(pattern), new) for starts, pattern, new in SPELLING_TABLE]
HAS_ROWS = re.compile(r"matrix|\{array")
NEXT_ROW = "⏎"  # of a matrix, in place of two backslashes
DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")
LAST_PUNCTUATION = re.compile(r"(?:\s|[.,;]|\\\\|\\[\s,;!])+$")
# Unit words after a number. "dollars" would be read as the product d*o*l*l*a*r*s.
UNIT_WORDS = re.compile(r"(?<=[\d%})\]])\s*[A-Za-z]{3,}(?:\s+[A-Za-z]{2,})*$")
UNITS = "km|mm|cm|dm|mi|ft|in|yd|kg|mg|lb|lbs|oz|gal|ml|mL|kJ|ms|hr|hrs|mph|kmh|kph|rpm|Hz|kW|sq|cu"
SHORT_UNIT = re.compile(
    rf"(?<=[\d%}})])\s*(?:{UNITS})\b\.?(?:\s*\^\s*\{{?[23]\}}?|[²³])?$|(?<=[\d}})])\s+[mgshlLJNWVA](?:\^\{{?[23]\}}?|[²³])?$"
)
RATIO_UNIT = re.compile(rf"(?<=\d)\s*(?:{UNITS}|m|g|l|L|J)/(?:s|h|hr|min|day|m|cm|kg|L|l|ml|mol)(?:\^\{{?2\}}?)?$")
TEXT_UNIT = re.compile(r"(?<=[\w%})\]])\s*\\text\s*\{[^{}\d]*\}(?:\s*\^\s*(?:\d|\{\d\}))?$")
ONE_LETTER_UNIT = re.compile(r"^([-+]?[\d.,]*\d)\s*[mgshLlJNWVA]$")
MULTIPLES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MULTIPLE = re.compile(rf"^\W{{0,4}}([-+]?[\d.,]*\d)\s*({'|'.join(MULTIPLES)})\b", re.IGNORECASE)
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
NOT_WORDS = re.compile(r"[\\\"'“”‘’(){}\[\]$.,;:!?*_`-]+")

MERIDIEM = r"(?:\s*([ap])\.?\s*m\b\.?)"
CLOCK = re.compile(rf"(\d{{1,2}}):(\d\d)(?::(\d\d))?{MERIDIEM}?|(\d{{1,2}}){MERIDIEM}", re.IGNORECASE)
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
MONTH = (
    r"(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    r"nov(?:ember)?|dec(?:ember)?)\.?"
)
DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
MONTH_DAY = re.compile(rf"{MONTH}\s+{DAY}(?:,?\s+(\d{{4}}))?", re.IGNORECASE)
DAY_MONTH = re.compile(rf"(?:the\s+)?{DAY}\s+(?:of\s+)?{MONTH}(?:,?\s+(\d{{4}}))?", re.IGNORECASE)
SENTENCE = re.compile(r"[.!?;:\n]+(?:\s|$)|,\s")
JUDGMENTS = ("yes", "no", "true", "false")


def respell(text: str) -> str:
    """Return the text with one spelling of each sign, without decoration, units or final punctuation."""
    text = text.replace("\\\\", NEXT_ROW) if HAS_ROWS.search(text) else DOUBLED.sub(r"\\", text)
    for starts, pattern, replacement in SPELLINGS:
        for start in starts:
            if start in text:
                text = pattern.sub(replacement, text)
                break
    return " ".join(LAST_PUNCTUATION.sub("", text).split()).strip("*_ ")


def drop_unit(text: str) -> str:
    """Return a respelled text without the unit at its end, if it has one: `5 \\text{ cm}^2`, `12 m/s`, `90^\\circ`."""
    for pattern in (RATIO_UNIT, TEXT_UNIT, SHORT_UNIT, UNIT_WORDS):
        shorter = pattern.sub("", text).strip()
        if shorter and shorter != text:
            return shorter
    is_angle = text.endswith(r"^\circ") and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)
    return text[: -len(r"^\circ")].strip() if is_angle else text


def read_words(text: str) -> str:
    """Return the words of an answer that is text, folded: `\\text{(June 20th)}` gives `june 20th`."""
    return " ".join(NOT_WORDS.sub(" ", TEXT.sub(r" \1 ", text)).casefold().split())


def read_judgment(text: str) -> str:
    """Return yes, no, true or false if the answer is that word, or a sentence that opens with it; else ""."""
    sentences = [
        read_words(sentence).split() for sentence in re.split(r"[.!?;:\n]+(?:\s|$)|,\s", TEXT.sub(r"\1", text))
    ]
    if not sentences or len(sentences[0]) != 1 or sentences[0][0] not in JUDGMENTS:
        return ""
    # "Yes. No." and "Yes, or no" are no answers; "Yes, there is no other" is.
    openings = {word for words in sentences for word in words[:2] if word in JUDGMENTS}
    return sentences[0][0] if openings == {sentences[0][0]} else ""


def read_clock(text: str) -> tuple[int, int, int, str] | None:
    """Return the hour, minute, second and "a", "p" or "" of a time of day: `12:00`, `5:00 \\text{ p.m.}`, `noon`."""
    text = " ".join(TEXT.sub(r" \1 ", text).split()).strip(" .")
    named = {"noon": (12, 0, 0, "p"), "12 noon": (12, 0, 0, "p"), "midnight": (12, 0, 0, "a")}.get(text.casefold())
    if named is not None:
        return named
    match = CLOCK.fullmatch(text.removesuffix(" noon"))
    if match is None:
        return None
    hour = int(match[1] or match[5])
    minute, second = int(match[2] or 0), int(match[3] or 0)
    half = (match[4] or match[6] or "").lower()
    if hour > 24 or minute > 59 or second > 59 or (half and not 1 <= hour <= 12):
        return None
    if hour > 12:
        return hour - 12, minute, second, "p"
    if hour == 0:
        return 12, minute, second, "a"
    return hour, minute, second, half


def read_date(text: str) -> tuple[int, int, str] | None:
    """Return the month, the day and the year ("" if not given) of `June 20`, `20th of June` or `June 20, 2024`."""
    text = " ".join(TEXT.sub(r" \1 ", text).split()).strip(" .")
    first, last = MONTH_DAY.fullmatch(text), DAY_MONTH.fullmatch(text)
    if first is None and last is None:
        return None
    month, day, year = first.groups() if first is not None else (last[2], last[1], last[3])  # type: ignore[index]
    return MONTHS.index(month[:3].lower()) + 1, int(day), year or ""


DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
BASE_NAMES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()  # noqa: SIM905
BASED = re.compile(
    r"(?:\(\s*)?(?:\\text\s*\{)?\s*([0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\s*\}?\s*\)?\s*(?:_\s*(?:\{\s*(?:\\text\s*\{)?\s*([^{}]*?\}?[^{}]*?)\s*\}?\s*\}|(\d))"
    r"|(?:\\text\s*\{)?\s*(?:in\s+)?base[ -]([a-z]+|\d+)\s*\}?)",
    re.IGNORECASE,
)

PREFIXES = {"b": 2, "o": 8, "x": 16}
PREFIXED = re.compile(r"0([box])([0-9a-f]+)", re.IGNORECASE)  # 0b1010


def read_based(text: str) -> tuple[str, int] | None:
    """Return the digits and the base of a numeral that names its base: `25_6`, `1A_{16}`, `101 (base 2)`."""
    prefixed = PREFIXED.fullmatch(text)
    if prefixed is not None:
        text = f"{prefixed[2]}_{{{PREFIXES[prefixed[1].lower()]}}}"
    match = BASED.fullmatch(text.replace("(base", "base").rstrip(")") if "(base" in text else text)
    if match is None:
        return None
    name = (
        (match[2] or match[3] or match[4] or "").lower().replace("}", "").strip("() ").removeprefix("base").strip(" -")
    )
    base = int(name) if name.isdecimal() else BASE_NAMES.index(name) + 2 if name in BASE_NAMES else 0
    digits = match[1].lower().lstrip("0") or "0"
    if (
        not 2 <= base <= 36
        or not digits[0].isalnum()
        or any(DIGITS.find(digit) >= base for digit in digits.replace(".", ""))
    ):
        return None
    return digits, base


def based_value(digits: str, base: int) -> Fraction:
    """Return the value of the digits in that base."""
    return Fraction(int(digits, base))
