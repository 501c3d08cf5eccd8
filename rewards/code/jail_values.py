"""Values as JSON, between the sandbox of a solution and that of its tests.

Plain values cross by value; a subclass is sent as its base: a Counter equals the dict, a namedtuple the tuple. Any
other object is held where it is, and the other side gets its number.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import itertools
from collections.abc import Callable, Iterator
from typing import Any

SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
BUILTIN_TYPES = {value: name for name, value in vars(builtins).items() if isinstance(value, type)}
MAX_ITEMS = 100_000  # read from an iterator
Hold = Callable[[Any], Any]  # returns how the other side refers to an object


def encode(value: Any, hold: Hold) -> Any:
    """Return a plain value as JSON; hold any other value and return its handle."""
    if value is None or isinstance(value, bool | str):
        return str.__str__(value) if isinstance(value, str) else value  # json.dumps escapes half a surrogate pair
    if isinstance(value, int):
        return {"int": hex(int(value))}
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes | bytearray):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key, hold), encode(item, hold)] for key, item in value.items()]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, hold) for item in value]}
    if isinstance(value, type) and value in BUILTIN_TYPES:
        return {"type": BUILTIN_TYPES[value]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    library = _encode_library(value)
    if library is not None:
        return library
    if isinstance(value, Iterator):
        return {"iterator": [encode(item, hold) for item in itertools.islice(value, MAX_ITEMS)]}
    return {"handle": hold(value)}


def _encode_library(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return {"decimal": decimal.Decimal.__str__(value)}
    if isinstance(value, fractions.Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    if isinstance(value, datetime.datetime):  # before date, its base
        return None if value.tzinfo not in (None, datetime.UTC) else {"datetime": datetime.datetime.isoformat(value)}
    if isinstance(value, datetime.date):
        return {"date": datetime.date.isoformat(value)}
    if isinstance(value, datetime.time):
        return None if value.tzinfo is not None else {"time": datetime.time.isoformat(value)}
    if isinstance(value, datetime.timedelta):
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    return None


def decode(tree: Any, open_handle: Callable[[Any], Any]) -> Any:
    """Return the value that `encode` encoded; raise some exception for any other input."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind in SIMPLE:
        return SIMPLE[kind](content)
    if kind == "handle":
        return open_handle(content)
    if kind == "dict":
        return {decode(key, open_handle): decode(item, open_handle) for key, item in content}
    items = [decode(item, open_handle) for item in content]
    return iter(items) if kind == "iterator" else SEQUENCES[kind](items)


SIMPLE: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "float": float.fromhex,
    "complex": lambda content: complex(*map(float.fromhex, content)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "type": lambda content: next(value for value, name in BUILTIN_TYPES.items() if name == content),
    "range": lambda content: range(*content),
    "decimal": decimal.Decimal,
    "fraction": lambda content: fractions.Fraction(*content),
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda content: datetime.timedelta(*content),
}


def is_changeable(value: Any) -> bool:
    """Return True if a plain value is, or holds, one that a function can change in place."""
    if isinstance(value, list | dict | set | bytearray | collections.deque):
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


def _keep(old: Any, new: Any) -> Any:
    """Return the old object with the new contents where it can have them, so that other names of it see the change."""
    if type(old) is type(new) and isinstance(old, list | dict | set | bytearray):
        assign(old, new)
        return old
    return new
