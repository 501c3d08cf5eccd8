"""Read the column of a row's tests, in the layouts of published data sets of code."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rekatrain.data.errors import InputError

KEYS = ("asserts", "setup", "prefix", "entry_point")
PARTS = ("public_tests", "private_tests", "generated_tests")
# What solutions of LeetCode's kind use without importing it.
USUAL_IMPORTS = """
from typing import *
from collections import *
from functools import *
from itertools import *
from heapq import *
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
"""
# A tuple equals a list, for JSON has lists only; a rounded float equals another.
SAME = """
def _plain(value):
    if type(value).__module__.partition(".")[0] in ("numpy", "pandas"):
        value = getattr(value, "values", value)
        value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {str(key): _plain(item) for key, item in value.items()} if isinstance(value, dict) else value

def _equal(value, expected):
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_equal, value, expected))
    is_number = [isinstance(item, (int, float)) and not isinstance(item, bool) for item in (value, expected)]
    if all(is_number):
        return value == expected or math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9)
    return value == expected

def _same(value, arguments, expected):
    expected, value = json.loads(expected), _plain(value)
    if value is None and expected is not None and arguments:
        value = _plain(arguments[0])  # changed in place
    is_wrapped = isinstance(expected, list) and len(expected) == 1
    return _equal(value, expected) or (is_wrapped and _equal(value, expected[0]))
"""


@dataclass(frozen=True, kw_only=True)
class Statements:
    """Python statements that use the code. See `CodeTests` for the fields."""

    asserts: tuple[str, ...]
    setup: str = ""
    prefix: str = ""
    entry_point: str = ""


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Runs of the code as a program: standard input and expected output of each; perhaps a program that compares."""

    cases: tuple[tuple[str, str], ...]
    checker: str = ""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Calls of one function, or of the method of that name of a class Solution: arguments and expected value of each.

    name: "" for the only function or method of the code
    """

    name: str
    cases: tuple[tuple[Sequence[Any], Any], ...]  # JSON values

    def as_statements(self, code: str) -> Statements:
        """Return the calls as statements for that code."""
        is_method = re.search(r"^class Solution\b", code, re.MULTILINE) is not None
        name = self.name or _last_function(code, is_method)
        call = f"Solution().{name}" if is_method else name
        return Statements(
            asserts=tuple(
                f"_arguments = json.loads({json.dumps(list(arguments))!r})\n"
                f"assert _same({call}(*_arguments), _arguments, {json.dumps(expected)!r})"
                for arguments, expected in self.cases
            ),
            setup=f"import json, math\n{SAME}",
            prefix=USUAL_IMPORTS,
        )


Tests = Statements | Programs | Calls


def read_tests(value: Any) -> Tests:  # Any: a JSON value of the row
    """Return the tests of a row; raise InputError for a value that is in none of the layouts.

    Reads the layouts of MBPP, HumanEval, EvalPlus, LiveCodeBench, APPS, TACO, CodeContests, KodCode and SYNTHETIC-1,
    also where they are JSON as text.
    """
    if isinstance(value, str):
        return _read_text(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return Statements(asserts=tuple(value))
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _read_cases(value, "")
    if isinstance(value, dict):
        return _read_object(value)
    raise InputError(
        f"the column tests must hold statements, objects with input and output, or an object, not {_short(value)}"
    )


def _read_text(text: str) -> Tests:
    try:
        return read_tests(json.loads(text))
    except json.JSONDecodeError:
        pass
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        tree = ast.parse("")
    calls = [call for node in tree.body for call in _calls_of(node)]
    if calls:
        return Statements(asserts=tuple(f"{text}\n{call}" for call in calls))
    if any(isinstance(node, ast.Assert | ast.Call) for node in ast.walk(tree)):  # MBPP+
        return Statements(asserts=(text,))
    raise InputError(f"the column tests is text, but neither JSON nor Python that tests something: {_short(text)}")


def _calls_of(node: ast.stmt) -> list[str]:
    """Return the statements that run a test function, or the tests of a class, as pytest does."""
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test") and not node.args.args:
        return [f"{node.name}()"]
    if not isinstance(node, ast.ClassDef):
        return []
    names = [item.name for item in node.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test")]
    if any(ast.unparse(base).endswith("TestCase") for base in node.bases):
        return [f"{node.name}({name!r}).debug()" for name in names]
    return [f"{node.name}().{name}()" for name in names] if node.name.startswith("Test") else []


def _read_object(tests: Mapping[str, Any]) -> Tests:
    keys = {key: value for key, value in tests.items() if value not in (None, "", [])}
    if "inputs" in tests and "outputs" in tests:  # APPS, TACO, PRIME
        return _read_pairs(tests["inputs"], tests["outputs"], str(keys.get("fn_name", "")), "")
    if isinstance(keys.get("input"), list) and isinstance(keys.get("output"), list):  # CodeContests
        return _read_pairs(keys["input"], keys["output"], "", str(keys.get("checker", "")))
    parts = [keys[key] for key in PARTS if isinstance(keys.get(key), dict)]
    if parts:  # CodeContests, a row
        inputs, outputs = ([text for part in parts for text in part.get(key, ())] for key in ("input", "output"))
        return _read_pairs(inputs, outputs, "", str(keys.get("checker", "")))
    for key in ("input_output", "test_cases", "public_test_cases", "programs", "verification_info"):
        if key in keys:
            inner = _read_json(keys[key])
            if isinstance(inner, dict):
                return _read_object(inner)
            if isinstance(inner, list) and all(isinstance(item, dict) for item in inner) and inner:
                return _read_cases(inner, _function_name(keys), str(keys.get("checker", "")))
    if isinstance(keys.get("test"), str):  # HumanEval, EvalPlus, KodCode
        name = str(keys.get("entry_point", ""))
        if not name:
            return _read_text(keys["test"])
        prefix = str(keys.get("prefix", keys.get("prompt", "")))
        if not name.isidentifier():  # LeetCodeDataset: Solution().add
            return Statements(asserts=(f"{keys['test']}\ncheck({name})",), prefix=prefix)
        return Statements(asserts=(f"{keys['test']}\ncheck({name})",), prefix=prefix, entry_point=name)
    return _read_statements(tests)


def _read_statements(keys: Mapping[str, Any]) -> Statements:
    if not isinstance(keys.get("asserts"), list) or not keys["asserts"]:
        raise InputError(f"the column tests must be a list, or an object with a list of asserts, not {_short(keys)}")
    unknown = [key for key in keys if key not in KEYS]
    if unknown:
        raise InputError(f"the column tests has the unknown key {unknown[0]!r}; it may have {', '.join(KEYS)}")
    rest = {key: keys.get(key) or "" for key in KEYS[1:]}
    if not all(isinstance(text, str) for text in (*keys["asserts"], *rest.values())):
        raise InputError(f"the column tests must hold Python as text, not {_short(keys)}")
    return Statements(asserts=tuple(keys["asserts"]), **rest)


def _read_cases(cases: Sequence[Mapping[str, Any]], name: str, checker: str = "") -> Tests:
    """Read a list of objects with an input and an output each: LiveCodeBench, SYNTHETIC-1."""
    for case in cases:
        if "input" not in case or "output" not in case:
            raise InputError(f"the column tests must hold objects with input and output, not {_short(case)}")
    kinds = {str(case.get("testtype", case.get("type", "stdin"))) for case in cases}
    if kinds <= {"functional", "function_call"}:
        name = name or _function_name(cases[0])
        calls = [(_read_arguments(case["input"]), _read_json(case["output"])) for case in cases]
        return Calls(name=name, cases=tuple(calls))
    if not kinds <= {"stdin", "stdin_stdout"}:
        raise InputError(f"the column tests has the types {', '.join(sorted(kinds))}; use stdin or functional alone")
    return Programs(
        cases=tuple((_read_lines(case["input"]), _read_lines(case["output"])) for case in cases), checker=checker
    )


def _read_pairs(inputs: Any, outputs: Any, name: str, checker: str) -> Tests:
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise InputError("the column tests must hold as many outputs as inputs, and at least one of each")
    if name:
        return Calls(name=name, cases=tuple(zip(map(_read_arguments, inputs), outputs, strict=True)))
    return Programs(cases=tuple(zip(map(_read_lines, inputs), map(_read_lines, outputs), strict=True)), checker=checker)


def _read_arguments(value: Any) -> Sequence[Any]:
    """Return the arguments of a call: a list, or JSON as text with one on each line."""
    if isinstance(value, str):
        return [_read_json(line) for line in value.splitlines() if line.strip()]
    return value if isinstance(value, list) else [value]


def _read_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _read_lines(value: Any) -> str:
    """Return a text; APPS writes some as a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str | int | float) for line in value):
        return "\n".join(map(str, value))
    if isinstance(value, str):
        return value
    raise InputError(f"the column tests must hold inputs and outputs as text, not {_short(value)}")


def _function_name(keys: Mapping[str, Any]) -> str:
    metadata = keys.get("metadata", {})
    metadata = _read_json(metadata) if isinstance(metadata, str) else metadata
    inside = metadata if isinstance(metadata, dict) else {}
    return str(keys.get("fn_name") or keys.get("func_name") or inside.get("func_name") or inside.get("fn_name") or "")


def _last_function(code: str, is_method: bool) -> str:
    indent = r"[ \t]+" if is_method else ""
    names = re.findall(rf"^{indent}def ([A-Za-z]\w*)\(", code, re.MULTILINE)
    return names[-1] if names else "missing"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
