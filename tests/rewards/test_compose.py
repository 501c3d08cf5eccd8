"""Composition: a recipe's rewards become one total, errors are no bad answers, and a recipe's mistake is named."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from rekatrain.data.chat import parse_completion
from rekatrain.data.errors import InputError
from rekatrain.rewards.compose import RewardFunction, build_reward_functions
from rekatrain.rewards.errors import RewardError, describe_error
from rekatrain.rewards.grader import Grader, check_columns
from rekatrain.rewards.scoring import ScoringConfig

PROJECT = Path(__file__).parents[2]

# Workers import it by name, as they do a user's file.
MY_REWARDS = '''
import asyncio
import re

from rekatrain.rewards import InputError

limit = 3


def brevity(completion, *, language, limit=50):
    return float(len(completion.answer) <= limit) if language == "en" else None


def trl_length(prompts, completions, scale=1.0, **kwargs):
    assert len(prompts) == len(kwargs["completion_ids"]) == len(kwargs["language"]) == len(completions)
    return [scale * len(completion) for completion in completions]


def no_kwargs(completions):
    return [0.0 for _ in completions]


class Starts:
    def __init__(self, *, pattern, timeout=None):
        raise AssertionError("never made: its option clashes")

    def __call__(self, completion):
        return 1.0


class Pattern:
    is_ready = False

    def __init__(self, *, pattern, value=1.0):
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise InputError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        self.value = value

    def setup(self):
        self.is_ready = True

    def __call__(self, completion, *, language):
        assert self.is_ready
        return self.value * bool(self.pattern.match(completion.answer))


class Batch:
    calls = 0

    def setup(self):
        self.factor = 2

    def __call__(self, completions, **columns):
        self.calls += 1
        return [self.factor * len(completion) for completion in completions]

    def metrics(self):
        return {"calls": self.calls}


async def first(completions, **kwargs):
    await meet(0)
    return [1.0] * len(completions)


async def second(completions, **kwargs):
    await meet(1)
    return [2.0] * len(completions)


async def endless(completions, **kwargs):
    await asyncio.sleep(1_000)


arrived = [None, None]


async def meet(number):
    """Returns only when both coroutines are under way."""
    arrived[number] = True
    while not all(arrived):
        await asyncio.sleep(0.001)
'''


@pytest.fixture(autouse=True)
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def score(functions, completions, **columns):
    size = len(completions)
    with Grader(functions) as grader:
        return grader.score(prompts=["?"] * size, completions=completions, completion_ids=[[1]] * size, columns=columns)


def reward(function, *, name="custom", weight=1.0):
    return RewardFunction(name=name, weight=weight, function=function, columns=())


def test_grader_equals_calling_a_scorer_one_by_one():
    completions, languages = ["short <sep>", "rather longer <sep>", "kurz <sep>"], ["en", "en", "de"]
    scores = score(build_reward_functions({"my_rewards:brevity": {"limit": 6}}), completions, language=languages)
    import my_rewards

    one_by_one = [
        my_rewards.brevity(parse_completion(c), language=g, limit=6)
        for c, g in zip(completions, languages, strict=True)
    ]
    assert scores.by_name["my_rewards:brevity"] == one_by_one == [1.0, 0.0, None]


def test_grader_runs_a_trl_function_unmodified():
    functions = build_reward_functions({"my_rewards:trl_length": {"weight": 2, "scale": 0.5}})
    assert score(functions, ["ab", "abcd"], language=["en", "de"]).total == [2.0, 4.0]


def test_total_is_the_weighted_sum_of_the_rewards_that_apply():
    functions = [
        reward(lambda **_: [1.0, None, None, 0.0], name="a", weight=2.0),
        reward(lambda **_: [True, 1, None, None], name="b", weight=-0.5),
        reward(lambda **_: [100.0, 100.0, 100.0, 100.0], name="logged", weight=0.0),
    ]
    scores = score(functions, ["w", "x", "y", "z"])
    assert scores.total[:2] == [1.5, -0.5] and math.isnan(scores.total[2]) and scores.total[3] == 0.0
    assert scores.by_name["b"] == [1.0, 1.0, None, None] and scores.by_name["logged"] == [100.0] * 4


@pytest.mark.parametrize("values", [(0.5, 1), numpy.array([0.5, 1.0]), [numpy.float32(0.5), numpy.bool_(True)]])
def test_batch_values_of_any_sequence_become_floats(values):
    values_found = score([reward(lambda **_: values)], ["x", "y"]).total
    assert values_found == [0.5, 1.0] and all(type(value) is float for value in values_found)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 values; expected a list of 2"),
        (None, "returned NoneType None; expected a list of 2"),
        (0.5, "returned float 0.5"),
        ("no", "returned str 'no'"),
        ({"x": 1.0, "y": 2.0}, "returned dict"),
    ],
)
def test_batch_values_must_be_one_per_completion(returned, message):
    with pytest.raises(InputError, match=f"reward custom {message}"):
        score([reward(lambda **_: returned)], ["x", "y"])


def test_grader_error_names_the_reward_and_shows_its_traceback():
    def broken(**_):
        raise KeyError("solution")

    with pytest.raises(
        RewardError, match=r"(?s)reward custom failed on 1 of its last 1 .*Traceback.*in broken"
    ) as caught:
        score([reward(broken)], ["x"])
    assert str(caught.value).endswith("KeyError: 'solution'")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"math_answr": None}, "there is no reward math_answr, did you mean math_answer?.*module:function"),
        ({"my_rewards:brevty": None}, "my_rewards has no function brevty, did you mean brevity?"),
        ({"my_rewards:limit": None}, "my_rewards has no function limit"),
        ({"no_such_module:f": None}, "no module no_such_module in the current directory or installed"),
        ({"my_rewards:": None}, "there is no reward my_rewards:"),
        ({"my_rewards:no_kwargs": None}, r"has the parameters \(completions\)"),
        (
            {"my_rewards:brevity": {"limt": 5}},
            "unknown key rewards.my_rewards:brevity.limt: did you mean rewards.my_rewards:brevity.limit?",
        ),
        (
            {"my_rewards:brevity": {"language": "en"}},
            "rewards.my_rewards:brevity.language is a column of the rows and not an option",
        ),
        ({"math_answer": {"weigth": 1}}, "rewards.math_answer.weigth: did you mean rewards.math_answer.weight?"),
        ({"math_answer": {"weight": "1"}}, "rewards.math_answer.weight is '1'; it should be a valid number"),
        ({"math_answer": {"weight": True}}, "rewards.math_answer.weight is True; it should be a valid number"),
        ({"math_answer": {"weight": math.nan}}, "rewards.math_answer.weight is nan; it should be a finite number"),
        ({"math_answer": 1.0}, "rewards.math_answer is 1.0; it should be a weight and options, "),
        ({"math_answer": {"weight": 0}}, "at least one reward must have a weight other than 0"),
        ({}, "at least one reward must have a weight other than 0"),
    ],
)
def test_build_reward_functions_names_a_mistake_in_the_recipe(specs, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        build_reward_functions(specs)


def test_check_columns_names_a_missing_column():
    functions = build_reward_functions({"reasoning_format": None, "math_answer": None})
    check_columns(functions, ["answer"])
    with pytest.raises(
        InputError, match=r"reward math_answer needs the column answer, .* \(columns: question, solution\)"
    ):
        check_columns(functions, ["solution", "question"])
    with pytest.raises(InputError, match=r"needs the column answer, .* \(columns: none\)"):
        score(functions, ["x"])


def test_rewards_import_neither_torch_nor_transformers():
    code = "import sys, rekatrain.rewards; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def test_reward_class_checks_options_early_and_is_set_up_late():
    functions = build_reward_functions({"my_rewards:Pattern": {"pattern": "^4", "value": 3, "weight": 2}})
    assert functions[0].columns == ("language",)
    assert score(functions, ["42 <sep>", "24 <sep>"], language=["en", "en"]).total == [6.0, 0.0]
    with pytest.raises(InputError, match=r"pattern '\(' is not a regular expression"):
        build_reward_functions({"my_rewards:Pattern": {"pattern": "("}})
    with pytest.raises(InputError, match="rewards.my_rewards:Pattern.pattern is missing"):
        build_reward_functions({"my_rewards:Pattern": None})
    with pytest.raises(InputError, match="my_rewards:Starts has an option timeout, which every reward has already"):
        build_reward_functions({"my_rewards:Starts": {"pattern": "4"}})


def test_batch_class_is_set_up_once_and_reports_metrics():
    with Grader(build_reward_functions({"my_rewards:Batch": None})) as grader:
        for _ in range(2):
            batch = {"prompts": ["?"], "completions": ["abc"], "completion_ids": [[1]], "columns": {}}
            assert grader.score(**batch).total == [6.0]
        assert grader.metrics()["rewards/my_rewards:Batch/calls"] == 2.0


def test_coroutine_functions_run_together_under_a_time_limit():
    functions = build_reward_functions(
        {"my_rewards:first": None, "my_rewards:second": None, "my_rewards:endless": {"weight": 0, "timeout": 1}}
    )
    names = [function.name for function in functions]
    scores = [score(functions[:2], ["x", "y"])]
    with pytest.raises(RewardError, match="(?s)endless failed on 2 of its last 2 .*no result after 1 seconds"):
        score(functions, ["x", "y"])
    assert [scores[0].by_name[name] for name in names[:2]] == [[1.0, 1.0], [2.0, 2.0]]


def test_batch_function_that_hangs_ends_the_process_with_a_stack():
    code = """
import time
from rekatrain.rewards.compose import RewardFunction
from rekatrain.rewards.grader import Grader
def stuck_here(**_):
    time.sleep(60)
functions = [RewardFunction(name="slow", weight=1.0, function=stuck_here, columns=(), timeout=0.5)]
Grader(functions).score(prompts=["?"], completions=["x"], completion_ids=[[1]], columns={})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "Timeout" in done.stderr and "in stuck_here" in done.stderr


def test_grader_logs_the_first_traceback_of_a_reward(caplog):
    calls = []

    def flaky(completions, **_):
        calls.append(len(completions))
        if len(calls) > 1:
            raise KeyError("solution")
        return [1.0] * len(completions)

    batch = {"prompts": ["?"] * 4, "completions": ["x"] * 4, "completion_ids": [[1]] * 4, "columns": {}}
    with Grader([reward(flaky)], ScoringConfig(max_error_share=1.0)) as grader:
        scores = [grader.score(**batch) for _ in range(3)]
    (record,) = caplog.records
    first, *lines = record.getMessage().splitlines()
    assert first == "reward custom failed on a completion; the traceback of this first failure:"
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "KeyError: 'solution'"
    assert scores[0].errors == [{}] * 4
    (error,) = {errors["custom"] for errors in scores[2].errors}
    assert error.startswith("KeyError: 'solution' (test_compose.py, line ")


def test_describe_error_is_one_line_with_its_place():
    assert describe_error(RewardError("no answer\nfrom the server")) == "RewardError: no answer from the server"
    try:
        check_columns(None, None)
    except TypeError as error:
        assert re.fullmatch(r"TypeError: .* \(grader.py, line \d+\)", describe_error(error))


@pytest.mark.parametrize("bad", [math.nan, math.inf, "0.5", numpy.ones(2), RewardError("no answer from the server")])
def test_batch_value_that_is_bad_is_an_error_of_its_completion(bad):
    scores = score([reward(lambda **_: [1.0, bad, 0.5, 0.0, 0.0, 0.0])], list("uvwxyz"))
    assert scores.by_name["custom"] == [1.0, None, 0.5, 0.0, 0.0, 0.0]
    assert math.isnan(scores.total[1]) and scores.total[0] == 1.0
    assert [list(errors) for errors in scores.errors] == [[], ["custom"], [], [], [], []]


def test_grader_stops_above_max_error_share():
    failing = [1.0] * 15 + [math.nan] * 5
    batch = {"prompts": ["?"] * 20, "completions": ["x"] * 20, "completion_ids": [[1]] * 20, "columns": {}}
    with Grader([reward(lambda **_: failing)], ScoringConfig(max_error_share=0.25)) as grader:
        for _ in range(3):
            grader.score(**batch)
    with (
        Grader([reward(lambda **_: failing)], ScoringConfig(max_error_share=0.24)) as grader,
        pytest.raises(RewardError, match=r"failed on 5 of its last 20 completions .*is 0.24"),
    ):
        grader.score(**batch)


def test_requires_gates_the_total():
    def gated(*gate_values, weight=0.0):
        gate = reward(lambda **_: list(gate_values), name="gate", weight=weight)
        right = RewardFunction(name="right", weight=2.0, function=lambda **_: [1.0] * 4, columns=(), requires=("gate",))
        return score([gate, right], list("wxyz"))

    scores = gated(1.0, 0.0, 0.5, None)
    assert scores.total == [2.0, 0.0, 0.0, 2.0] and scores.by_name["right"] == [1.0] * 4
    assert gated(1.0, 0.0, 0.5, None, weight=1.0).total == [3.0, 0.0, 0.5, 2.0]
    assert math.isnan(gated(1.0, math.nan, 1.0, 1.0).total[1])


@pytest.mark.parametrize("required", ["reasoning_formt", "math_answer", ["reasoning_format", "other"]])
def test_requires_rejects_what_is_no_other_reward(required):
    with pytest.raises(InputError, match="rewards.math_answer.requires is .* is no other reward of the recipe"):
        build_reward_functions({"reasoning_format": {"weight": 0}, "math_answer": {"requires": required}})


def test_disagreements_are_largest_for_a_lone_reward():
    from rekatrain.trainer.rloo.sample_command import disagreements

    values = {"a": [0.0, 0.0, 1.0, 1.0], "b": [0.0, 0.0, 10.0, 0.0], "same": [5.0] * 4, "none": [None] * 4}
    spreads = disagreements(values, {"a": 1.0, "b": 1.0, "same": 1.0, "none": 1.0})
    assert max(range(4), key=spreads.__getitem__) == 3
    # b says of each what a says, times -2: with a negative weight they agree, else they do not
    values = {"a": [0.0, 1.0, 2.0], "b": [0.0, -2.0, -4.0]}
    assert disagreements(values, {"a": 1.0, "b": -0.5}) == pytest.approx([0.0] * 3)
    assert disagreements(values, {"a": 1.0, "b": 0.5})[0] == pytest.approx(6**0.5)
