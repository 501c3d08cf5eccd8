"""Changes that a function makes to its arguments in place, carried over to the objects of its caller."""

import collections
import importlib
from typing import Any

tables: Any = importlib.import_module("jail_tables")  # beside this file, which is in no package inside the sandbox


def is_changeable(value: Any) -> bool:
    """Return True if a plain value is, or holds, one that a function can change in place."""
    if isinstance(value, list | dict | set | bytearray | collections.deque) or tables.is_table(value):
        return True
    return isinstance(value, tuple) and any(is_changeable(item) for item in value)


def assign(target: Any, value: Any) -> None:
    """Give `target` the contents of `value` in place, as a function that changed it did; nested ones too."""
    if type(target) is not type(value):
        return
    if isinstance(target, tuple):
        for old, new in zip(target, value, strict=False):
            assign(old, new)
    elif isinstance(target, list):
        target[:] = [_keep(target[index] if index < len(target) else None, new) for index, new in enumerate(value)]
    elif isinstance(target, dict):
        kept = {key: _keep(target.get(key), new) for key, new in value.items()}
        target.clear()
        target.update(kept)
    elif isinstance(target, set):
        target.clear()
        target.update(value)
    elif isinstance(target, bytearray):
        target[:] = value
    elif isinstance(target, collections.deque):
        target.clear()
        target.extend(value)
    elif tables.is_table(target):
        tables.assign(target, value)


def _keep(old: Any, new: Any) -> Any:
    """Return the old object with the new contents where it can have them, so that other names of it see the change."""
    if type(old) is type(new) and (isinstance(old, list | dict | set | bytearray) or _fits(old, new)):
        assign(old, new)
        return old
    return new


def _fits(old: Any, new: Any) -> bool:
    """Return True for two tables, or two arrays of the same form."""
    if not tables.is_table(old):
        return False
    return type(old).__name__ != "ndarray" or (old.shape, old.dtype) == (new.shape, new.dtype)
