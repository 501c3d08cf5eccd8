"""Objects and classes of the solution, as its tests see them.

A class of the solution is a class here, too, with the same name and bases, so that `isinstance` and `type(x) is Point`
hold; its attributes and its calls are those of the solution.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

READABLE = ("__name__", "__qualname__", "__dict__", "__cause__")  # of the names that Python gives a meaning


class Proxy(type):
    """The class of the classes of the solution."""

    _is_remote = True

    @property
    def _number(cls) -> int:
        return int(cls.__dict__["_class_number"])

    @property
    def _link(cls) -> Any:
        return cls.__dict__["_class_link"]

    def __call__(cls, *positional: Any, **named: Any) -> Any:
        return cls._link.request("call", cls, positional, named)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return cls._link.request("get", cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        cls._link.request("set", cls, name, value)

    @property
    def __signature__(cls) -> inspect.Signature:
        signature: inspect.Signature = cls._link.about(cls).signature
        return signature

    def __bool__(cls) -> bool:
        return True

    def __len__(cls) -> int:
        return int(cls._link.request("operator", "len", cls))

    def __iter__(cls) -> Iterator[Any]:
        return iter(cls._link.request("operator", "iter", cls))

    def __getitem__(cls, key: Any) -> Any:
        return cls._link.request("operator", "getitem", cls, key)

    def __contains__(cls, value: Any) -> bool:
        return bool(cls._link.request("operator", "contains", cls, value))


class Handle:
    """An object of the solution: it can be called, and has attributes.

    is_open: the tests name its class, and so can use its operators; is_iterator: they can iterate over it anyway;
    is_derived: it is also a list, a dict or such, and equals the plain values that have its contents
    """

    _is_remote = True
    __slots__ = ("__weakref__", "_is_derived", "_is_iterator", "_is_open", "_link", "_number")

    def __init__(self, number: int, link: Any, **flags: bool) -> None:
        for name, value in {"number": number, "link": link, **flags}.items():
            object.__setattr__(self, f"_{name}", value)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._link.request("call", self, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in READABLE:
            raise AttributeError(name)
        return self._link.request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.request("set", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._link.request("operator", "delattr", self, name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Handle):
            return self._is_derived and bool(self._link.request("operator", "plain", self) == other)
        if self._number == other._number:
            return True
        return self._is_open and other._is_open and bool(self._link.request("operator", "eq", self, other))

    def __hash__(self) -> int:
        return int(self._operate("hash")) if self._is_open else int(self._number)

    def __bool__(self) -> bool:
        return bool(self._operate("bool")) if self._is_open else True

    def __str__(self) -> str:
        return str(self._operate("str")) if self._is_open else object.__repr__(self)

    def __repr__(self) -> str:
        return str(self._operate("repr")) if self._is_open else object.__repr__(self)

    def __format__(self, form: str) -> str:
        return str(self._operate("format", form)) if self._is_open else object.__repr__(self)

    def __radd__(self, other: Any) -> Any:
        # The start of `sum`. With any other value, `abs(f(x) + -3.14) < 1e-6` would be for the solution to decide.
        return self._operate("radd", 0) if type(other) is int and other == 0 else NotImplemented

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        return self._link.request("operator", "anext", self)

    async def __aenter__(self) -> Any:
        return self._link.request("operator", "aenter", self)

    async def __aexit__(self, *_: Any) -> Any:
        return self._link.request("operator", "aexit", self)

    def __copy__(self) -> Any:
        return self._link.request("operator", "copy", self)

    def __deepcopy__(self, _: Any) -> Any:
        return self._link.request("operator", "deepcopy", self)

    def _operate(self, name: str, *operands: Any) -> Any:
        is_free = name in ("enter", "exit") or (self._is_iterator and name in ("iter", "next"))
        if not (self._is_open or is_free):
            raise TypeError(f"the tests do not name the class of an object that they use by {name}")
        return self._link.request("operator", name, self, *operands)


class Function(Handle):
    """A function of the solution, which `inspect` takes for one."""

    __slots__ = ()
    __class__ = property(lambda self: types.FunctionType)
    __globals__: Any = property(lambda self: {})
    __signature__ = property(lambda self: self._link.about(self).signature)
    __annotations__ = property(lambda self: dict(self._link.about(self).annotations))
    __code__ = property(lambda self: self._link.about(self).code)
    __defaults__ = property(lambda self: self._link.about(self).defaults(keyword_only=False))
    __kwdefaults__ = property(lambda self: self._link.about(self).defaults(keyword_only=True))


class Method(Handle):
    """A method of an object of the solution."""

    __slots__ = ()
    __class__ = property(lambda self: types.MethodType)
    __func__ = property(lambda self: self._link.request("get", self, "__func__"))
    __self__ = property(lambda self: self._link.request("get", self, "__self__"))


class RemoteIterator:
    """An iterator of the solution, such as a generator. Items are read ahead once several were wanted."""

    _is_remote = True

    def __init__(self, number: int, link: Any) -> None:
        self._number, self._link = number, link
        self._ahead: list[Any] = []
        self._num_read = 0

    def __iter__(self) -> "RemoteIterator":
        return self

    def __next__(self) -> Any:
        if not self._ahead:
            size = 1 if self._num_read < 16 else min(self._num_read, 4_096)
            self._ahead = self._link.request("operator", "advance", self, size)[::-1]
        self._num_read += 1
        return self._ahead.pop()

    def __getattr__(self, name: str) -> Any:  # send, throw, close
        if name.startswith("_"):
            raise AttributeError(name)
        return self._link.request("get", self, name)


class Generator(RemoteIterator):
    """A generator of the solution."""

    __class__ = property(lambda self: types.GeneratorType)


FUNCTIONS = {"function": Function, "method": Method}


def make_class(name: str, bases: tuple[type, ...], number: int, link: Any, fields: list[str] | None) -> type:
    """Return a class that stands for one of the solution; fields: names of the fields of a dataclass."""
    body: dict[str, Any] = {"__slots__": (), "_class_number": number, "_class_link": link, "__module__": "solution"}
    if fields is not None:
        body["__dataclass_fields__"] = vars(dataclasses.make_dataclass("Fields", map(str, fields)))[
            "__dataclass_fields__"
        ]
    made: type = type.__call__(Proxy, name, bases or (Handle,), body)
    return made


def make_instance(kind: type, number: int, link: Any, **flags: bool) -> Handle:
    """Return an object of the solution, with the flags of Handle; `kind` is Handle for foreign classes."""
    made: Handle = object.__new__(kind)
    Handle.__init__(made, number, link, **flags)
    return made


def _unary(name: str) -> Callable[[Handle], Any]:
    return lambda self: self._operate(name)


def _with_any(name: str) -> Callable[..., Any]:
    return lambda self, *operands: self._operate(name, *operands)


def _with_handle(name: str) -> Callable[[Handle, Any], Any]:
    # With a plain value, `abs(f(x) - 3.14) < 1e-6` would be for the solution to decide.
    return lambda self, other: self._operate(name, other) if isinstance(other, Handle) else NotImplemented


for _name in ("len", "iter", "next", "reversed", "neg", "pos", "invert", "abs", "int", "float", "enter"):
    setattr(Handle, f"__{_name}__", _unary(_name))
for _name in ("getitem", "setitem", "delitem", "contains", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Handle, f"__{_name}__", _with_any(_name))
for _name in ("lt", "le", "gt", "ge", "add", "sub", "matmul", "and", "or", "xor"):
    setattr(Handle, f"__{_name}__", _with_handle(_name))
for _kind in (Handle, Function, Method):
    setattr(_kind, "__doc__", property(lambda self: self._link.request("get", self, "__doc__")))  # noqa: B010
setattr(Handle, "__rmul__", _with_any("mul"))  # noqa: B010
setattr(Handle, "__exit__", lambda self, *_: self._operate("exit"))  # noqa: B010
