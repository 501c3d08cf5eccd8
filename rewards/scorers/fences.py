"""Find the fenced blocks of an answer, in one pass over its lines."""

import re
from dataclasses import dataclass

OPENING = re.compile(r"[ \t]*```[ \t]*([^\n`]*)$")
CLOSING = re.compile(r"[ \t]*```[ \t]*$")


@dataclass(frozen=True, kw_only=True)
class Fence:
    """A fenced block: what follows the opening fence, its text, and where the whole block starts and ends."""

    info: str
    code: str
    start: int
    end: int


def find_fences(text: str) -> list[Fence]:
    """Return the closed fenced blocks of a text, in order; a block ends at the first line with nothing but a fence.

    >>> find_fences("So:\\n```python\\nx = 1\\n```")[0].code
    'x = 1\\n'
    """
    fences: list[Fence] = []
    opened: tuple[str, int, int] | None = None  # info, start of the block, start of its text
    position = 0
    for line in text.split("\n"):
        following = min(position + len(line) + 1, len(text))
        if opened is not None:
            if CLOSING.match(line):
                info, start, inside = opened
                fences.append(Fence(info=info, code=text[inside:position], start=start, end=position + len(line)))
                opened = None
        elif opening := OPENING.match(line):
            opened = (opening[1].strip(), position, following)
        position = following
    return fences
