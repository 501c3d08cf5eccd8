"""The pool: whatever a grader does, a step ends, other completions are scored, and no process is left behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rekatrain.rewards import InputError
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scoring import ScoringConfig

PROJECT = Path(__file__).parents[3]

GRADERS = """
import os, sys, threading, time

from rekatrain.data.errors import InputError


def length(completion, *, offset=0):
    return len(completion.answer) + offset


def dangerous(completion):
    text = completion.answer
    if text == "sleep":
        time.sleep(1_000)
    if text == "loop":
        while True:
            pass
    if text == "power":  # within one call of C, where Python hears no signal
        9 ** 9 ** 9
    if text == "exit":
        os._exit(3)
    if text == "kill":
        os.kill(os.getpid(), 9)
    if text == "kill by C":
        import ctypes
        ctypes.CDLL(None).kill(os.getpid(), 9)
    if text == "exit 0":
        os._exit(0)
    if text == "memory":
        bytearray(10 << 30)
    if text == "close":
        os.closerange(0, 1000)
    if text == "close all by C":
        import ctypes
        for number in range(1000):
            ctypes.CDLL(None).close(number)
    if text == "killpg":
        os.killpg(0, 9)
    if text == "kill server":
        os.killpg(os.getpgid(os.getppid()), 9)
    if text == "raise":
        raise KeyError("solution")
    if text == "system exit":
        sys.exit()
    if text == "nan":
        return float("nan")
    if text == "text":
        return "0.5"
    return 1.0


def here(completion, *, folder=os.getcwd()):
    moved = os.getcwd() != folder
    os.chdir("/")
    return 0.0 if moved else 1.0


def batch(completions, **kwargs):
    return [1.0 for _ in completions]


def strict(completion, *, gold):
    if not isinstance(gold, str):
        raise InputError(f"the column gold must be text, not {gold!r}")
    return float(completion.answer == gold)


def wrong_column(completion):
    raise InputError("the column answer must be a number")


def record(completion, *, path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {'torch' in sys.modules} {threading.current_thread() is threading.main_thread()}\\n")
    if completion.answer == "sleep":
        time.sleep(1_000)
    if completion.answer == "power":
        9 ** 9 ** 9
    return None
"""


@pytest.fixture(autouse=True)
def graders(tmp_path, monkeypatch):
    (tmp_path / "graders.py").write_text(GRADERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def batch(answers, **columns):
    completions = [f"{answer} <sep>" for answer in answers]
    size = len(answers)
    return {"prompts": ["?"] * size, "completions": completions, "completion_ids": [[1]] * size, "columns": columns}


DANGERS = {
    "sleep": "no result after 0.5 seconds",
    "loop": "no result after 0.5 seconds",
    "power": "no result after 0.5 seconds",
    "exit": "the worker died (exit code 3)",
    "kill": "RewardError: the reward called os.kill(",
    "kill by C": "the worker died (exit code -9: killed by SIGKILL)",
    "exit 0": "the worker died (exit code 0)",
    "memory": "out of memory",
    "raise": "KeyError: 'solution'",
    "system exit": "SystemExit",
    "nan": "RewardError: returned nan",
    "text": "RewardError: returned '0.5'",
}


def test_pool_failure_is_an_error_of_its_completion_alone():
    answers = [word for danger in DANGERS for word in ("fine", danger, "fine", "fine", "fine", "fine")]
    functions = build_reward_functions({"graders:dangerous": {"timeout": 0.5}, "graders:length": {"weight": 0.0}})
    with Grader(functions, ScoringConfig(num_workers=2)) as grader:
        for _ in range(2):
            started = time.monotonic()
            scores = grader.score(**batch(answers))
            assert time.monotonic() - started < 15
            values = dict(zip(answers, scores.by_name["graders:dangerous"], strict=True))
            errors = dict(zip(answers, scores.errors, strict=True))
            assert values["fine"] == 1.0 and errors["fine"] == {}
            for danger, message in DANGERS.items():
                assert values[danger] is None and message in errors[danger]["graders:dangerous"], danger
            assert [math.isnan(total) for total in scores.total] == [answer != "fine" for answer in answers]
            assert scores.by_name["graders:length"] == [float(len(answer)) for answer in answers]
        assert grader.metrics()["rewards/graders:dangerous/seconds"] > 2 * 3 * 0.5


def test_pool_scorer_can_neither_end_nor_move_the_run(tmp_path):
    answers = ["fine", "close", "fine", "killpg", "fine", "close all by C", "fine", "kill server", "fine", "fine"]
    functions = build_reward_functions({"graders:dangerous": {"timeout": 2.0}, "graders:here": {"weight": 0}})
    with Grader(functions, ScoringConfig(num_workers=1, max_error_share=1.0)) as grader:
        for answer in answers:
            scores = grader.score(**batch([answer]))
            assert scores.by_name["graders:dangerous"] == [1.0 if answer in ("fine", "kill server") else None], answer
            assert scores.by_name["graders:here"] == [1.0], answer


def test_pool_names_setup_where_a_first_call_is_late():
    functions = build_reward_functions({"graders:dangerous": {"timeout": 0.5}})
    with Grader(functions, ScoringConfig(num_workers=1, max_error_share=1.0)) as grader:
        first, _, second = (grader.score(**batch([answer])).errors[0] for answer in ("sleep", "fine", "sleep"))
    assert "setup()" in first["graders:dangerous"] and "raise timeout" in first["graders:dangerous"]
    assert second["graders:dangerous"] == "no result after 0.5 seconds"


def test_on_timeout_zero_scores_a_late_completion_0(tmp_path):
    spec = {"graders:dangerous": {"timeout": 0.5, "on_timeout": "zero"}}
    with Grader(build_reward_functions(spec), ScoringConfig(num_workers=2)) as grader:
        scores = grader.score(
            prompts=["?"] * 3,
            completions=[f"{text} <sep>" for text in ("loop", "fine", "raise")],
            completion_ids=[[1]] * 3,
            columns={},
        )
    assert scores.by_name["graders:dangerous"] == [0.0, 1.0, None]
    assert [bool(errors) for errors in scores.errors] == [False, False, True]
    with pytest.raises(InputError, match=r"on_timeout is 'zero', but graders:batch scores a whole batch"):
        build_reward_functions({"graders:batch": {"on_timeout": "zero"}})


def test_pool_raises_an_input_error_of_a_scorer(tmp_path):

    with (
        Grader(build_reward_functions({"graders:wrong_column": None})) as grader,
        pytest.raises(InputError, match="the column answer must be a number"),
    ):
        grader.score(**batch(["x"]))


def test_pool_malformed_row_is_an_error_of_its_completion():
    rewards = build_reward_functions({"graders:strict": None})
    with Grader(rewards, ScoringConfig(num_workers=1)) as grader:
        scores = grader.score(**batch(["x"] * 8, gold=[7, *["x"] * 7]))
        assert scores.by_name["graders:strict"] == [None, *[1.0] * 7]
        assert scores.errors[0] == {"graders:strict": "the column gold must be text, not 7"}
        later = grader.score(**batch(["x"], gold=[7]))  # after good rows, a batch of bad ones ends no run either
        assert later.errors == [{"graders:strict": "the column gold must be text, not 7"}]


def test_max_error_share_1_lets_a_first_batch_fail():
    rewards = build_reward_functions({"graders:dangerous": None})
    with Grader(rewards, ScoringConfig(num_workers=1, max_error_share=1.0)) as grader:
        assert grader.score(**batch(["raise"])).by_name["graders:dangerous"] == [None]
        assert grader.score(**batch(["fine"])).by_name["graders:dangerous"] == [1.0]


def test_worker_has_no_torch_and_scores_on_its_main_thread(tmp_path):
    import torch  # noqa: F401  # as in the training process

    path = str(tmp_path / "record")
    with Grader(build_reward_functions({"graders:record": None})) as grader:
        grader.score(**batch(["x"] * 4, path=[path] * 4))
    record = [line.split() for line in Path(path).read_text().splitlines()]
    assert len(record) == 4 and all(line[1:] == ["False", "True"] for line in record)
    assert str(os.getpid()) not in {line[0] for line in record}


def test_submit_scores_while_others_are_still_sampled(tmp_path):
    path = tmp_path / "record"
    with Grader(build_reward_functions({"graders:record": None})) as grader:
        jobs = grader.submit("x <sep>", {"path": str(path)})
        wait_for(path.exists)  # without anyone asking for the score
        whole_batch = batch(["x", "y"], path=[str(path)] * 2)
        grader.score(**whole_batch, submitted={0: jobs})
    assert len(path.read_text().splitlines()) == 2


def test_submit_does_not_change_the_scores():
    functions = build_reward_functions({"graders:length": {"offset": 2}, "reasoning_format": {"weight": 0.5}})
    answers = [f"{'x' * n}" for n in range(1, 9)]
    with Grader(functions) as grader:
        whole_batch = batch(answers)
        whole = grader.score(**whole_batch)
        jobs = {index: grader.submit(whole_batch["completions"][index], {}) for index in (1, 6, 3)}
        assert grader.score(**whole_batch, submitted=jobs) == whole
    assert whole.by_name["graders:length"] == [float(n + 2) for n in range(1, 9)]


def test_lifted_scorer_is_a_trl_function():
    (function,) = build_reward_functions({"graders:length": None})
    assert function.function(prompts=["?"] * 2, completions=["ab <sep>", "c <sep>"], other=[1, 2]) == [2.0, 1.0]
    messages = [[{"role": "assistant", "content": text}] for text in ("abc <sep>", "d")]  # TRL's other form
    assert function.function(prompts=[[]] * 2, completions=messages) == [3.0, 1.0]
    (function,) = build_reward_functions({"graders:dangerous": {"timeout": 0.5}})
    with pytest.raises(RewardError, match="(?s)graders:dangerous failed: KeyError: 'solution'.*in dangerous"):
        function.function(completions=["raise <sep>"])


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_worker_never_outlives_the_training_process(tmp_path, ended_by):
    code = """
import signal
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scoring import ScoringConfig
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits that it is ignored
grader = Grader(build_reward_functions({"graders:record": {"timeout": 600}}), ScoringConfig(num_workers=2))
for answer in ("sleep", "power"):
    jobs = grader.submit(answer + " <sep>", {"path": "record"})
grader._pool.result(jobs[0])
"""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    record = tmp_path / "record"
    wait_for(lambda: record.exists() and len(record.read_text().splitlines()) == 2)
    workers = [line.split()[0] for line in record.read_text().splitlines()]
    assert all(is_running(pid) for pid in workers)
    process.send_signal(ended_by)
    process.wait(timeout=20)
    wait_for(lambda: not any(is_running(pid) for pid in workers))


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_pool_hanging_grader_does_not_delay_the_others():
    """One hang in a hundred costs its time limit once, not for each completion behind it."""
    answers = ["fine"] * 99 + ["sleep"] + ["fine"] * 100
    functions = build_reward_functions({"graders:dangerous": {"timeout": 1.0}})
    with Grader(functions, ScoringConfig(num_workers=2)) as grader:
        grader.score(**batch(["fine"]))
        started = time.monotonic()
        scores = grader.score(**batch(answers))
    assert time.monotonic() - started < 5.0
    assert json.dumps([error for error in scores.errors if error]).count("no result") == 1
