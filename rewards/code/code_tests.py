"""The reward `code_tests`: runs generated code, with unit tests that call it or as programs with input and output."""

import re
from dataclasses import replace
from typing import Annotated, Any

from annotated_types import Ge, Gt
from pydantic import FiniteFloat

from rekatrain.data.chat import ParsedCompletion
from rekatrain.data.errors import InputError
from rekatrain.rewards.code.launcher import Isolation, Limits
from rekatrain.rewards.code.outputs import ask_checker, is_right
from rekatrain.rewards.code.packages import check_installed, find_packages
from rekatrain.rewards.code.sandbox import (
    check_isolation,
    check_memory,
    run_program,
    run_tests,
)
from rekatrain.rewards.code.tests_column import Calls, Programs, Statements, read_tests
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.scorers.fences import find_fences

LANGUAGE = re.compile(r"[\w+-]*")
LANGUAGES = ("", "python", "python3", "py")
# Time to start sandboxes on a busy machine: the pool's time limit must not expire before those of the code.
POOL_SECONDS = 30.0
# The total time limit of a row, where the recipe sets none: `time_limit` for each test, but at least this many times.
# Once a program was late, no more than that: wrong code that hangs on each test would hold a worker for minutes.
LEAST_TESTS = 10
MOST_SECONDS = 600.0


class CodeTests:
    """1.0 if the Python code of the answer passes all tests of the row, else 0.0.

    The code is the answer's last fenced block, or the whole answer if there is none. The column `tests` is one of

        ["assert add(1, 2) == 3", ...]                      statements that call the code (MBPP)
        {"asserts": [...], "setup": "...", "prefix": "...", "entry_point": "..."}      with code around it (HumanEval)
        [{"input": "1 2\\n", "output": "3\\n"}, ...]        programs: standard input, expected output
        {"programs": [...], "checker": "..."}               with a program that compares the outputs

    or a layout of a published data set, see `read_tests`. `setup` runs before the statements. `prefix` is put before
    the code, and the tests can use its names too. With an `entry_point`, that function is all that the tests take from
    the code. None if the row has no tests. Raises InputError for tests in no known layout, and RewardError for tests
    that cannot run: their syntax, their setup, a module that is not installed.
    """

    def __init__(
        self,
        *,
        time_limit: Annotated[FiniteFloat, Gt(0)] = 5.0,
        total_time_limit: Annotated[FiniteFloat, Gt(0)] | None = None,
        memory_limit_mb: Annotated[int, Ge(1)] = 1024,
        max_processes: Annotated[int, Ge(1)] = 4,
        tolerance: Annotated[FiniteFloat, Ge(0)] | None = None,
        partial_credit: bool = False,
        isolation: Isolation = "namespaces",
    ) -> None:
        """Check by a trial run that this machine can provide the isolation, and Python in that memory.

        time_limit:       seconds of each program, or of each statement
        total_time_limit: seconds of all tests of a row; None: `time_limit` for each, at least ten times it, at most 600
        memory_limit_mb:  address space of the code, and of the tests, in MiB
        max_processes:    threads of the code at the same time; it can start no processes
        tolerance:        compare the words of outputs, and numbers by this difference; None: compare lines
        partial_credit:   score the fraction of tests that pass, instead of 1.0 for all of them
        isolation:        namespaces or rlimits, see rewards/README.md
        """
        check_isolation(isolation)
        self.isolation = isolation
        self.partial_credit = partial_credit
        self.tolerance = tolerance
        self.total = total_time_limit
        self.limits = Limits(seconds=time_limit, memory=memory_limit_mb << 20, processes=max_processes)
        check_memory(memory_limit_mb, isolation)
        self.timeout = (total_time_limit or MOST_SECONDS) + POOL_SECONDS

    def check_row(self, *, tests: Any) -> None:
        """Raise InputError for tests in no known layout."""
        if tests:
            read_tests(tests)

    def row_timeout(self, *, tests: Any) -> float:
        """Return the seconds after which a worker that scores a completion to these tests has hung."""
        try:
            read = read_tests(tests) if tests else None
        except InputError:  # reported by `check_row`, or by the call
            read = None
        if read is None:
            return POOL_SECONDS
        num_tests = len(read.asserts if isinstance(read, Statements) else read.cases)
        # The last program may begin just before the end of the total time, and a checker has as long as its program.
        seconds = self._total(num_tests) + self.limits.seconds
        return seconds * (2 if isinstance(read, Programs) and read.checker else 1) + POOL_SECONDS

    def __call__(self, completion: ParsedCompletion, *, tests: Any) -> float | None:  # Any: read here
        if not tests:
            return None
        read = read_tests(tests)
        code = extract_code(completion.answer)
        check_installed(code)
        if isinstance(read, Programs):
            passed = self._run_programs(code, read)
        else:
            passed = self._run_statements(code, read.as_statements(code) if isinstance(read, Calls) else read)
        return sum(passed) / len(passed) if self.partial_credit else float(all(passed))

    def _run_statements(self, code: str, tests: Statements) -> list[bool]:
        # Code that begins with `from __future__` is no Python after a prefix, and may well work without it.
        return run_tests(
            [f"{tests.prefix}\n{code}", code],
            {
                "asserts": list(tests.asserts),
                "setup": tests.setup,
                "prefix": tests.prefix,
                "entry_point": tests.entry_point,
            },
            limits=replace(self.limits, total=self._total(len(tests.asserts))),
            isolation=self.isolation,
            paths=find_packages([code, tests.prefix, tests.setup, *tests.asserts]),
        )

    def _run_programs(self, code: str, tests: Programs) -> list[bool]:
        """Return a verdict per program, or up to the first that fails where that decides.

        The total time limit is for programs that each keep their own. If they need more together, no verdict is known.
        The start of a sandbox counts against no limit.
        """
        total, seconds = self._total(len(tests.cases)), 0.0
        total_if_late = self.total or LEAST_TESTS * self.limits.seconds
        paths = find_packages([code])
        was_late = False
        passed: list[bool] = []
        for text, expected in tests.cases:
            if was_late and seconds >= total_if_late:
                return passed + [False] * (len(tests.cases) - len(passed))
            if seconds >= total:
                raise RewardError(
                    f"the {len(tests.cases)} programs of a row need more than total_time_limit ({total:g} s) "
                    "together, but none more than time_limit: raise total_time_limit"
                )
            outcome = run_program(code, stdin=text.encode(), limits=self.limits, isolation=self.isolation, paths=paths)
            seconds += outcome.seconds
            was_late |= outcome.ending == "time"
            passed.append(
                outcome.ending == "exited"
                and outcome.code == 0
                and self._is_right(outcome.output, text, expected, tests.checker)
            )
            if not passed[-1] and not self.partial_credit:
                break
        return passed

    def _total(self, num_tests: int) -> float:
        return self.total or min(max(num_tests, LEAST_TESTS) * self.limits.seconds, MOST_SECONDS)

    def _is_right(self, output: bytes, text: str, expected: str, checker: str) -> bool:
        if not checker:
            return is_right(output, expected.encode(), tolerance=self.tolerance)
        texts = (text, expected, output.decode(errors="replace"))
        return ask_checker(checker, texts, limits=self.limits, isolation=self.isolation)


def extract_code(answer: str) -> str:
    """Return the last fenced block of Python or of no named language; without one, the whole answer.

    >>> extract_code("So:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = [fence.code for fence in find_fences(answer) if LANGUAGE.match(fence.info)[0].lower() in LANGUAGES]  # type: ignore[index]
    return blocks[-1] if blocks else answer
