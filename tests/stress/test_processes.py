"""The short form of processes.py."""

from pathlib import Path

import pytest

from tests.stress.processes import run_matrix, short_runs


@pytest.mark.slow
@pytest.mark.launched
def test_uneven_processes_take_the_steps_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # the reward
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problems = {run.name: problem for run, problem in run_matrix(tmp_path, short_runs())}
    assert problems == dict.fromkeys(problems, "")
