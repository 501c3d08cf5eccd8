"""Leave out rows by the values of their columns: a recipe's `only`."""

from collections.abc import Mapping
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row

RANGE_KEYS = ("min", "max")


def check_only(only: Mapping[str, Any]) -> None:
    """Raise InputError unless each value is a value, a list of values, or a range `{min: 0.2, max: 0.8}`."""
    for column, wanted in only.items():
        if isinstance(wanted, Mapping):
            is_range = wanted and all(key in RANGE_KEYS and _is_number(bound) for key, bound in wanted.items())
            if not is_range:
                raise InputError(
                    f"only.{column} must be a value, a list, or {{min: ..., max: ...}}, not {dict(wanted)}"
                )
        elif wanted is None or wanted == []:
            raise InputError(f"only.{column} is empty: write the values to keep, or remove it")


def keeps(row: Row, only: Mapping[str, Any]) -> bool:
    """Return True if each column that `only` names has a wanted value; a missing column has none.

    >>> keeps(Row(messages=[], columns={"pass_rate": 0.5}), {"pass_rate": {"min": 0.2, "max": 0.8}})
    True
    """
    for column, wanted in only.items():
        value = row.columns.get(column)
        if isinstance(wanted, Mapping):
            if not _is_number(value) or not wanted.get("min", value) <= value <= wanted.get("max", value):
                return False
        elif value is None or value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
