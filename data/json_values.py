"""JSON values of files: JSON text without repeated keys, and the values of tables that JSON has no form of.

Rows hold JSON values alone: rewards receive them in other processes, and commands write them into files.
"""

import json
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from rekatrain.data.errors import InputError


def parse_json(text: bytes) -> object:
    """Return the value of a JSON text, or the error of one that cannot be parsed."""
    try:
        return _DECODER.decode(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return InputError(f"it is not UTF-8: {error.reason} at byte {error.start}")
    except InputError as error:
        return error
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        # The parser counts lines within its text, so its line 1 would contradict the line number in the file.
        return InputError(f"it is not valid JSON: {str(error).replace('line 1 ', '')}")


def table_value(record: object) -> object:
    """Return a record of a table as a JSON value, or the InputError of a cell that has none.

    Dates and times become ISO 8601 texts, decimals texts, durations seconds, and bytes of UTF-8 texts.
    """
    try:
        return _json_value(record, "")
    except InputError as error:
        return error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"an object has the key {twice!r} twice, and only one of the values could be used: remove one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _json_value(value: object, name: str) -> object:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: _json_value(item, name or str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, name) for item in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name} holds bytes that are not UTF-8: remove the column from the file") from error
    raise InputError(f"{name} holds a value of type {type(value).__name__}: remove the column from the file")
