"""Tests of code that stand where a row has its answer, as in PRIME's Eurus-2-RL-Data: JSON with inputs and outputs."""

import json
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.records import Record

CODE = ("code", "coding")  # the field `ability` of a row of code


def columns_of_tests(record: Record, answer: Any) -> dict[str, Any]:  # Any: JSON values
    """Return the columns that follow from tests in place of an answer, beside a row's other columns.

    They are `tests`, and a null `answer`. A row of another task, in a set that has `ability`, has null `tests`.
    Raises InputError as `code_tests_of` does.
    """
    if "tests" in record:
        return {}
    tests = code_tests_of(record, answer)
    if tests is not None:
        return {"tests": tests, "answer": None}
    return {"tests": None} if "ability" in record else {}


def code_tests_of(record: Record, answer: Any) -> dict[str, Any] | None:  # Any: a JSON value
    """Return the tests that `answer` holds: `inputs`, `outputs` and perhaps `fn_name`; None if it is no code test.

    Raises InputError for tests that cannot be read, where they begin as such or the row's `ability` is code.

    >>> code_tests_of({}, '{"inputs": ["1"], "outputs": ["2"]}')
    {'inputs': ['1'], 'outputs': ['2']}
    """
    is_code = str(record.get("ability", "")).lower() in CODE
    tests = answer
    if isinstance(answer, str) and (is_code or answer.lstrip().startswith("{")):
        try:
            tests = json.loads(answer)
        except ValueError as error:
            if is_code or answer.lstrip("{ \n").startswith(('"inputs"', '"outputs"', '"fn_name"')):
                raise InputError(f"the tests of the code are no JSON: {error}") from error
    if not (isinstance(tests, dict) and {"inputs", "outputs"} & tests.keys()):
        if is_code:
            raise InputError(f"a row of code needs tests with inputs and outputs, not {str(answer)[:100]!r}")
        return None
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and inputs and len(inputs) == len(outputs)):
        if not is_code and not {"inputs", "outputs"} <= tests.keys():
            return None
        raise InputError("the tests of the code need as many outputs as inputs, in two lists, and at least one of each")
    return tests
