"""Facts that tests may read about a function or a class of the solution: its signature, annotations, code and source.

The solution describes its signature as plain values. Code and source come from the text of the solution, which the side
of the tests compiles and never runs. No text that the solution sends is evaluated here.
"""

import ast
import builtins
import collections.abc
import importlib
import inspect
import linecache
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

values: Any = importlib.import_module("jail_values")  # beside this file, which is in no package inside the sandbox

FILE = "solution.py"
KINDS = {kind.value: kind for kind in inspect._ParameterKind}
get_type_hints = typing.get_type_hints


def describe(value: Any) -> dict[str, Any]:
    """Return the signature of an object of the solution, and where its code is, as plain values; for its side."""
    parts: dict[str, Any] = {"annotations": {}}
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        parts["parameters"] = [
            (name, int(parameter.kind), parameter.default is not inspect.Parameter.empty, _default_of(parameter))
            for name, parameter in signature.parameters.items()
        ]
    try:
        hints = get_type_hints(value)
    except Exception:  # names that are not defined, or an object that has none
        hints = getattr(value, "__annotations__", None) or {}
    for name, hint in dict(hints).items():
        # A class of the solution is sent as itself, a generic alias as text.
        is_class = isinstance(hint, type) and not isinstance(hint, types.GenericAlias)
        parts["annotations"][name] = hint if is_class else repr(hint)
    code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
    if isinstance(code, types.CodeType):
        parts["code"] = (code.co_name, code.co_firstlineno)
    return parts


def _default_of(parameter: inspect.Parameter) -> Any:
    return None if parameter.default is inspect.Parameter.empty else parameter.default


class About:
    """The description of one object of the solution, read by the side of the tests."""

    def __init__(self, described: Mapping[str, Any], source: "Source") -> None:
        self._described, self._source = described, source
        hints = {str(name): _read_hint(hint) for name, hint in described["annotations"].items()}
        self.annotations = {name: hint for name, hint in hints.items() if hint is not inspect.Parameter.empty}

    @property
    def signature(self) -> inspect.Signature:
        """The signature; raises AttributeError without one."""
        if "parameters" not in self._described:
            raise AttributeError("__signature__")
        empty = inspect.Parameter.empty
        hints = self.annotations
        return inspect.Signature(
            [
                inspect.Parameter(
                    str(name), KINDS[kind], default=default if has_default else empty, annotation=hints.get(name, empty)
                )
                for name, kind, has_default, default in self._described["parameters"]
            ],
            return_annotation=hints.get("return", inspect.Signature.empty),
        )

    @property
    def code(self) -> types.CodeType:
        """The code; raises AttributeError for an object that the text of the solution does not define."""
        name, line = self._described.get("code", ("", 0))
        for code in _codes_in(self._source.code):
            if (code.co_name, code.co_firstlineno) == (name, line):
                return code
        raise AttributeError("__code__")

    def defaults(self, *, keyword_only: bool) -> Any:
        """Return `__defaults__`, or `__kwdefaults__`."""
        kind = inspect.Parameter.KEYWORD_ONLY
        having = [one for one in self._described.get("parameters", ()) if one[2] and (one[1] == kind) == keyword_only]
        if not having:
            return None
        return {one[0]: one[3] for one in having} if keyword_only else tuple(one[3] for one in having)


class Source:
    """The text of the solution: the first of `sources` that is valid Python. It is compiled when it is needed."""

    def __init__(self, sources: list[str]) -> None:
        self._sources = sources
        self._code: types.CodeType | None = None
        # inspect reads the lines of a file that does not exist from here, by calling the function.
        linecache.cache[FILE] = (self._text,)

    @property
    def code(self) -> types.CodeType:
        """The code of the module."""
        if self._code is None:
            self._text()
        assert self._code is not None
        return self._code

    def _text(self) -> str:
        for source in self._sources:
            try:
                self._code = compile(source, FILE, "exec", dont_inherit=True)
            except (SyntaxError, ValueError):
                continue
            return source
        raise OSError("the solution is no Python")


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes_in(constant)


def _read_hint(hint: Any) -> Any:
    """Return an annotation: a class, or an alias that a text such as `typing.List[int]` names; `empty` for others."""
    if not isinstance(hint, str):
        return hint
    try:
        read = _read_node(ast.parse(hint, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return inspect.Parameter.empty
    # Python evaluates the text of an annotation in several places.
    return inspect.Parameter.empty if isinstance(read, str) else read


def _read_node(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, int | str | type(...))):
        return node.value
    if isinstance(node, ast.Name):
        kind = vars(builtins)[node.id]
        if isinstance(kind, type):
            return kind
    if isinstance(node, ast.Attribute):
        module = {"typing": typing, "collections.abc": collections.abc}[ast.unparse(node.value)]
        if node.attr in module.__all__:
            return getattr(module, node.attr)
    if isinstance(node, ast.Subscript):
        return _read_node(node.value)[_read_node(node.slice)]
    if isinstance(node, ast.Tuple | ast.List):
        items = [_read_node(item) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _read_node(node.left) | _read_node(node.right)
    raise ValueError(f"no annotation: {ast.unparse(node)}")


def install(is_remote: Any) -> None:
    """Have `typing.get_type_hints` return the annotations of a remote object; it would evaluate their text."""

    def hints_of(value: Any, *arguments: Any, **named: Any) -> Any:
        return dict(value.__annotations__) if is_remote(value) else get_type_hints(value, *arguments, **named)

    vars(typing)["get_type_hints"] = hints_of
