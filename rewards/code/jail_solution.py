"""The side of the solution: it runs the code, then answers what the tests request of it, until they are done."""

import builtins
import dataclasses
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# Beside this file, which is in no package inside the sandbox.
about: Any = importlib.import_module("jail_about")
changes: Any = importlib.import_module("jail_changes")
remote: Any = importlib.import_module("jail_remote")
OPERATORS: Any = importlib.import_module("jail_operators").OPERATORS
values: Any = importlib.import_module("jail_values")

MAX_KEPT, MAX_KEPT_TEXT = 8, 5_000  # lists and such that are compared after each operation, characters of JSON of one
REFERENCES = 4  # to an argument that the code does not keep, where `_keep_arguments` counts them
MAX_PRINTED = 1 << 20  # characters in one call that the tests may see


class Solution:
    """The names that the code has defined, and the objects of which the tests have a handle."""

    def __init__(self, calls: TextIO, answers: TextIO) -> None:
        self.calls, self.answers = calls, answers
        self.held: list[Any] = []
        self.numbers: dict[int, int] = {}  # of held objects, by their ids
        # Arguments that the code keeps, and lists that the tests have read as attributes: their contents, by numbers.
        self.kept: dict[int, str] = {}
        self.given: set[int] = set()  # numbers of the arguments among them
        self.printed = sys.stdout = io.StringIO()
        self.num_open = 0  # operations for the tests that have not ended
        builtins.input, sys.stdin = self.input, remote.Lines(self.input)
        # A module of that name, as dataclasses look up annotations there.
        self.module = sys.modules["solution"] = type(sys)("solution")
        self.module.__dict__["__builtins__"] = builtins
        self.operations: dict[str, Callable[..., Any]] = {
            "name": lambda name: self.module.__dict__[name],
            "call": lambda function, positional, named: function(*positional, **named),
            "get": getattr,
            "set": setattr,
            "about": about.describe,
            "assign": lambda number, value: changes.assign(self.held[number], value),
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
        if isinstance(value, remote.Remote):
            return ["local", value._number]
        if isinstance(value, BaseException):
            return {"kind": "error", "error": self.describe(value)}
        number = self.number_of(value)
        if isinstance(value, type):
            return self.describe_class(value, number)
        described = {"kind": "object", "number": number, "class": type(value).__name__, "type": None}
        described["derived"] = values.is_derived(value)
        if type(value).__module__ == "solution":
            described["type"] = self.hold(type(value))
        if hasattr(type(value), "__await__"):
            described["kind"] = "awaitable"
        elif isinstance(value, Iterator):
            described["kind"] = "iterator" if described["type"] is None else "object"
            described["iterates"] = True
        return described

    def number_of(self, value: Any) -> int:
        """Return the number of an object, which is held from then on."""
        number = self.numbers.setdefault(id(value), len(self.held))
        if number == len(self.held):
            self.held.append(value)
        return number

    def describe_class(self, kind: type, number: int) -> dict[str, Any]:
        """Return the description of a class for the tests."""
        if issubclass(kind, BaseException):
            return {"kind": "exception", **_lineage(kind)}
        described = {"kind": "class", "number": number, "class": kind.__name__, "fields": None}
        if kind.__module__ != "solution":
            return described | {"kind": "object", "type": None}
        if dataclasses.is_dataclass(kind):
            described["fields"] = [field.name for field in dataclasses.fields(kind)]
        return described | {"bases": [self.hold(base) for base in kind.__bases__ if base.__module__ == "solution"]}

    def open(self, handle: Any) -> Any:
        """Return the object of a handle: one that is held here, or one of the tests."""
        if isinstance(handle, int):
            return self.held[handle]
        return (remote.RemoteObject if handle[2] else remote.Remote)(handle[1], self.exchange)

    def serve(self) -> None:
        """Answer until the tests are done."""
        for line in self.calls:
            self.answer(json.loads(line))

    def answer(self, tree: Any) -> None:
        """Do one operation for the tests, and write its result or its error."""
        self.num_open += 1
        self.write(self._answer(tree))
        self.num_open -= 1

    def _answer(self, tree: Any) -> str:
        operation, *arguments = values.decode(tree, self.open)
        given = _arguments(operation, arguments)
        positions = [index for index, item in enumerate(given) if changes.is_changeable(item)]
        changeable = [given[index] for index in positions]
        del given
        before = [values.encode(item, id) for item in changeable]
        encoder = values.Encoder(self.hold)
        answer: dict[str, Any] = {}
        try:
            value = self.operations[operation](*arguments)
            if any(value is item for item in changeable):
                before = []  # the tests then find it among the arguments
            self._report_changes(answer, encoder, positions, changeable, before)
            answer["value"] = encoder.encode(value)
            number = self.numbers.get(id(value), -1)
            # What a call returns is judged as it is then, but for an object that the tests have given.
            if number in self.kept and (operation == "get" or number in self.given):
                answer["is"] = number
            if operation == "get" and changes.is_changeable(value) and not isinstance(value, tuple):
                answer["held"] = self.number_of(value)
                self._keep(answer["held"])
            del value
            self._keep_arguments(answer, positions, changeable)
            text = json.dumps(answer)
        except Exception as error:
            answer = {}
            self._report_changes(answer, values.Encoder(self.hold), positions, changeable, before)
            text = json.dumps({**answer, "error": self.describe(error)})
        return text

    def _keep_arguments(self, answer: dict[str, Any], positions: list[int], changeable: list[Any]) -> None:
        """Keep the arguments of a call to which the code has references left: a later call may change them."""
        answer["kept"] = []
        for position, item in zip(positions, changeable, strict=True):
            if type(item) is not tuple and sys.getrefcount(item) > REFERENCES and id(item) not in self.numbers:
                answer["kept"].append([position, self.number_of(item)])
                self.given.add(self.number_of(item))
                self._keep(self.number_of(item))

    def _keep(self, number: int) -> None:
        text = json.dumps(values.encode(self.held[number], id))
        self.kept.pop(number, None)
        if len(text) <= MAX_KEPT_TEXT:
            self.kept[number] = text
        if len(self.kept) > MAX_KEPT:
            del self.kept[next(iter(self.kept))]

    def _report_kept(self, answer: dict[str, Any]) -> None:
        """Report what has changed since in the objects that are kept."""
        answer["later"] = []
        for number, before in self.kept.items():
            now = json.dumps(values.encode(self.held[number], id))
            if now != before:
                self.kept[number] = now
                answer["later"].append([number, values.encode(self.held[number], self.hold)])

    def input(self, prompt: object = "") -> str:
        """Return a line of the tests' standard input, or what they have put in place of `input`."""
        if not self.num_open:
            raise EOFError("EOF when reading a line")  # the tests have not begun
        return str(self.exchange("input", 0, str(prompt)))

    def _report_changes(
        self, answer: dict[str, Any], encoder: Any, positions: list[int], changeable: list[Any], before: list[Any]
    ) -> None:
        self._report_kept(answer)
        if [values.encode(item, id) for item in changeable] != before:
            answer["changed"] = [
                [position, encoder.encode(item)] for position, item in zip(positions, changeable, strict=True)
            ]
        if printed := self.printed.getvalue():
            answer["printed"] = printed[:MAX_PRINTED]
            self.printed.seek(0)
            self.printed.truncate()

    def exchange(self, *request: Any) -> Any:
        """Have the tests do something with an object of theirs; meanwhile they may call this side again."""
        self.write(json.dumps({"request": values.encode(list(request), self.hold)}))
        for line in self.calls:
            tree = json.loads(line)
            if isinstance(tree, dict) and "reply" in tree:
                reply = values.decode(tree["reply"], self.open)
                return remote.give(reply) if tree["awaitable"] else reply
            if isinstance(tree, dict) and "raise" in tree:
                kind = getattr(builtins, str(tree["raise"][0]), RuntimeError)
                raise (kind if issubclass(kind, Exception) else RuntimeError)(tree["raise"][1])
            self.answer(tree)
        raise SystemExit  # the tests have ended

    def describe(self, error: BaseException) -> dict[str, Any]:
        """Return what the tests need to raise an error as the solution did."""
        try:
            arguments = [values.encode(item, _no_handle) for item in error.args]
        except Exception:
            arguments = [str(error)]
        cause = None if error.__cause__ is None else self.describe(error.__cause__)
        text = str(error)[:10_000]
        return {**_lineage(type(error)), "args": arguments, "text": text, "own": _plain(vars(error)), "cause": cause}

    def write(self, text: str) -> None:
        """Write one line to the tests."""
        self.answers.write(text + "\n")
        self.answers.flush()


def _arguments(operation: str, arguments: list[Any]) -> list[Any]:
    """Return the plain arguments of a call, in the order in which the tests list them."""
    if operation != "call":
        return []
    return [*arguments[1], *arguments[2].values()]


def _lineage(kind: type) -> dict[str, Any]:
    """Return the names of the bases of a class of exceptions, and the plain attributes of those of the solution."""
    own = [base for base in kind.__mro__ if base.__module__ == "solution"]
    attributes = {name: value for base in reversed(own) for name, value in vars(base).items() if name[0] != "_"}
    return {"mro": [base.__name__ for base in kind.__mro__], "attributes": _plain(attributes)}


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes that are plain values, encoded."""
    encoded = {}
    for name, value in attributes.items():
        try:
            encoded[name] = values.encode(value, _no_handle)
        except TypeError:
            continue
    return encoded


def _no_handle(value: Any) -> Any:
    raise TypeError(f"no plain value: {type(value).__name__}")


def serve(sources: list[str], calls: TextIO, answers: TextIO) -> None:
    """Run the solution, then answer the tests."""
    solution = Solution(calls, answers)
    solution.load(sources)
    solution.serve()
