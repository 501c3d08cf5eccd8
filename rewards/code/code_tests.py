"""Generated code judged by running it: unit tests that call it, or programs with an input and an expected output."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rekatrain.data.chat import ParsedCompletion
from rekatrain.data.errors import InputError
from rekatrain.rewards.code.sandbox import Isolation, Limits, check_isolation, run_program, run_tests

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
LANGUAGES = ("", "python", "python3", "py")
# The sandbox takes this long to start on a machine that is busy; the pool must not give up before the sandbox does.
START_SECONDS = 5.0
KEYS = ("asserts", "setup", "prefix", "entry_point")


class CodeTests:
    """1.0 where the Python code of the answer passes all the row's tests, else 0.0.

    The code is the answer's last fenced block, or the whole answer where there is none. The column `tests` is one of

        ["assert add(1, 2) == 3", ...]                      statements that call the code (MBPP)
        {"asserts": [...], "setup": "...", "prefix": "...", "entry_point": "..."}      with code around it (HumanEval)
        [{"input": "1 2\\n", "output": "3\\n"}, ...]        programs: standard input, expected output

    `setup` runs before the statements. `prefix` stands before the code, and its names are the tests' too, all but the
    function `entry_point`, which is then all that is taken from the code. None where the row has no tests.
    """

    def __init__(
        self,
        *,
        time_limit: float = 5.0,
        memory_limit_mb: int = 1024,
        max_processes: int = 1,
        partial_credit: bool = False,
        isolation: Isolation = "namespaces",
    ) -> None:
        """Check the options and, by a trial run, that this machine can isolate as `isolation` says.

        time_limit:     seconds, for all unit tests of a row together, or for each of its programs
        partial_credit: the share of tests that pass, instead of 1.0 for all of them
        """
        if isolation not in ("namespaces", "rlimits"):
            raise InputError(f"code_tests: isolation must be namespaces or rlimits, not {isolation!r}")
        for key, value in (("time_limit", time_limit), ("memory_limit_mb", memory_limit_mb)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise InputError(f"code_tests: {key} must be a number above 0, not {value!r}")
        if not isinstance(partial_credit, bool):
            raise InputError(f"code_tests: partial_credit must be true or false, not {partial_credit!r}")
        check_isolation(isolation)
        self.isolation = isolation
        self.partial_credit = partial_credit
        self.limits = Limits(seconds=time_limit, memory=int(memory_limit_mb) << 20, processes=max_processes)
        self.timeout = time_limit + START_SECONDS

    def __call__(self, completion: ParsedCompletion, *, tests: Any) -> float | None:  # Any: checked here
        if not tests:
            return None
        code = extract_code(completion.answer)
        passed = (
            self._run_programs(code, tests) if _are_programs(tests) else self._run_asserts(code, _as_mapping(tests))
        )
        return sum(passed) / len(passed) if self.partial_credit else float(all(passed))

    def _run_asserts(self, code: str, tests: Mapping[str, Any]) -> list[bool]:
        # With its `from __future__` lines in front, code is no Python after a prefix: it may well do without.
        solutions = [f"{tests['prefix']}\n{code}", code]
        return run_tests(solutions, tests, limits=self.limits, isolation=self.isolation)

    def _run_programs(self, code: str, tests: Sequence[Mapping[str, str]]) -> list[bool]:
        passed = []
        for test in tests:
            outcome = run_program(code, stdin=test["input"].encode(), limits=self.limits, isolation=self.isolation)
            is_right = (
                outcome.ending == "exited"
                and outcome.code == 0
                and _lines(outcome.output) == _lines(test["output"].encode())
            )
            passed.append(is_right)
            if not is_right and not self.partial_credit:
                break
        return passed


def extract_code(answer: str) -> str:
    """The last fenced block of Python or of no named language; without one, the whole answer.

    >>> extract_code("So:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = [code for language, code in FENCE.findall(answer) if language.lower() in LANGUAGES]
    return blocks[-1] if blocks else answer


def _lines(text: bytes) -> list[bytes]:
    """Lines without the white space at their ends, nor empty ones at the text's end: contests compare them so."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _are_programs(tests: Any) -> bool:
    if not isinstance(tests, list) or not isinstance(tests[0], dict):
        return False
    for test in tests:
        if not isinstance(test, dict) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
            raise InputError(f"the column tests must hold objects with the texts input and output, not {test!r}")
    return True


def _as_mapping(tests: Any) -> Mapping[str, Any]:
    given = {"asserts": tests} if isinstance(tests, list) else tests
    if not isinstance(given, dict) or not isinstance(given.get("asserts"), list) or not given["asserts"]:
        raise InputError(f"the column tests must be a list, or an object with a list of asserts, not {tests!r}")
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        raise InputError(f"the column tests has the unknown key {unknown[0]!r}; it may have {', '.join(KEYS)}")
    whole = {"setup": "", "prefix": "", "entry_point": "", **{key: value for key, value in given.items() if value}}
    texts = [*whole["asserts"], whole["setup"], whole["prefix"], whole["entry_point"]]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"the column tests must hold Python as text, not {tests!r}")
    return whole
