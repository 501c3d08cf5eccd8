"""The jobs inside the sandbox: a program, a solution that answers calls, or the tests that call it.

A solution and its tests are in two sandboxes. The tests call the solution's functions over a pipe, by value, and
compare the results in their own process. So a solution can neither see nor change the expected values, an object that
claims to equal everything arrives as an opaque handle that equals nothing, and its printed output is not read.
"""

import ast
import builtins
import collections
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# Types that cross the pipe by value. A subclass is sent as its base: a Counter equals the dict, a namedtuple the tuple.
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
BUILTIN_TYPES = {value: name for name, value in vars(builtins).items() if isinstance(value, type)}
MAX_ITEMS = 100_000  # read from an iterator


def run(job: dict[str, Any], channels: list[int]) -> None:
    """Run the job of this sandbox; never return."""
    sys.setrecursionlimit(10_000 if job["kind"] == "program" else 3_000)
    if job["kind"] == "program":
        run_program(job["source"])
    elif job["kind"] == "solution":
        serve(job["sources"], os.fdopen(channels[0]), os.fdopen(channels[1], "w"))
    else:
        run_tests(job, os.fdopen(channels[0]), os.fdopen(channels[1], "w"), channels[2])
    sys.stdout.flush()
    os._exit(0)


def run_program(source: str) -> None:
    """Run a whole program, as `python program.py` would."""
    sys.argv = ["program.py"]
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__dict__["__builtins__"] = builtins
    exec(compile(source, "program.py", "exec"), main.__dict__)


# The side of the solution


def serve(sources: list[str], calls: TextIO, answers: TextIO) -> None:
    """Run the first of `sources` that is valid Python, then answer calls until the tests are done."""
    names: dict[str, Any] = {"__name__": "solution"}
    for source in sources:
        try:
            code = compile(source, "solution.py", "exec")
        except (SyntaxError, ValueError):
            continue
        exec(code, names)
        break
    held: list[Any] = []  # objects of which the tests have a handle

    def hold(value: Any) -> int:
        held.append(value)
        return len(held) - 1

    for line in calls:
        operation, *arguments = decode(json.loads(line), held.__getitem__)
        try:
            value = OPERATIONS[operation](names, *arguments)
            text = json.dumps(encode(value, hold))
        except Exception as error:
            text = json.dumps({"error": type(error).__name__})
        answers.write(text + "\n")
        answers.flush()


OPERATIONS: dict[str, Callable[..., Any]] = {
    "name": lambda names, name: names[name],
    "call": lambda names, function, positional, named: function(*positional, **named),
    "get": lambda names, held, name: getattr(held, name),
    "set": lambda names, held, name, value: setattr(held, name, value),
}


def encode(value: Any, hold: Callable[[Any], int]) -> Any:
    """Return a plain value as JSON; hold any other value and return its handle."""
    if value is None or isinstance(value, bool | str):
        return value  # json.dumps escapes half a surrogate pair, and json.loads restores it
    if isinstance(value, int):
        return {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key, hold), encode(item, hold)] for key, item in value.items()]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, hold) for item in value]}
    if isinstance(value, type) and value in BUILTIN_TYPES:
        return {"type": BUILTIN_TYPES[value]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Iterator):
        return {"iterator": [encode(item, hold) for item in itertools.islice(value, MAX_ITEMS)]}
    return {"handle": value.number if isinstance(value, Handle) else hold(value)}


def decode(tree: Any, open_handle: Callable[[int], Any]) -> Any:
    """Return the value that `encode` encoded; raise some exception for any other input."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "type":
        return next(value for value, name in BUILTIN_TYPES.items() if name == content)
    if kind == "range":
        return range(*content)
    if kind == "handle":
        return open_handle(content)
    if kind == "dict":
        return {decode(key, open_handle): decode(item, open_handle) for key, item in content}
    items = [decode(item, open_handle) for item in content]
    return iter(items) if kind == "iterator" else SEQUENCES[kind](items)


# The side of the tests


class Handle:
    """An object of the solution that is no plain value: it can be called, has attributes, and equals only itself."""

    def __init__(self, number: int, request: Callable[..., Any]) -> None:
        self.__dict__.update(number=number, request=request)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self.request("call", self, positional, named)

    def __getattr__(self, name: str) -> Any:
        return self.request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.request("set", self, name, value)


class Names(dict):
    """The names of the tests: their own, then Python's, then the solution's, which may replace some of Python's."""

    def __init__(self, request: Callable[..., Any], replaced: set[str]) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self.request = request
        self.replaced = replaced

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self.replaced:
            raise KeyError(name)  # Python looks there next
        return self.request("name", name)


def run_tests(job: dict[str, Any], answers: TextIO, calls: TextIO, verdicts: int) -> None:
    """Run each statement of the tests, and write 1 for one that passes and 0 for one that does not."""

    def request(*call: Any) -> Any:
        calls.write(json.dumps(encode(list(call), reject)) + "\n")
        calls.flush()
        line = answers.readline()
        if not line:
            os._exit(0)  # the solution has ended: no further test can pass
        tree = json.loads(line)
        if isinstance(tree, dict) and "error" in tree:
            raise getattr(builtins, str(tree["error"]), RuntimeError)("raised by the solution")
        return decode(tree, lambda number: Handle(number, request))

    called = set().union(*map(called_in, job["asserts"]))
    # Tests that call only `sum`, for instance, are tests of the solution's own `sum`.
    names = Names(request, called if all(hasattr(builtins, name) for name in called) else set())
    if job["entry_point"]:
        exec(compile(job["prefix"], "prefix.py", "exec"), names)
    for source in (job["setup"], *job["asserts"]):
        for module in modules_of(source):
            names.setdefault(module, importlib.import_module(module))
    if job["entry_point"]:
        names[job["entry_point"]] = request("name", job["entry_point"])
    exec(compile(job["setup"], "setup.py", "exec"), names)
    for source in job["asserts"]:
        try:
            exec(compile(source, "test.py", "exec"), names)
        except Exception:
            os.write(verdicts, b"0")
        else:
            os.write(verdicts, b"1")


def reject(value: Any) -> int:
    """Raise TypeError: the tests hold no objects for the solution."""
    raise TypeError(f"tests can pass plain values to the solution, not {type(value).__name__}")


def called_in(source: str) -> set[str]:
    """Return the names that are called as functions."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


def modules_of(source: str) -> set[str]:
    """Return standard modules used as in `math.isclose`, imported or not: the solution must not replace them."""
    return {
        node.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    } & sys.stdlib_module_names
