"""Scorers that harm their worker in many ways: each costs its own completion at most, and never the run."""

import shutil
import sys
from pathlib import Path

import pytest

from rekatrain.rewards import build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scoring import ScoringConfig
from tests.rewards.workers import hostile

ERRORS = {
    "SIGKILL": "killed by SIGKILL",
    "SIGTERM": "killed by SIGTERM",
    "os.kill": "the reward called os.kill(",
    "os.kill all": "the reward called os.kill(-1, 9)",
    "exit 0": "the worker died (exit code 0)",
    "abort": "killed by SIGABRT",
    "null pointer": "killed by SIGSEGV",
    "Mine": "Mine: x",
    "GeneratorExit": "GeneratorExit",
    "KeyboardInterrupt": "KeyboardInterrupt",
    "NoText": "NoText: its text cannot be read",
    "NoRepr": "returned <NoRepr>",
    "NoNumber": "Mine: of the number",
    "trace": "Mine: of the trace",
    "builtins": "",
    "close all": "the worker died",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    shutil.copy(Path(hostile.__file__), tmp_path / "hostile_deeds.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def score(grader, answers):
    size = len(answers)
    completions = [f"{answer} <sep>" for answer in answers]
    return grader.score(prompts=["?"] * size, completions=completions, completion_ids=[[1]] * size, columns={})


@pytest.mark.parametrize("num_workers", [1, 2])
def test_hostile_scorer_costs_its_own_completion_alone(num_workers):
    assert set(ERRORS) == {*hostile.DEEDS, "NoRepr", "NoNumber"}
    rewards = build_reward_functions({"hostile_deeds:deed": {"timeout": 20}})
    with Grader(rewards, ScoringConfig(num_workers=num_workers, max_error_share=1.0)) as grader:
        answers = [word for each in (*ERRORS, *hostile.HARMLESS) for word in (each, "fine", "fine")]
        for _ in range(2):
            scores = score(grader, answers)
            found = list(zip(answers, scores.by_name["hostile_deeds:deed"], scores.errors, strict=True))
            for answer, value, errors in found:
                expected = None if answer in ERRORS else 1.0 if answer == "fine" else 0.5
                assert value == expected, (answer, errors)
                assert ERRORS.get(answer, "") in errors.get("hostile_deeds:deed", ""), answer


def test_setup_that_ends_its_worker_is_one_clear_line():
    Path("dies_in_setup.py").write_text(
        "import os\nclass Dies:\n    def setup(self):\n        os._exit(3)\n"
        "    def __call__(self, completion):\n        return 1.0\n"
    )
    with (
        Grader(build_reward_functions({"dies_in_setup:Dies": None}), ScoringConfig(num_workers=1)) as grader,
        pytest.raises(RewardError, match=r"the worker died before it scored, 3 times \(exit code 3\)"),
    ):
        score(grader, ["x", "y"])
