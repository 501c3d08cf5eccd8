"""Reward functions written for TRL: the same function gets the same arguments from the installed TRL and from us."""

import asyncio
import builtins
import copy
import json
import locale
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from transformers import TrainerState
from trl import RLOOTrainer

from rekatrain.data.errors import InputError
from rekatrain.rewards import Score
from rekatrain.rewards.compose import RewardFunction, build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.progress import Progress
from rekatrain.rewards.scoring import ScoringConfig

PROMPTS = ["human: 2+2? <sep> assistant:", "human: Color? <sep> assistant:"]
COMPLETIONS = [" <reasoning>\nSum.\n</reasoning>\n\n4 <sep>", " blue <sep>"]
MESSAGES = [[{"role": "user", "content": "2+2?"}], [{"role": "user", "content": "Color?"}]]
TURNS = [[{"role": "assistant", "content": text.removesuffix(" <sep>").strip()}] for text in COMPLETIONS]
IDS = [[5, 6], [7]]
COLUMNS = {"solution": ["4", "red"], "level": [1, None]}

MY_REWARDS = '''
import asyncio


def recording(prompts, completions, completion_ids, solution, trainer_state, log_metric, log_extra, **kwargs):
    """Record all that it gets, and report through both of TRL's functions."""
    log_metric("num", len(completions))
    log_metric("num", 2 * len(completions))
    log_extra("given", [str(s) for s in solution])
    seen.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "solution": solution,
                 "kwargs": sorted(kwargs), "level": kwargs["level"], "step": trainer_state.global_step,
                 "max_steps": trainer_state.max_steps, "state": type(trainer_state)})
    return [0.5, None]


async def recording_async(prompts, completions, completion_ids, **kwargs):
    await asyncio.sleep(0)
    return recording(prompts, completions, completion_ids, **kwargs)


def open_r1(completions, solution, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if s in c else 0.0 for c, s in zip(contents, solution)]


def either(completions, **kwargs):
    return [len(c) if isinstance(c, str) else -1 for c in completions]


def annotated(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:
    return [float(isinstance(c, list)) for c in completions]


def text(completions: list[str], **kwargs) -> list[float]:
    return [float(isinstance(c, str)) for c in completions]


def broken(completions, **kwargs):
    raise KeyError("a mistake of its own")


seen = []
'''


@pytest.fixture(autouse=True)
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_trl_rewards.py").write_text(MY_REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_trl_rewards", None)
    import my_trl_rewards

    yield my_trl_rewards
    sys.modules.pop("my_trl_rewards", None)


def score(functions, progress=None, config=None):
    with Grader(functions, config) as grader:
        return grader.score(
            prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS, columns=COLUMNS, progress=progress
        )


def score_by_trl(function, *, conversational):
    """Call the installed TRL's own `_calculate_rewards` -> the values, and what the function has reported."""
    PartialState()  # TRL logs by accelerate
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True, num_processes=1),
        reward_funcs=[function],
        reward_processing_classes=[None],
        reward_func_names=["it"],
        state=TrainerState(global_step=7, max_steps=20),
        async_loop=loop,
        args=SimpleNamespace(report_to=[]),
        metrics={},
        extra={},
    )
    trainer._log_completion_extra = lambda column, values: trainer.extra.setdefault(column, []).extend(values)
    trainer._log_metric = lambda name, value: trainer.metrics.setdefault(name, []).append(value)
    prompts = MESSAGES if conversational else PROMPTS
    inputs = [
        {"prompt": prompt, **{name: values[index] for name, values in COLUMNS.items()}}
        for index, prompt in enumerate(prompts)
    ]
    try:
        values = RLOOTrainer._calculate_rewards.__wrapped__(
            trainer, inputs, copy.deepcopy(prompts), TURNS if conversational else COMPLETIONS, IDS
        )
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
    return values[:, 0].tolist(), trainer


@pytest.mark.parametrize("name", ["recording", "recording_async"])
@pytest.mark.parametrize("conversational", [False, True])
def test_function_gets_from_us_what_it_gets_from_trl(my_rewards, name, conversational):
    (function,) = build_reward_functions({f"my_trl_rewards:{name}": {"conversational": conversational}})
    scores = score([function], Progress(step=7, max_steps=20))
    values, trainer = score_by_trl(getattr(my_rewards, name), conversational=conversational)
    ours, theirs = my_rewards.seen
    assert ours == theirs
    (by_us,) = scores.by_name.values()
    assert by_us[0] == values[0] == 0.5 and by_us[1] is None and torch.tensor(values[1]).isnan()
    assert [of_one[function.name]["num"] for of_one in scores.metrics] == [3.0, 3.0]
    assert trainer.metrics == {"num": [2, 4]}
    assert [of_one[function.name] for of_one in scores.notes] == [{"given": "4"}, {"given": "red"}]
    assert trainer.extra == {"given": ["4", "red"]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my_trl_rewards:open_r1", [1.0, 0.0]),
        ("my_trl_rewards:either", [len(text) for text in COMPLETIONS]),
        ("my_trl_rewards:annotated", [1.0, 1.0]),
        ("my_trl_rewards:text", [1.0, 1.0]),
        ("trl.rewards:think_format_reward", [0.0, 0.0]),
    ],
)
def test_function_gets_the_form_of_completions_that_it_takes(name, expected):
    functions = build_reward_functions({name: None})
    assert list(score(functions).by_name.values()) == [expected]


def test_rewards_of_trl_give_what_they_give_in_trl():
    from trl.rewards import accuracy_reward

    solutions = ["$4$", "$5$"]
    completions = [" The sum is $\\boxed{4}$. <sep>", " $\\boxed{6}$ <sep>"]
    direct = accuracy_reward([[{"content": text.removesuffix(" <sep>").strip()}] for text in completions], solutions)
    with Grader(build_reward_functions({"trl.rewards:accuracy_reward": None})) as grader:
        scores = grader.score(
            prompts=PROMPTS, completions=completions, completion_ids=IDS, columns={"solution": solutions}
        )
    assert scores.by_name["trl.rewards:accuracy_reward"] == direct == [1.0, 0.0]


def test_form_is_a_key_and_a_wrong_function_keeps_its_own_error():
    functions = build_reward_functions(
        {"my_trl_rewards:either": {"conversational": True}, "my_trl_rewards:broken": None}
    )
    scores = score(functions, config=ScoringConfig(max_error_share=1.0))
    assert scores.by_name["my_trl_rewards:either"] == [-1.0, -1.0]
    assert "a mistake of its own" in scores.errors[0]["my_trl_rewards:broken"]
    with pytest.raises(InputError, match="is a scorer"):
        build_reward_functions({"math_answer": {"conversational": True}})


def reward(function, name="it"):
    return RewardFunction(name=name, weight=1.0, function=function, columns=())


def test_column_named_like_an_argument_does_not_replace_it():
    got = {}
    with Grader([reward(lambda **arguments: got.update(arguments) or [1.0])]) as grader:
        columns = {"completions": ["theirs"], "prompts": ["theirs"], "trainer_state": [1], "log_metric": [2]}
        grader.score(prompts=["p"], completions=["ours"], completion_ids=[[3]], columns=columns)
    assert (got["prompts"], got["completions"], got["completion_ids"]) == (["p"], ["ours"], [[3]])
    assert isinstance(got["trainer_state"], TrainerState) and callable(got["log_metric"])


def test_what_a_function_changes_reaches_no_other():
    def vandal(prompts, completions, completion_ids, solution, **kwargs):
        for values in (prompts, completions, completion_ids, solution, kwargs["level"]):
            values[0] = "changed"
        COLUMNS_NESTED["tests"][0].clear()
        kwargs["tests"][0].append("changed")
        return [1.0] * len(completions)

    seen = []
    COLUMNS_NESTED = {"tests": [["a"], ["b"]]}
    columns = {**copy.deepcopy(COLUMNS), "tests": [["a"], ["b"]]}
    functions = [reward(vandal), reward(lambda **arguments: seen.append(arguments) or [1.0, 1.0], "next")]
    with Grader(functions) as grader:
        grader.score(prompts=list(PROMPTS), completions=list(COMPLETIONS), completion_ids=IDS, columns=columns)
    (arguments,) = seen
    assert columns == {**COLUMNS, "tests": [["a"], ["b"]]} and IDS == [[5, 6], [7]]
    assert {name: arguments[name] for name in columns} == columns
    assert (arguments["prompts"], arguments["completions"]) == (PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    ("values", "message"), [([1], "got 1 values; expected 2"), ([1, 2, 3], "got 3 values; expected 2")]
)
def test_log_extra_takes_one_value_per_completion(values, message):
    def wrong(log_extra, completions, **kwargs):
        log_extra("mine", values)
        return [1.0] * len(completions)

    with pytest.raises(InputError, match=message):
        score([reward(wrong)])


@pytest.mark.parametrize("value", [float("nan"), "high", None, [1]])
def test_log_metric_takes_finite_numbers(value):
    def wrong(log_metric, completions, **kwargs):
        log_metric("mine", value)
        return [1.0] * len(completions)

    scores = score([reward(wrong)], config=ScoringConfig(max_error_share=1.0))
    assert "the metric mine is" in scores.errors[0]["it"]


# Code that would end or move the process


class Mine(BaseException):
    def __str__(self):
        raise Mine


class Unreadable:
    def __repr__(self):
        raise Mine


def harm(how):
    def harmful(completions, **kwargs):
        if how == "exit":
            sys.exit(3)
        if how == "_exit":
            os._exit(3)
        if how == "abort":
            os.abort()
        if how == "killpg":
            os.killpg(os.getpgrp(), 9)
        if how == "killpg 0":
            os.killpg(0, 9)
        if how == "kill all":
            os.kill(0, 9)
        if how == "exec":
            os.execvp("true", ["true"])
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise SIGKILL":
            signal.raise_signal(signal.SIGKILL)
        if how == "kill the launcher":
            os.kill(os.getppid(), signal.SIGKILL)
        if how == "own class":
            raise Mine
        if how in ("GeneratorExit", "KeyboardInterrupt"):
            raise getattr(builtins, how)
        if how == "CancelledError":
            raise asyncio.CancelledError
        if how == "value":
            return [Unreadable()] * len(completions)
        if how == "alarm":
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            time.sleep(5)
        if how == "close":
            os.close(1)
        if how == "close all":
            os.closerange(0, 1000)
        if how == "thread":
            thread = threading.Thread(target=lambda: os._exit(3))
            thread.start()
            thread.join()
        if how == "chdir":
            os.chdir("/")
        return [1.0] * len(completions)

    async def harmful_async(completions, **kwargs):
        return harmful(completions)

    return harmful, harmful_async


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        *("exit", "_exit", "abort", "killpg", "killpg 0", "kill all", "exec", "close", "close all"),
        *("SIGKILL", "raise SIGKILL", "kill the launcher", "own class", "GeneratorExit", "KeyboardInterrupt"),
        *("CancelledError", "value", "alarm"),
    ],
)
def test_function_that_would_end_the_run_is_an_error(how, is_async):
    scores = score([reward(harm(how)[is_async])], config=ScoringConfig(max_error_share=1.0))
    assert all(of_one["it"] for of_one in scores.errors)
    os.fstat(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["chdir", "thread"])
def test_function_that_would_move_the_run_does_not(how):
    folder = Path.cwd()
    assert score([reward(harm(how)[False])]).total == [1.0, 1.0]
    assert Path.cwd() == folder and os.fstat(1) and os._exit.__module__ == "posix"


def test_ctrl_c_ends_a_function_that_runs():
    def waits(completions, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return [1.0] * len(completions)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            score([reward(waits)])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_state_of_the_run_is_restored_after_each_function():
    def vandal(completions, **kwargs):
        torch.set_grad_enabled(False), torch.set_default_dtype(torch.float64)
        os.umask(0o777), os.environ.pop("HOME"), locale.setlocale(locale.LC_ALL, "C")
        sys.stdout, sys.stderr = None, None
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
        sys.setrecursionlimit(3000), sys.settrace(lambda *_: None), signal.alarm(1)
        return [1.0] * len(completions)

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
        switches = (torch.is_grad_enabled(), torch.get_default_dtype(), sys.getrecursionlimit(), sys.gettrace())
        masks = (Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0], os.environ["HOME"])
        return handlers, switches, masks, locale.setlocale(locale.LC_ALL), sys.stdout, os.fstat(2).st_ino

    before = state()
    assert score([reward(vandal)]).total == [1.0, 1.0]
    assert before == state()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_random_numbers_of_a_function_go_on_from_step_to_step():
    drawn = []
    functions = [reward(lambda completions, **_: drawn.append(random.random()) or [1.0] * len(completions))]
    for _ in range(3):
        score(functions)
    assert len(set(drawn)) == 3


def test_process_that_a_function_forks_ends_with_the_call():
    def forks(completions, **kwargs):
        if os.fork() == 0:
            return ["the child"] * len(completions)  # it would go on as a second run
        os.wait()
        return [0.25] * len(completions)

    process = os.getpid()
    assert score([reward(forks)]).total == [0.25, 0.25] and os.getpid() == process


def test_function_may_fork_and_close_what_it_opened(tmp_path):
    def forks(completions, **kwargs):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"0.25")
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        value = float(os.read(reader, 10))
        os.close(reader)
        return [value] * len(completions)

    assert score([reward(forks)]).total == [0.25, 0.25]


# Scores with metrics and notes


def test_score_of_a_scorer_reaches_metrics_and_notes(tmp_path):
    Path("my_scores.py").write_text(
        "from rekatrain.rewards import Score\n"
        "def words(completion):\n"
        "    n = len(completion.answer.split())\n"
        "    return Score(1 / n, {'words': n}, notes={'answer': completion.answer, 'long': 'x' * 9000})\n"
        "def bad(completion):\n"
        "    return Score(1.0, {'words': float('nan')})\n"
    )
    functions = build_reward_functions({"my_scores:words": None, "my_scores:bad": {"weight": 0}})
    scores = score(functions, config=ScoringConfig(max_error_share=1.0))
    assert scores.by_name["my_scores:words"] == [1.0, 1.0]
    assert scores.metrics == [{"my_scores:words": {"words": 1.0}}] * 2
    notes = [of_one["my_scores:words"] for of_one in scores.notes]
    assert all(isinstance(note, str) and note.endswith("...") and len(json.dumps(note)) < 1600 for note in notes)
    assert "the metric words is nan" in scores.errors[0]["my_scores:bad"]


def test_score_of_a_batch_function_and_errors_beside_it():
    def some(completions, **kwargs):
        return [Score(0.5, notes=("because", torch.tensor(2))), RewardError("no answer")]

    scores = score([reward(some)], config=ScoringConfig(max_error_share=1.0))
    assert scores.by_name["it"] == [0.5, None] and scores.notes == [{"it": ["because", 2]}, {}]
    assert scores.errors[1] == {"it": "RewardError: no answer"}


EXITING = {
    "import": """
import sys

def it(completion):
    return 1.0

sys.exit("usage: ...")
""",
    "init": """
import sys

class it:
    def __init__(self):
        sys.exit(4)

    def __call__(self, completion):
        return 1.0
""",
}
SETUPS = """
import sys

class Scorer:
    def setup(self):
        sys.exit(5)

    def __call__(self, completion):
        return 1.0

class Batch:
    def setup(self):
        sys.exit(6)

    def __call__(self, completions, **kwargs):
        return []
"""


@pytest.mark.parametrize("where", EXITING)
def test_reward_that_exits_when_it_is_made_is_one_line(where):
    Path(f"exits_at_{where}.py").write_text(EXITING[where])
    with pytest.raises(InputError, match=r"called sys\.exit\("):
        build_reward_functions({f"exits_at_{where}:it": None})


def test_setup_that_exits_is_an_error_of_the_reward():
    Path("exits_in_setup.py").write_text(SETUPS)
    scores = score(build_reward_functions({"exits_in_setup:Scorer": None}), config=ScoringConfig(max_error_share=1.0))
    assert all("SystemExit: 5" in of_one["exits_in_setup:Scorer"] for of_one in scores.errors)
    with pytest.raises(RewardError, match=r"its setup called sys.exit\(6\)"):
        score(build_reward_functions({"exits_in_setup:Batch": None}))
