"""code_tests: programs and functions of programs.py, right and hostile."""

import pytest

from rekatrain.data.chat import parse_completion, render_completion
from rekatrain.rewards.code.code_tests import CodeTests
from rekatrain.rewards.code.sandbox import _problem
from tests.rewards.code import programs

pytestmark = pytest.mark.skipif(bool(_problem("namespaces")), reason=_problem("namespaces"))
SUM = [{"input": "1 2\n", "output": "3\n"}]
INSPECTED = (
    "import inspect, typing\ninspect.signature(f)\ninspect.getsource(f)\ntyping.get_type_hints(f)\nassert f(3) == 9"
)


def grade(code: str, tests: list[object], **options: object) -> float | None:
    scorer = CodeTests(**{"memory_limit_mb": 1024, **options})  # type: ignore[arg-type]
    return scorer(parse_completion(render_completion("Hm.", f"```python\n{code}\n```")), tests=tests)


@pytest.mark.parametrize("kind", programs.RIGHT)
def test_right_program_prints_the_sum(kind: str) -> None:
    assert grade(programs.RIGHT[kind], SUM, time_limit=20.0, memory_limit_mb=2048) == 1.0


@pytest.mark.parametrize("kind", programs.HOSTILE_PROGRAMS)
def test_hostile_program_earns_nothing(kind: str) -> None:
    assert grade(programs.HOSTILE_PROGRAMS[kind], SUM, time_limit=0.7) == 0.0


@pytest.mark.parametrize("kind", programs.HOSTILE_FUNCTIONS)
def test_hostile_function_earns_nothing(kind: str) -> None:
    for test in ("assert f(3) == 9", INSPECTED):
        assert grade(programs.HOSTILE_FUNCTIONS[kind], [test], time_limit=1.0) == 0.0
