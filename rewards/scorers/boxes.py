"""Find the boxes of an answer, `\\boxed{...}`, in one pass."""

import re

BRACE = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)\s*\{|[{}]")


def find_boxes(text: str) -> list[str]:
    """Return the contents of each outermost `\\boxed{...}`; "" for one that never closes.

    >>> find_boxes(r"\\boxed{\\frac{1}{2}} or \\boxed{3")
    ['\\\\frac{1}{2}', '']
    """
    return [text[start:end] for start, end in locate_boxes(text)]


def locate_boxes(text: str) -> list[tuple[int, int]]:
    """Return the start and the end of the contents of each outermost box; both the same for one that never closes."""
    opened: list[tuple[int, bool]] = []  # the start of the contents of each open brace, and True for a box
    closed: list[tuple[int, int]] = []
    if "\\boxed" not in text and "\\fbox" not in text:
        return []
    for match in BRACE.finditer(text):
        token = match.group()
        if token.startswith(("\\boxed", "\\fbox")):
            opened.append((match.end(), True))
        elif token == "{":
            opened.append((match.end(), False))
        elif token == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                while closed and closed[-1][0] > start:
                    closed.pop()
                closed.append((start, match.start()))
    unclosed = [(start, start) for start, is_box in opened if is_box]
    return sorted([*closed, *unclosed])
