"""code_tests: right code passes, of every kind in right_code.py, and tests that cannot run are errors."""

import pytest

from rekatrain.data.chat import parse_completion, render_completion
from rekatrain.data.errors import InputError
from rekatrain.rewards.code import launcher
from rekatrain.rewards.code.code_tests import CodeTests
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.errors import RewardError
from tests.rewards.code import inspected_code, right_code

SUM = [{"input": "1 2\n", "output": "3\n"}]


@pytest.fixture(scope="module")
def scorer() -> CodeTests:
    return CodeTests(time_limit=20.0, memory_limit_mb=2048, partial_credit=True)


def grade(scorer: CodeTests, code: str, tests: object) -> float | None:
    return scorer(parse_completion(render_completion("Hm.", f"```python\n{code}\n```")), tests=tests)


@pytest.mark.parametrize("kind", right_code.PROGRAMS)
def test_right_program_passes(scorer: CodeTests, kind: str) -> None:
    assert grade(scorer, right_code.PROGRAMS[kind], SUM) == 1.0


@pytest.mark.parametrize("kind", right_code.FUNCTIONS)
def test_right_function_passes(scorer: CodeTests, kind: str) -> None:
    code, tests = right_code.FUNCTIONS[kind]
    assert grade(scorer, code, list(tests)) == 1.0


@pytest.mark.parametrize("kind", inspected_code.FUNCTIONS)
def test_inspected_function_passes(scorer: CodeTests, kind: str) -> None:
    code, tests = inspected_code.FUNCTIONS[kind]
    assert grade(scorer, code, list(tests)) == 1.0
    assert grade(scorer, "unrelated = 1", list(tests)) == 0.0


@pytest.mark.parametrize("kind", right_code.FUNCTIONS)
def test_no_function_passes_without_its_code(scorer: CodeTests, kind: str) -> None:
    """So each test does use the code: it fails without it."""
    _, tests = right_code.FUNCTIONS[kind]
    wrong = [test for test in tests if not test.endswith("()") or "assert" in test]
    assert grade(scorer, "unrelated = 1", wrong) == 0.0


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ({"asserts": ["assert f(1)"], "setup": "import sys\nsys.exit()"}, "the setup raises SystemExit"),
        ({"asserts": ["assert f(1)"], "setup": "raise KeyboardInterrupt"}, "the setup raises KeyboardInterrupt"),
        ({"asserts": ["assert f(1)"], "setup": "while True: pass"}, "they have not used the code within 1 s"),
        ({"asserts": ["assert f(1)"], "setup": "x = int('a')"}, "the setup raises ValueError"),
        ({"asserts": ["assert f(1)"], "setup": "def g(:"}, "setup is no Python"),
        (["assert f(1)", "assert f(1"], "test 2 is no Python"),
        (["import sys\nsys.exit(0)"], "test 1 raises SystemExit before it uses the code"),
        (["from no_such_module import x\nassert f(1)"], "test 1 needs a module"),
        (["assert f(1)\x00"], "test 1 is no Python"),
    ],
)
def test_tests_at_fault_are_an_error(tests: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        grade(CodeTests(time_limit=1.0), "def f(x): return x", tests)


def test_time_limit_scales_with_the_number_of_tests() -> None:
    """Each of 30 programs and statements keeps its limit; together they need more than ten times the limit."""
    slow = "import time\ntime.sleep(0.12)\nprint(3)"
    assert grade(CodeTests(time_limit=0.3), slow, SUM * 30) == 1.0
    function = "import time\ndef f(x):\n  time.sleep(0.12)\n  return x"
    assert grade(CodeTests(time_limit=0.3), function, ["assert f(1) == 1"] * 30) == 1.0
    with pytest.raises(RewardError, match=r"30 need more than total_time_limit \(0.5 s\) together"):
        grade(CodeTests(time_limit=0.3, total_time_limit=0.5), function, ["assert f(1) == 1"] * 30)


def test_late_code_ends_at_ten_times_the_limit() -> None:
    scorer = CodeTests(time_limit=0.1, partial_credit=True)
    assert grade(scorer, "while True: pass", SUM * 40) == 0.0


def test_worker_that_hangs_is_held_not_much_longer_than_the_tests() -> None:
    (reward,) = build_reward_functions({"code_tests": {"time_limit": 5.0}})
    assert reward.seconds_for({"tests": ["assert f(1)"] * 3}) == 50 + 5 + 30
    assert reward.seconds_for({"tests": SUM * 30}) == 150 + 5 + 30
    assert reward.seconds_for({"tests": {"programs": SUM, "checker": "print(1)"}}) == 2 * (50 + 5) + 30
    assert reward.seconds_for({"tests": None}) == 30
    (reward,) = build_reward_functions({"code_tests": {"timeout": 9.0}})
    assert reward.seconds_for({"tests": SUM * 30}) == 9.0


def test_start_counts_against_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has not started yet takes longer than the time limit of the program."""
    monkeypatch.setattr(launcher, "_servers", {})
    limits = launcher.Limits(seconds=0.1)
    from rekatrain.rewards.code.sandbox import run_program

    outcome = run_program("print(3)", stdin=bytes(10 << 20), limits=limits, isolation="namespaces")
    assert (outcome.ending, outcome.output) == ("exited", b"3\n")


def test_memory_limit_that_is_impossible_is_an_error() -> None:
    for megabytes in (1, 20):
        with pytest.raises(InputError, match=f"memory_limit_mb is {megabytes}, in which Python hardly starts"):
            CodeTests(memory_limit_mb=megabytes)


@pytest.mark.parametrize("layout", right_code.LAYOUTS)
def test_published_layout_is_read(scorer: CodeTests, layout: str) -> None:
    code, tests = right_code.LAYOUTS[layout]
    assert grade(scorer, code, tests) == 1.0
    wrong = (
        code.replace("sum(", "max(0, *")
        .replace("a + b", "a")
        .replace("b * n", "b")
        .replace("raise TypeError", "return ")
    )
    assert wrong != code
    assert grade(CodeTests(time_limit=20.0, memory_limit_mb=2048), wrong, tests) == 0.0


@pytest.mark.parametrize(
    "tests",
    [
        "hello",
        "x = 1",
        {"public_tests": {"input": ["1"], "output": []}},
        {"input_output": '{"inputs": ["1"], "outputs": ["1", "2"]}'},
        {"input_output": "no JSON"},
        {"test_cases": [{"input": "1", "output": "1", "type": "unknown"}]},
        {"asserts": ["assert f(1)"], "set_up": ""},
        {"asserts": [1]},
        {"verification_info": "[]"},
        {"inputs": [], "outputs": []},
        {"inputs": "1", "outputs": "2"},
        3.5,
    ],
)
def test_malformed_tests_are_an_input_error(scorer: CodeTests, tests: object) -> None:
    with pytest.raises(InputError, match="the column tests"):
        scorer.check_row(tests=tests)
