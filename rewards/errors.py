"""The error of a grader that could not do its work, which says nothing about the completion."""

import traceback
from pathlib import Path


class RewardError(RuntimeError):
    """A reward could not be computed. A batch function may return one as the value of a completion."""


def describe_error(error: BaseException) -> str:
    """Return a grader's error as one line, with the place that raised it unless the error is a RewardError.

    >>> describe_error(RewardError("no answer\nfrom the server"))
    'RewardError: no answer from the server'
    """
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or isinstance(error, RewardError):
        return line
    return f"{line} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
