"""The objects of the tests as the solution sees them: functions, objects of classes of theirs, and standard input."""

import io
from collections.abc import Callable
from typing import Any

REMOTE_OPERATORS = (
    *("len", "iter", "next", "getitem", "setitem", "delitem", "contains", "str", "bool", "reversed", "enter"),
    *("ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "abs", "int", "float"),
)


class Remote:
    """A function that the tests have passed. It has no operators: pandas takes what can be iterated for a list."""

    _is_remote = True

    def __init__(self, number: int, exchange: Callable[..., Any]) -> None:
        self.__dict__.update(_number=number, _exchange=exchange)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._exchange("call", self._number, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name != "__name__":
            raise AttributeError(name)
        return self._exchange("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._exchange("set", self._number, name, value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote) and other._number == self._number:
            return True
        return bool(self._exchange("operator", self._number, "eq", other))

    def __hash__(self) -> int:
        return int(self._exchange("operator", self._number, "hash"))


class RemoteObject(Remote):
    """An object of a class of the tests, with its operators."""


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *operands: self._exchange("operator", self._number, name, *operands)


for _name in REMOTE_OPERATORS:
    setattr(RemoteObject, f"__{_name}__", _operator(_name))
setattr(Remote, "__doc__", property(lambda self: self._exchange("get", self._number, "__doc__")))  # noqa: B010


async def give(value: Any) -> Any:
    """Return a value, as a coroutine of the tests does."""
    return value


class Lines(io.TextIOBase):
    """Standard input, read line by line from a function that raises EOFError at its end."""

    def __init__(self, read_line: Callable[[], str]) -> None:
        self._read_line = read_line

    def readline(self, *_: Any) -> str:  # type: ignore[override]
        """Return the next line; "" at the end."""
        try:
            return self._read_line() + "\n"
        except EOFError:
            return ""

    def read(self, *_: Any) -> str:
        """Return all lines that are left."""
        return "".join(iter(self.readline, ""))
