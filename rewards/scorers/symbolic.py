"""Compare two formulas by math-verify: the slow way, for what `formula` does not read."""

from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

# Seconds. A call of C that hears no signal is killed with its worker.
TIMEOUT = 1
SIGNS = {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "*": r"\cdot "}
SIGNS["%"] = r"\%"


def to_latex(text: str) -> str:
    """Return a respelled text in the spelling of LaTeX."""
    return "".join(SIGNS.get(character, character) for character in text)


def can_read(text: str) -> bool:
    """Return True if math-verify reads the text as a formula."""
    return bool(_parse(to_latex(text)))


@lru_cache(maxsize=8192)
def is_equal(gold: str, answer: str) -> bool:
    """Return True if math-verify reads two formulas and finds them equal; stops by signal.alarm, on a main thread."""
    one, other = _parse(to_latex(gold)), _parse(to_latex(answer))
    return bool(one and other and verify(one, other, timeout_seconds=TIMEOUT, allow_set_relation_comp=True))


@lru_cache(maxsize=8192)
def _parse(text: str) -> list[Any]:  # sympy objects
    # Without a fallback and without the pattern of plain numbers, a part of the text is never read for the whole.
    return parse(
        rf"\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=TIMEOUT,
    )
