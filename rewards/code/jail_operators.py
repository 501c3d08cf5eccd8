"""The operations on objects of the solution that its tests request by name."""

import asyncio
import copy
import importlib
import operator
from collections.abc import Callable
from typing import Any

values: Any = importlib.import_module("jail_values")  # beside this file, which is in no package inside the sandbox

BINARY = [
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
    "getitem",
    "setitem",
    "delitem",
    "contains",
    "neg",
    "pos",
    "invert",
]
OPERATORS: dict[str, Callable[..., Any]] = {
    **{name.rstrip("_"): getattr(operator, name) for name in BINARY},
    "radd": lambda value, other: other + value,
    **{kind.__name__: kind for kind in (len, str, repr, bool, iter, next, hash, abs, int, float, reversed, format)},
    "delattr": delattr,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "plain": lambda value: values.to_plain(value),
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value: type(value).__exit__(value, None, None, None),
    "await": lambda value: run_async(value),
    "anext": lambda value: run_async(type(value).__anext__(value)),
    "aenter": lambda value: run_async(type(value).__aenter__(value)),
    "aexit": lambda value: run_async(type(value).__aexit__(value, None, None, None)),
    "advance": lambda value, size: advance(value, size),
}
LOOPS: list[asyncio.AbstractEventLoop] = []


def run_async(value: Any) -> Any:
    """Return the result of a coroutine, in a loop that lives on: asynchronous generators need that."""

    async def wait() -> Any:
        return await value

    if not LOOPS:
        LOOPS.append(asyncio.new_event_loop())
    return LOOPS[0].run_until_complete(wait())


def advance(iterator: Any, size: int) -> list[Any]:
    """Return up to `size` further items, at least one; an error after the first is raised by the next call."""
    items: list[Any] = []
    if id(iterator) in ended:
        raise ended.pop(id(iterator))
    try:
        for _ in range(size):
            items.append(next(iterator))
    except Exception as error:
        if not items:
            raise
        if not isinstance(error, StopIteration):
            ended[id(iterator)] = error
    return items


ended: dict[int, Exception] = {}  # errors of iterators that are held
