"""The reward `code_tests`: runs generated code, with unit tests that call it or as programs with input and output."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Gt
from pydantic import FiniteFloat

from rekatrain.data.chat import ParsedCompletion
from rekatrain.data.errors import InputError
from rekatrain.rewards.code.sandbox import Isolation, Limits, check_isolation, run_program, run_tests
from rekatrain.rewards.scorers.fences import find_fences

LANGUAGE = re.compile(r"[\w+-]*")
LANGUAGES = ("", "python", "python3", "py")
# Time to start a sandbox on a busy machine: the pool's time limit must not expire before the sandbox's.
START_SECONDS = 5.0
KEYS = ("asserts", "setup", "prefix", "entry_point")


class CodeTests:
    """1.0 if the Python code of the answer passes all tests of the row, else 0.0.

    The code is the answer's last fenced block, or the whole answer if there is none. The column `tests` is one of

        ["assert add(1, 2) == 3", ...]                      statements that call the code (MBPP)
        {"asserts": [...], "setup": "...", "prefix": "...", "entry_point": "..."}      with code around it (HumanEval)
        [{"input": "1 2\\n", "output": "3\\n"}, ...]        programs: standard input, expected output

    `setup` runs before the statements. `prefix` is put before the code, and the tests can use its names too. With an
    `entry_point`, that function is all that the tests take from the code. None if the row has no tests.
    """

    def __init__(
        self,
        *,
        time_limit: Annotated[FiniteFloat, Gt(0)] = 5.0,
        memory_limit_mb: Annotated[int, Ge(1)] = 1024,
        max_processes: Annotated[int, Ge(1)] = 1,
        partial_credit: bool = False,
        isolation: Isolation = "namespaces",
    ) -> None:
        """Check by a trial run that this machine can provide the isolation.

        time_limit:      seconds, for all unit tests of a row together, or for each of its programs
        memory_limit_mb: address space of each process, in MiB
        max_processes:   processes and threads of a sandbox at the same time
        partial_credit:  score the fraction of tests that pass, instead of 1.0 for all of them
        isolation:       namespaces or rlimits, see rewards/README.md
        """
        check_isolation(isolation)
        self.isolation = isolation
        self.partial_credit = partial_credit
        self.limits = Limits(seconds=time_limit, memory=memory_limit_mb << 20, processes=max_processes)
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
        # Code that begins with `from __future__` is no Python after a prefix, and may well work without it.
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
    """Return the last fenced block of Python or of no named language; without one, the whole answer.

    >>> extract_code("So:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = [fence.code for fence in find_fences(answer) if LANGUAGE.match(fence.info)[0].lower() in LANGUAGES]  # type: ignore[index]
    return blocks[-1] if blocks else answer


def _lines(text: bytes) -> list[bytes]:
    """Return the lines without trailing white space, and without empty ones at the end, as contests compare them."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _are_programs(tests: Any) -> bool:
    if not isinstance(tests, list) or not isinstance(tests[0], dict):
        return False
    for test in tests:
        if not isinstance(test, dict) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
            raise InputError(f"the column tests must hold objects with the texts input and output, not {test!r}")
    return True


def _as_mapping(tests: Any) -> Mapping[str, Any]:
    keys = {"asserts": tests} if isinstance(tests, list) else tests
    if not isinstance(keys, dict) or not isinstance(keys.get("asserts"), list) or not keys["asserts"]:
        raise InputError(f"the column tests must be a list, or an object with a list of asserts, not {tests!r}")
    unknown = [key for key in keys if key not in KEYS]
    if unknown:
        raise InputError(f"the column tests has the unknown key {unknown[0]!r}; it may have {', '.join(KEYS)}")
    whole = {"setup": "", "prefix": "", "entry_point": "", **{key: value for key, value in keys.items() if value}}
    texts = [*whole["asserts"], whole["setup"], whole["prefix"], whole["entry_point"]]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"the column tests must hold Python as text, not {tests!r}")
    return whole
