"""The side of the tests: they call the solution over a pipe, and compare its results here.

So a solution can neither see nor change the expected values. An object that is no plain value arrives as a handle,
which never equals a plain value, whatever it claims. The operators of an object are the solution's only if the tests
name its class.
"""

import ast
import asyncio
import builtins
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

Handle: Any = importlib.import_module("jail_handle").Handle
values: Any = importlib.import_module("jail_values")  # beside this file, which is in no package inside the sandbox


class CannotRun(Exception):
    """The tests themselves fail, whatever the solution is."""


class Link:
    """The pipes to the solution, and the objects of both sides."""

    def __init__(self, answers: TextIO, calls: TextIO, named: set[str], report_use: Callable[[], Any]) -> None:
        self.answers, self.calls, self.named, self.report_use = answers, calls, named, report_use
        self.local: list[Any] = []  # objects of the tests that the solution has
        self.errors: dict[str, type[Exception]] = {}
        self.num_requests = 0

    def request(self, *call: Any) -> Any:
        """Have the solution do something, and return the result; raise its exception."""
        if self.num_requests == 0:
            self.report_use()
        self.num_requests += 1
        changeable = []
        if call[0] == "call":
            changeable = [item for item in (*call[2], *call[3].values()) if values.is_changeable(item)]
        self.write(values.encode(list(call), self.hold))
        while True:
            line = self.answers.readline()
            if not line:
                os._exit(0)  # the solution has ended: no further test can pass
            answer = json.loads(line)
            if "request" in answer:
                self.serve(answer["request"])
                continue
            if "error" in answer:
                raise self.make_error(answer["error"])
            for item, new in zip(changeable, answer.get("changed", ()), strict=False):
                values.assign(item, values.decode(new, self.open))
            return values.decode(answer["value"], self.open)

    def serve(self, tree: Any) -> None:
        """Call an object of the tests for the solution, or read or set an attribute of it."""
        try:
            operation, number, *arguments = values.decode(tree, self.open)
            target = self.local[number]
            if operation == "call":
                result = target(*arguments[0], **arguments[1])
            else:
                # No more than the tests have given away: a frame or a module would lead to the expected values.
                if type(target).__module__ != "tests" or arguments[0].startswith("_"):
                    raise AttributeError(arguments[0])
                if operation == "set":
                    setattr(target, *arguments)
                result = getattr(target, arguments[0])
            self.write({"reply": values.encode(result, self.hold)})
        except Exception as error:
            self.write({"raise": [type(error).__name__, str(error)]})

    def hold(self, value: Any) -> Any:
        """Return how the solution refers to an object: its own, a function of the tests, or an object of theirs."""
        if isinstance(value, Handle):
            return value._number
        if not callable(value) and type(value).__module__ != "tests":
            raise TypeError(f"tests cannot pass {type(value).__name__} to the solution")
        self.local.append(value)
        return ["local", len(self.local) - 1]

    def open(self, handle: Any) -> Any:
        """Return the object of a handle."""
        if isinstance(handle, list):
            return self.local[handle[1]]
        if handle["kind"] == "exception":
            return self.find_error(handle["mro"])
        # A class has a capital letter: a function that the tests call must not return an object with its own operators.
        is_open = handle["class"] in self.named and handle["class"][:1].isupper()
        opened = Handle(int(handle["number"]), self, is_open)
        return self.wait(opened) if handle["kind"] == "awaitable" else opened

    async def wait(self, handle: Handle) -> Any:
        """Return the result of a coroutine of the solution, which runs it in a loop of its side."""
        await asyncio.sleep(0)
        return self.request("operator", "await", handle)

    def find_error(self, mro: list[str]) -> type[Exception]:
        """Return the class here of an exception of the solution, by the names of its bases, the last first."""
        kind: type[Exception] = Exception
        for name in reversed(mro):
            known = getattr(builtins, name, None)
            if isinstance(known, type) and issubclass(known, Exception):
                kind = known
            elif known is None:
                kind = self.errors.setdefault(name, type(name, (kind,), {"__str__": _error_text}))
        return kind

    def make_error(self, described: Any) -> Exception:
        """Return the exception that the solution raised."""
        kind = self.find_error(described["mro"])
        try:
            error = kind(*[values.decode(item, self.open) for item in described["args"]])
        except Exception:
            error = RuntimeError(described["text"])
        for name, tree in described["attributes"].items():
            error.__dict__[name] = values.decode(tree, self.open)
        error.__dict__["_text"] = str(described["text"])
        return error

    def write(self, tree: Any) -> None:
        """Write one line to the solution."""
        self.calls.write(json.dumps(tree) + "\n")
        self.calls.flush()


def _error_text(error: Exception) -> str:
    return str(error.__dict__.get("_text", Exception.__str__(error)))


class Names(dict):
    """The names of the tests: their own, then Python's, then the solution's, which may replace some of Python's."""

    def __init__(self, link: Link, replaced: set[str]) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self.link = link
        self.replaced = replaced

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self.replaced:
            raise KeyError(name)  # Python looks there next
        return self.link.request("name", name)


def run_tests(job: dict[str, Any], answers: TextIO, calls: TextIO, verdicts: int) -> None:
    """Write 1 for each statement of the tests that passes and 0 for one that does not; before, `c` at its first use.

    Writes `!` and the reason, and ends, if the tests cannot run, whatever the solution is.
    """
    try:
        for verdict in judge(job, answers, calls, lambda: os.write(verdicts, b"c")):
            os.write(verdicts, b"1" if verdict else b"0")
    except CannotRun as error:
        os.write(verdicts, f"!{error}".encode(errors="replace")[:1_000])


def judge(job: dict[str, Any], answers: TextIO, calls: TextIO, report_use: Callable[[], Any]) -> Iterator[bool]:
    """Yield True for each statement that passes; raise CannotRun if the tests are at fault."""
    sources = {"setup": job["setup"], **{f"test {index + 1}": test for index, test in enumerate(job["asserts"])}}
    compiled = {name: _compile(source, name) for name, source in sources.items()}
    called = set().union(*map(called_in, job["asserts"]))
    link = Link(answers, calls, set().union(*map(names_of, sources.values())), report_use)
    # Tests that call only `sum`, for instance, are tests of the solution's own `sum`.
    names = Names(link, called if all(hasattr(builtins, name) for name in called) else set())
    module = sys.modules["tests"] = type(sys)("tests")
    module.__dict__.update(__getattr__=names.__getitem__)
    sys.modules["solution"] = type(sys)("solution")  # `from solution import add`
    sys.modules["solution"].__dict__.update(__getattr__=lambda name: _imported(link, name))
    if job["entry_point"]:
        _run(_compile(job["prefix"], "prefix"), names, "prefix", link)
    for source in sources.values():
        for name in modules_of(source):
            names.setdefault(name, importlib.import_module(name))
    if job["entry_point"]:
        names[job["entry_point"]] = link.request("name", job["entry_point"])
    for name, code in compiled.items():
        if name == "setup":
            _run(code, names, name, link)
            continue
        before = link.num_requests
        try:
            exec(code, names)
        except BaseException as error:  # sys.exit() too
            if link.num_requests == before and isinstance(error, ImportError):
                raise CannotRun(f"{name} needs a module: {error}") from error
            if link.num_requests == before and not isinstance(error, Exception):
                raise CannotRun(f"{name} raises {type(error).__name__} before it uses the code") from error
            has_passed = False
        else:
            has_passed = True
        yield has_passed


def _imported(link: Link, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return link.request("name", name)


def _compile(source: str, name: str) -> Any:
    try:
        return compile(source, f"{name}.py", "exec")
    except (SyntaxError, ValueError) as error:
        raise CannotRun(f"{name} is no Python: {error}") from error


def _run(code: Any, names: Names, name: str, link: Link) -> None:
    """Run the setup or the prefix of the tests; what fails before it has used the solution is their fault."""
    try:
        exec(code, names)
    except BaseException as error:  # sys.exit() too
        if link.num_requests == 0 or isinstance(error, ImportError):
            raise CannotRun(f"the {name} raises {type(error).__name__}: {error}") from error
        os._exit(0)  # the solution's fault: no test can pass


def called_in(source: str) -> set[str]:
    """Return the names that are called as functions."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


def names_of(source: str) -> set[str]:
    """Return the names that the tests use or import."""
    tree = ast.parse(source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return imported | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def modules_of(source: str) -> set[str]:
    """Return standard modules used as in `math.isclose`, imported or not: the solution must not replace them."""
    return {
        node.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    } & sys.stdlib_module_names
