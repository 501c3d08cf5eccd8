"""Objects of the solution, as its tests see them."""

from collections.abc import Callable
from typing import Any


class Handle:
    """An object of the solution: it can be called, and has attributes. `is_open`: the tests name its class."""

    def __init__(self, number: int, link: Any, is_open: bool) -> None:
        self.__dict__.update(_number=number, _link=link, _is_open=is_open)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._link.request("call", self, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in ("__name__", "__doc__", "__dict__"):
            raise AttributeError(name)
        return self._link.request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.request("set", self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Handle):
            return False
        if self._number == other._number:
            return True
        return self._is_open and other._is_open and bool(self._link.request("operator", "eq", self, other))

    def __hash__(self) -> int:
        return int(self._operate("hash")) if self._is_open else self._number

    def __bool__(self) -> bool:
        return bool(self._operate("bool")) if self._is_open else True

    def __str__(self) -> str:
        return str(self._operate("str")) if self._is_open else object.__repr__(self)

    def __repr__(self) -> str:
        return str(self._operate("repr")) if self._is_open else object.__repr__(self)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Handle) and bool(self._link.request("operator", "isinstance", value, self))

    def _operate(self, name: str, *operands: Any) -> Any:
        if not self._is_open:
            raise TypeError(f"the tests do not name the class of an object that they use by {name}")
        return self._link.request("operator", name, self, *operands)


def _unary(name: str) -> Callable[[Handle], Any]:
    return lambda self: self._operate(name)


def _with_any(name: str) -> Callable[..., Any]:
    return lambda self, *operands: self._operate(name, *operands)


def _with_handle(name: str) -> Callable[[Handle, Any], Any]:
    # With a plain value, `abs(f(x) - 3.14) < 1e-6` would be for the solution to decide.
    return lambda self, other: self._operate(name, other) if isinstance(other, Handle) else NotImplemented


for _name in ("len", "iter", "neg", "abs", "int", "float", "enter"):
    setattr(Handle, f"__{_name}__", _unary(_name))
for _name in ("getitem", "setitem", "delitem", "contains", "mul", "truediv", "floordiv", "mod"):
    setattr(Handle, f"__{_name}__", _with_any(_name))
for _name in ("lt", "le", "gt", "ge", "add", "sub"):
    setattr(Handle, f"__{_name}__", _with_handle(_name))
setattr(Handle, "__rmul__", _with_any("mul"))  # noqa: B010
setattr(Handle, "__exit__", lambda self, *_: self._operate("exit"))  # noqa: B010
