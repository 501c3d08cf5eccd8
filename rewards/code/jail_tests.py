"""The side of the tests: they call the solution over a pipe, and compare its results here.

So a solution can neither see nor change the expected values.
"""

import ast
import builtins
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# Beside this file, which is in no package inside the sandbox.
about: Any = importlib.import_module("jail_about")
handles: Any = importlib.import_module("jail_handle")
Link: Any = importlib.import_module("jail_link").Link
tables: Any = importlib.import_module("jail_tables")

EQUALS = "_are_values_equal"  # the name by which the tests find `are_values_equal`


class CannotRun(Exception):
    """The tests themselves fail, whatever the solution is."""


class Names(dict):
    """The names of the tests: their own, then Python's, then the solution's, which may replace some of Python's."""

    def __init__(self, link: Any, replaced: set[str]) -> None:
        super().__init__(__name__="tests", __builtins__=builtins, **{EQUALS: are_values_equal})
        self.link = link
        self.replaced = replaced

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self.replaced:
            raise KeyError(name)  # Python looks there next
        return self.link.request("name", name)


class Equalities(ast.NodeTransformer):
    """Has `==` and `!=` of assertions compare arrays and tables, whose own `==` has no single truth value."""

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        """Change the truth value that an assertion needs, not what is computed inside it."""
        node.test = self._truth(node.test)
        return node

    def _truth(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.BoolOp):
            node.values = [self._truth(value) for value in node.values]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self._truth(node.operand)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            call = ast.Call(ast.Name(EQUALS, ast.Load()), [node.left, *node.comparators], [])
            is_negated = isinstance(node.ops[0], ast.NotEq)
            return ast.copy_location(ast.UnaryOp(ast.Not(), call) if is_negated else call, node)
        return node


def are_values_equal(one: Any, other: Any) -> Any:
    """Return `one == other`, or the equality of the values if that has no truth value, as for arrays and tables."""
    try:
        return bool(one == other)
    except ValueError:
        if not (_has_table(one) and _has_table(other)):
            raise
    return tables.are_equal(one, other)


def _has_table(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in ("numpy", "pandas") or isinstance(value, list | tuple | dict)


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
    link = Link(answers, calls, set().union(*map(names_of, sources.values())), job["sources"], report_use)
    # Tests that call only `sum`, for instance, are tests of the solution's own `sum`.
    names = Names(link, called if all(hasattr(builtins, name) for name in called) else set())
    module = sys.modules["tests"] = type(sys)("tests")
    module.__dict__.update(__getattr__=lambda name: _attribute(names, name))
    sys.modules["solution"] = type(sys)("solution")  # `from solution import add`
    sys.modules["solution"].__dict__.update(__getattr__=lambda name: _imported(link, name), __file__=about.FILE)
    about.install(lambda value: isinstance(value, handles.Handle))
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
            if isinstance(error, ImportError) and (link.num_requests == before or _misses_module(error, sources[name])):
                raise CannotRun(f"{name} needs a module: {error}") from error
            if link.num_requests == before and not isinstance(error, Exception):
                raise CannotRun(f"{name} raises {type(error).__name__} before it uses the code") from error
            has_passed = False
        else:
            has_passed = True
        yield has_passed


def _misses_module(error: ImportError, source: str) -> bool:
    """Return True if the tests import a module that does not exist; not for an error that the solution has raised."""
    return "_text" not in vars(error) and error.name is not None and error.name.partition(".")[0] in source


def _attribute(names: Names, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return names[name]


def _imported(link: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return link.request("name", name)


def _compile(source: str, name: str) -> Any:
    try:
        return compile(ast.fix_missing_locations(Equalities().visit(ast.parse(source))), f"{name}.py", "exec")
    except (SyntaxError, ValueError) as error:
        raise CannotRun(f"{name} is no Python: {error}") from error


def _run(code: Any, names: Names, name: str, link: Any) -> None:
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
