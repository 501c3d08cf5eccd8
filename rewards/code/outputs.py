"""Compare the output of a program with the expected one: line by line, by its numbers, or by a checker program."""

import math

from rekatrain.rewards.code.launcher import Isolation, Limits
from rekatrain.rewards.code.sandbox import run_program
from rekatrain.rewards.errors import RewardError

NAMES = ("input.txt", "expected.txt", "output.txt")
# Runs a checker: a function check(input, expected, output), or a program that is given the three as files, as
# open-r1/codeforces has them, and prints 1, true or points, or ends with the exit code 0.
RUN_CHECKER = """
import sys
names = {"__name__": "__main__"}
sys.argv = ["checker.py", *NAMES]
exec(compile(SOURCE, "checker.py", "exec"), names)
if callable(names.get("check")):
    texts = [open(name).read() for name in NAMES]
    print("1" if names["check"](*texts) else "0")
"""


def is_right(output: bytes, expected: bytes, *, tolerance: float | None = None) -> bool:
    """Return True if two outputs are the same lines, apart from white space at their ends and empty lines at the end.

    tolerance: compare words instead, whatever the white space between them; two numbers may differ by that much,
    absolutely or relatively
    """
    if tolerance is None:
        return _lines(output) == _lines(expected)
    words, wanted = output.split(), expected.split()
    return len(words) == len(wanted) and all(
        word == want or _is_near(word, want, tolerance) for word, want in zip(words, wanted, strict=True)
    )


def _lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _is_near(word: bytes, want: bytes, tolerance: float) -> bool:
    try:
        one, other = float(word), float(want)
    except ValueError:
        return False
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


def ask_checker(source: str, texts: tuple[str, str, str], *, limits: Limits, isolation: Isolation) -> bool:
    """Return the verdict of a checker on input, expected output and output; raise RewardError if it has none."""
    program = f"NAMES = {NAMES!r}\nSOURCE = {source!r}\n{RUN_CHECKER}"
    files = dict(zip(NAMES, texts, strict=True))
    outcome = run_program(program, stdin=b"", limits=limits, isolation=isolation, files=files)
    words = outcome.output.split()
    if outcome.ending != "exited" or (outcome.code != 0 and not words):
        raise RewardError(f"the checker of the row gave no verdict: {outcome.ending}, exit code {outcome.code}")
    if not words:
        return outcome.code == 0
    last = words[-1].lower()
    if last in (b"true", b"ok", b"false", b"wrong"):
        return last in (b"true", b"ok")
    try:
        return float(last) > 0
    except ValueError as error:
        raise RewardError(f"the checker of the row printed {words[-1][:50]!r}, which is no verdict") from error
