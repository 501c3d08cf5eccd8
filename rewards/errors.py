"""The error of a grader that could not do its work, which says nothing about the completion."""

import reprlib
import traceback
from pathlib import Path


class RewardError(RuntimeError):
    """A reward could not be computed. A batch function may return one as the value of a completion."""


def describe_error(error: BaseException) -> str:
    """Return a grader's error as one line, with the place that raised it unless the error is a RewardError.

    >>> describe_error(RewardError("no answer\nfrom the server"))
    'RewardError: no answer from the server'
    """
    line = f"{type(error).__name__}: {_one_line(error)[:300]}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or isinstance(error, RewardError):
        return line
    return f"{line} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def format_traceback(error: BaseException) -> str:
    """Return the traceback as Python prints it; one line if the error cannot be printed."""
    try:
        return "".join(traceback.format_exception(error))
    except BaseException:  # a grader's class of errors may do anything
        return describe_error(error)


def show(value: object) -> str:
    """Return a short `repr` of any value; of its class if it has none."""
    try:
        return reprlib.repr(value)
    except BaseException:  # a grader's class may do anything
        return f"<{type(value).__name__}>"


def _one_line(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    except BaseException:  # as above
        return "its text cannot be read"
