"""The side of the solution: it runs the code, then answers what the tests request of it, until they are done."""

import asyncio
import builtins
import importlib
import json
import operator
import sys
from collections.abc import Callable
from typing import Any, TextIO

values: Any = importlib.import_module("jail_values")  # beside this file, which is in no package inside the sandbox

BUILTIN_ERRORS = {name for name, value in vars(builtins).items() if isinstance(value, type)}


class Remote:
    """An object of the tests: a function that they have passed, or an object of a class of theirs."""

    def __init__(self, number: int, exchange: Callable[..., Any]) -> None:
        self.__dict__.update(_number=number, _exchange=exchange)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._exchange("call", self._number, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._exchange("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._exchange("set", self._number, name, value)


BINARY = "eq ne lt le gt ge add sub mul truediv floordiv mod getitem setitem delitem contains neg"
OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in BINARY.split()},
    "len": len,
    "str": str,
    "repr": repr,
    "bool": bool,
    "iter": iter,
    "hash": hash,
    "abs": abs,
    "int": int,
    "float": float,
    "isinstance": isinstance,
    "await": lambda value: asyncio.run(_wait(value)),
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value: type(value).__exit__(value, None, None, None),
}


async def _wait(value: Any) -> Any:
    return await value


class Solution:
    """The names that the code has defined, and the objects of which the tests have a handle."""

    def __init__(self, calls: TextIO, answers: TextIO) -> None:
        self.calls, self.answers = calls, answers
        self.held: list[Any] = []
        # A module of that name, as dataclasses look up annotations there.
        self.module = sys.modules["solution"] = type(sys)("solution")
        self.module.__dict__["__builtins__"] = builtins
        self.operations: dict[str, Callable[..., Any]] = {
            "name": lambda name: self.module.__dict__[name],
            "call": lambda function, positional, named: function(*positional, **named),
            "get": getattr,
            "set": setattr,
            "operator": lambda name, *operands: OPERATORS[name](*operands),
        }

    def load(self, sources: list[str]) -> None:
        """Run the first of `sources` that is valid Python."""
        for source in sources:
            try:
                code = compile(source, "solution.py", "exec")
            except (SyntaxError, ValueError):
                continue
            exec(code, self.module.__dict__)
            break

    def hold(self, value: Any) -> Any:
        """Return the description of an object for the tests."""
        if isinstance(value, Remote):
            return ["local", value._number]
        self.held.append(value)
        kind = "awaitable" if hasattr(type(value), "__await__") else "object"
        described = {"number": len(self.held) - 1, "class": type(value).__name__, "kind": kind}
        if isinstance(value, type) and issubclass(value, Exception):
            described |= {"kind": "exception", "mro": [base.__name__ for base in value.__mro__]}
        return described

    def open(self, handle: Any) -> Any:
        """Return the object of a handle: one that is held here, or one of the tests."""
        return self.held[handle] if isinstance(handle, int) else Remote(handle[1], self.exchange)

    def serve(self) -> None:
        """Answer until the tests are done."""
        for line in self.calls:
            self.answer(json.loads(line))

    def answer(self, tree: Any) -> None:
        """Do one operation for the tests, and write its result or its error."""
        operation, *arguments = values.decode(tree, self.open)
        changeable = [item for item in _arguments(operation, arguments) if values.is_changeable(item)]
        try:
            before = [values.encode(item, id) for item in changeable]
            value = self.operations[operation](*arguments)
            answer: dict[str, Any] = {"value": values.encode(value, self.hold)}
            if [values.encode(item, id) for item in changeable] != before:
                answer["changed"] = [values.encode(item, self.hold) for item in changeable]
            text = json.dumps(answer)
        except Exception as error:
            text = json.dumps({"error": self.describe(error)})
        self.write(text)

    def exchange(self, *request: Any) -> Any:
        """Have the tests do something with an object of theirs; meanwhile they may call this side again."""
        self.write(json.dumps({"request": values.encode(list(request), self.hold)}))
        for line in self.calls:
            tree = json.loads(line)
            if isinstance(tree, dict) and "reply" in tree:
                return values.decode(tree["reply"], self.open)
            if isinstance(tree, dict) and "raise" in tree:
                kind = getattr(builtins, str(tree["raise"][0]), RuntimeError)
                raise (kind if issubclass(kind, Exception) else RuntimeError)(tree["raise"][1])
            self.answer(tree)
        raise SystemExit  # the tests have ended

    def describe(self, error: Exception) -> dict[str, Any]:
        """Return what the tests need to raise an error as the solution did."""
        try:
            arguments = [values.encode(item, _no_handle) for item in error.args]
        except Exception:
            arguments = [str(error)]
        attributes = {}
        for name, value in vars(error).items():
            try:
                attributes[name] = values.encode(value, _no_handle)
            except TypeError:
                continue
        mro = [base.__name__ for base in type(error).__mro__]
        return {"mro": mro, "args": arguments, "text": str(error)[:10_000], "attributes": attributes}

    def write(self, text: str) -> None:
        """Write one line to the tests."""
        self.answers.write(text + "\n")
        self.answers.flush()


def _arguments(operation: str, arguments: list[Any]) -> list[Any]:
    """Return the plain arguments of a call, in the order in which the tests list them."""
    if operation != "call":
        return []
    return [*arguments[1], *arguments[2].values()]


def _no_handle(value: Any) -> Any:
    raise TypeError(f"no plain value: {type(value).__name__}")


def serve(sources: list[str], calls: TextIO, answers: TextIO) -> None:
    """Run the solution, then answer the tests."""
    solution = Solution(calls, answers)
    solution.load(sources)
    solution.serve()
