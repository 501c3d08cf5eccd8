"""The pipes from the tests to the solution: calls and answers, and the objects of both sides.

An object that is no plain value arrives as a handle, which never equals a plain value, whatever it claims. The
operators of an object are the solution's only if the tests name its class.
"""

import asyncio
import builtins
import importlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TextIO

# Beside this file, which is in no package inside the sandbox.
about: Any = importlib.import_module("jail_about")
changes: Any = importlib.import_module("jail_changes")
handles: Any = importlib.import_module("jail_handle")
OPERATORS: Any = importlib.import_module("jail_operators").OPERATORS
values: Any = importlib.import_module("jail_values")

MAX_LENT, MAX_LENT_TEXT = 8, 5_000  # values, and characters of JSON of one
# The operators of a function of the tests, as the solution sees them: enough for `if callback:`.
OF_ANY = {"bool": True, "eq": False, "ne": True, "hash": 0, "str": "<function of the tests>"}


class Link:
    """The pipes to the solution, and the objects of both sides.

    named:   all names that the tests use
    sources: texts of the solution, of which it is the first that is valid
    """

    def __init__(
        self, answers: TextIO, calls: TextIO, named: set[str], sources: list[str], report_use: Callable[[], Any]
    ) -> None:
        self.answers, self.calls, self.named, self.report_use = answers, calls, named, report_use
        self.local: list[Any] = []  # objects of the tests that the solution has
        self.opened: dict[int, Any] = {}  # objects and classes of the solution, by their numbers there
        self.errors: dict[str, type[Exception]] = {}
        self.num_requests = 0
        # Lists and such that are attributes of objects of the solution: number there -> value here, its contents then.
        self.lent: dict[int, tuple[Any, str]] = {}
        self.source = about.Source(sources)
        self.turn = threading.RLock()  # of one thread of the tests at a time
        self.own = threading.local()
        self.abouts: dict[int, Any] = {}  # what the tests have asked about functions and classes, by their numbers

    def about(self, handle: Any) -> Any:
        """Return the signature, annotations and code of a function or a class of the solution."""
        if handle._number not in self.abouts:
            self.abouts[handle._number] = about.About(self.request("about", handle), self.source)
        return self.abouts[handle._number]

    def request(self, *call: Any) -> Any:
        """Have the solution do something, and return the result; raise its exception."""
        if getattr(self.own, "has_turn", False):
            return self._request(*call)
        with self.turn:
            self._return_lent()
            return self._request(*call)

    def _return_lent(self) -> None:
        """Send the lists that the tests have changed since they read them, as in `node.children.append(leaf)`."""
        for number, (value, before) in list(self.lent.items()):
            now = json.dumps(values.encode(value, id))
            if now != before:
                self.lent[number] = (value, now)
                self._request("assign", number, value)

    def _lend(self, number: int, value: Any) -> None:
        """Remember a small value that the tests may change. To compare large ones before each request would be slow."""
        self.lent.pop(number, None)
        text = json.dumps(values.encode(value, id))
        if len(text) <= MAX_LENT_TEXT:
            self.lent[number] = (value, text)
        if len(self.lent) > MAX_LENT:
            del self.lent[next(iter(self.lent))]

    def _change_lent(self, number: int, value: Any) -> None:
        if number in self.lent:
            changes.assign(self.lent[number][0], value)
            self.lent[number] = (self.lent[number][0], json.dumps(values.encode(self.lent[number][0], id)))

    def _known(self, call: Sequence[Any]) -> dict[int, int]:
        """Return the numbers of the objects that the solution has kept, by their ids, for a call that passes them."""
        return {id(value): number for number, (value, _) in self.lent.items()} if call[0] == "call" else {}

    def _request(self, *call: Any) -> Any:
        if self.num_requests == 0:
            self.report_use()
        self.num_requests += 1
        given = [*call[2], *call[3].values()] if call[0] == "call" else []
        self.write(values.encode(list(call), self.hold, reads_iterators=True, known=self._known(call)))
        while True:
            line = self.answers.readline()
            if not line:
                os._exit(0)  # the solution has ended: no further test can pass
            answer = json.loads(line)
            if "request" in answer:
                self.serve(answer["request"])
                continue
            sys.stdout.write(str(answer.get("printed", "")))
            decoder = values.Decoder(self.open)
            for position, tree in answer.get("changed", ()):
                item, new = given[position], decoder.decode(tree)
                changes.assign(item, new)
                # A result that is an argument is that object here, too.
                decoder.seen = [item if one is new else one for one in decoder.seen]
            for number, tree in answer.get("later", ()):
                self._change_lent(int(number), values.decode(tree, self.open))
            for position, number in answer.get("kept", ()):
                self._lend(int(number), given[position])
            if "error" in answer:
                raise self.make_error(answer["error"])
            value = decoder.decode(answer["value"])
            if answer.get("is") in self.lent:
                return self.lent[answer["is"]][0]
            if "held" in answer:
                self._lend(int(answer["held"]), value)
            return value

    def serve(self, tree: Any) -> None:
        """Call an object of the tests for the solution, or read or set an attribute of it."""
        try:
            operation, number, *arguments = values.decode(tree, self.open)
            target = None if operation == "input" else self.local[number]
            result = self._serve(target, operation, *arguments)
            is_awaitable = inspect.iscoroutine(result)
            if is_awaitable:
                result = self._run_elsewhere(result)
            reply = values.encode(result, self.hold, reads_iterators=True)
            self.write({"reply": reply, "awaitable": is_awaitable})
        except Exception as error:
            self.write({"raise": [type(error).__name__, str(error)]})

    def _serve(self, target: Any, operation: str, *arguments: Any) -> Any:
        if operation == "input":  # of the tests, which may have replaced it
            return input(*arguments)
        if operation == "call":
            return target(*arguments[0], **arguments[1])
        if operation == "get" and arguments[0] in ("__name__", "__doc__"):  # functools.wraps reads them
            return getattr(target, arguments[0])
        # No more than the tests have given away: a frame or a module would lead to the expected values.
        if type(target).__module__ not in ("tests", "unittest.mock"):
            if operation == "operator" and arguments[0] in OF_ANY:
                return OF_ANY[arguments[0]]
            raise AttributeError(arguments[0])
        if operation == "operator":
            return OPERATORS[arguments[0]](target, *arguments[1:])
        if arguments[0].startswith("_"):
            raise AttributeError(arguments[0])
        if operation == "set" and type(target).__module__ == "tests":  # on a mock it could replace an assertion
            setattr(target, *arguments)
        return getattr(target, arguments[0])

    def _run_elsewhere(self, coroutine: Any) -> Any:
        """Return the result of a coroutine of the tests, in a thread, as this one may be inside a loop that runs."""
        results: list[Any] = []

        def run() -> None:
            self.own.has_turn = True  # this thread waits for it
            results.append(asyncio.run(coroutine))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return results[0]

    def hold(self, value: Any) -> Any:
        """Return how the solution refers to an object: its own, a function of the tests, or an object of theirs."""
        if isinstance(value, handles.Handle | handles.RemoteIterator | handles.Proxy):
            return value._number
        is_object = type(value).__module__ in ("tests", "unittest.mock")
        if not callable(value) and not is_object:
            raise TypeError(f"tests cannot pass {type(value).__name__} to the solution")
        self.local.append(value)
        return ["local", len(self.local) - 1, is_object]

    def open(self, handle: Any) -> Any:
        """Return the object of a handle."""
        if isinstance(handle, list):
            return self.local[handle[1]]
        kind = handle["kind"]
        if kind == "error":
            return self.make_error(handle["error"])
        if kind == "exception":
            return self.find_error(handle)
        number = int(handle["number"])
        if kind == "iterator":
            made = handles.Generator if handle["class"] == "generator" else handles.RemoteIterator
            return made(number, self)
        if number not in self.opened:
            self.opened[number] = self._open_class(handle) if kind == "class" else self._open_object(handle)
        return self.wait(self.opened[number]) if kind == "awaitable" else self.opened[number]

    def _open_class(self, handle: Any) -> Any:
        bases = tuple(base for base in map(self.open, handle["bases"]) if isinstance(base, handles.Proxy))
        return handles.make_class(str(handle["class"]), bases, int(handle["number"]), self, handle["fields"])

    def _open_object(self, handle: Any) -> Any:
        # A class has a capital letter: a function that the tests call must not return an object with its own operators.
        is_open = handle["class"] in self.named and handle["class"][:1].isupper()
        kind = self.open(handle["type"]) if handle["type"] else handles.Handle
        if not isinstance(kind, handles.Proxy):
            kind = handles.FUNCTIONS.get(handle["class"], handles.Handle)
        flags = {"is_iterator": bool(handle.get("iterates")), "is_derived": bool(handle.get("derived"))}
        return handles.make_instance(kind, int(handle["number"]), self, is_open=is_open, **flags)

    async def wait(self, handle: Any) -> Any:
        """Return the result of a coroutine of the solution, which runs it in a loop of its side."""
        await asyncio.sleep(0)
        return self.request("operator", "await", handle)

    def find_error(self, described: Any) -> type[Exception]:
        """Return the class here of an exception of the solution, by the names of its bases, the last first."""
        kind: type[Exception] = Exception
        for name in reversed(described["mro"]):
            known = getattr(builtins, name, None)
            if isinstance(known, type) and issubclass(known, Exception):
                kind = known
            elif known is None:
                kind = self.errors.setdefault(name, type(name, (kind,), {"__str__": _error_text}))
        if kind.__name__ in self.errors:
            for name, tree in described["attributes"].items():
                if not name.startswith("_"):
                    setattr(kind, name, values.decode(tree, self.open))
        return kind

    def make_error(self, described: Any) -> Exception:
        """Return the exception that the solution raised."""
        kind = self.find_error(described)
        try:
            error = kind(*[values.decode(item, self.open) for item in described["args"]])
        except Exception:
            error = RuntimeError(described["text"])
        for name, tree in described["own"].items():
            error.__dict__[name] = values.decode(tree, self.open)
        error.__dict__["_text"] = str(described["text"])
        if described["cause"] is not None:
            error.__cause__ = self.make_error(described["cause"])
        return error

    def write(self, tree: Any) -> None:
        """Write one line to the solution."""
        self.calls.write(json.dumps(tree) + "\n")
        self.calls.flush()


def _error_text(error: Exception) -> str:
    return str(error.__dict__.get("_text", Exception.__str__(error)))
