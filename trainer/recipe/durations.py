"""Durations in a recipe: seconds, `3h50m`, or `03:50:00` as Slurm writes it."""

import re

from rekatrain.data.errors import InputError

UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
YEAR = 365 * 86_400


def seconds_of(time_limit: float | str | None) -> float | None:
    """Return a duration in seconds; None stays None. InputError for other text, and for 0, nan and more than a year.

    >>> [seconds_of(text) for text in (90, "3h50m", "03:50:00", "1-00:00:00")]
    [90.0, 13800.0, 13800.0, 86400.0]
    """
    if time_limit is None:
        return None
    if isinstance(time_limit, str):
        found = CLOCK.fullmatch(time_limit) or (UNITS.fullmatch(time_limit) if time_limit else None)
        parts = [int(part or 0) for part in found.groups()] if found else []
        seconds = float(sum(part * unit for part, unit in zip(parts, (86_400, 3_600, 60, 1), strict=False)))
    else:
        seconds = float(time_limit)
    if not 0 < seconds <= YEAR:
        raise InputError(f"time_limit is {time_limit!r}: write seconds, 3h50m, or 03:50:00; at most a year")
    return seconds
