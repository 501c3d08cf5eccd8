"""The short form of processes.py, and the time limit of exchanges between processes."""

import time
from pathlib import Path

import pytest

from tests.end_to_end.small_runs import records, write_data, write_recipe
from tests.helpers.forks import Launch, start_forked
from tests.stress.processes import run_matrix, short_runs

pytestmark = [pytest.mark.slow, pytest.mark.launched]
# A batch function runs in the training process.
SLOWER = '''
import os
import time

SECONDS = [3, 100]


def slower(completions, **kwargs):
    """Rank 1 waits, in the second step longer than the time limit."""
    if os.environ["RANK"] == "1":
        time.sleep(SECONDS.pop(0))
    return [float(len(text)) for text in completions]
'''


def test_uneven_processes_take_the_steps_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # the reward
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problems = {run.name: problem for run, problem in run_matrix(tmp_path, short_runs())}
    assert problems == dict.fromkeys(problems, "")


def test_ddp_timeout_ends_a_run_with_one_line(tmp_path: Path, model_folder: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "slower_reward.py").write_text(SLOWER)
    sizes = {"max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 12}
    path = write_recipe(
        tmp_path,
        "run",
        model_folder,
        stage="rloo",
        dataset={"path": str(tmp_path / "sums.jsonl"), "format": "prompt_answer"},
        rewards={"slower_reward:slower": {"weight": 1.0}},
        rloo={"ddp_timeout": 12, "beta": 0.0, **sizes},
    )
    began = time.monotonic()
    launch = Launch(num_processes=2, file="ddp.yaml")
    process = start_forked(tmp_path, "-m", "rekatrain", "train", str(path), launch=launch)
    status, output = process.wait(300), process.output()
    assert status != 0 and time.monotonic() - began < 100
    assert [line["step"] for line in records(tmp_path / "run")] == [1]
    ours = [line for line in output.splitlines() if "rekatrain: " in line]
    assert len(ours) == 1 and "time limit of 12 s" in ours[0] and "ddp_timeout" in ours[0]
    assert "Traceback" not in output
