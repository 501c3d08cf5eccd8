"""Ranks of a launch: they agree before weights are loaded, and whatever ends one is printed once, with its rank."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.end_to_end.small_runs import LORA, PROJECT, records, rloo_recipe, start, weights, write_data, write_recipe
from tests.helpers.forks import Launch, start_forked

pytestmark = [pytest.mark.slow, pytest.mark.launched]

BY_RANK = Path(__file__).with_name("by_rank.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def launch(folder: Path, *command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """Start two processes of data parallelism."""
    file = str(PROJECT / "recipes" / "accelerate" / "ddp.yaml")
    launcher = ["-m", "rekatrain.trainer.accelerate_launch", "--num_processes", "2", "--config_file", file]
    return start(folder, *launcher, *options, *command)


def failure(folder: Path, *cases: dict[str, Any]) -> tuple[int, list[str]]:
    """Run two ranks that end with a failure -> the exit status, and what follows `rekatrain: ` in the lines."""
    process = start_forked(folder, str(BY_RANK), json.dumps(cases), launch=Launch(num_processes=2, file="ddp.yaml"))
    status, output = process.wait(200), process.output()
    lines = [line.removeprefix("rekatrain: ") for line in output.splitlines() if line.startswith("rekatrain: ")]
    assert output.count("Traceback") == any(case.get("breaks", False) for case in cases), output[-4000:]
    return status, lines


@pytest.fixture
def arguments(folder: Path, model_folder: Path) -> list[str]:
    """The command line of a run of SFT, whose rows are found from the current folder."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 2}
    dataset = {"path": "sft.jsonl", "format": "prompt_answer"}
    return ["train", str(write_recipe(folder, "run", model_folder, stage="sft", sft=settings, dataset=dataset))]


SECOND = f"rank 1 on {socket.gethostname()}: error: "


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"arguments": ["sft.max_steps=3"]}, "the recipe's sft.max_steps is 3 here and 2 there"),
        ({"version": "0.1.0"}, "rekatrain is 0.1.0 here and "),
        ({"folder": "copy"}, "rows is 11 of hash "),
    ],
    ids=["recipe", "version", "rows"],
)
def test_ranks_agree_before_weights_are_loaded(
    folder: Path, arguments: list[str], other: dict[str, Any], difference: str
) -> None:
    (folder / "copy").mkdir()
    (folder / "copy" / "sft.jsonl").write_text("".join((folder / "sft.jsonl").read_text().splitlines(True)[1:]))
    second = {**other, "arguments": [*arguments, *other.get("arguments", [])]}
    status, lines = failure(folder, {"arguments": arguments}, second)
    assert status == 2 and len(lines) == 1
    expected = f"{SECOND}all ranks must start from the same, and rank 0 on {socket.gethostname()} has another start: "
    assert lines[0].startswith(f"{expected}{difference}")
    assert not (folder / "run").exists()


def test_failure_is_printed_once_with_its_rank(folder: Path, arguments: list[str]) -> None:
    missing = {"arguments": ["train", "nowhere.yaml"]}
    assert failure(folder, {"arguments": arguments}, missing) == (2, [f"{SECOND}no recipe at 'nowhere.yaml'"])
    # One that all ranks have names none.
    assert failure(folder, missing, missing) == (2, ["error: no recipe at 'nowhere.yaml'"])


def test_signal_that_follows_a_failure_is_no_interruption(folder: Path, arguments: list[str]) -> None:
    late, other = {"arguments": arguments, "hears_late": True}, {"arguments": [*arguments, "sft.max_steps=3"]}
    status, lines = failure(folder, late, other)
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"{SECOND}all ranks must start from the same")


def test_signal_before_a_run_listens_ends_all_ranks(folder: Path, arguments: list[str]) -> None:
    early = {"arguments": arguments, "is_early": True}
    line = "interrupted by SIGTERM before its first step: nothing is lost. Start it again with --resume"
    assert failure(folder, early, early) == (75, [line])


def test_traceback_is_printed_once_with_its_rank(folder: Path, arguments: list[str]) -> None:
    status, lines = failure(folder, {"arguments": arguments}, {"arguments": arguments, "breaks": True})
    assert (status, lines) == (1, [f"{SECOND}ZeroDivisionError: division by zero"])


def test_torchrun_restarts_a_killed_rank_and_the_run_resumes(folder: Path, model_folder: Path) -> None:
    options = {"max_steps": 8, "save_steps": 2}
    for name in ("whole", "killed"):
        rloo_recipe(folder, name, model_folder, lora=LORA, rloo=options)
    whole = launch(folder, "-m", "rekatrain", "train", "whole.yaml")
    assert whole.wait(timeout=200) == 0

    checkpoint = folder / "killed" / "checkpoints" / "checkpoint-4"
    (folder / "hold").symlink_to(checkpoint)
    command = ["-m", "rekatrain", "train", "killed.yaml", "--resume"]
    process = launch(folder, *command, options=("--max_restarts", "1"))
    deadline = time.monotonic() + 200
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.02)
    _, last = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    last.send_signal(signal.SIGKILL)
    (folder / "hold").unlink()
    stderr = process.communicate(timeout=200)[1].decode()
    assert process.returncode == 0, stderr[-4000:]
    failures = [line for line in stderr.splitlines() if line.startswith("rekatrain: ")]
    assert len(failures) == 1 and f"another process died: rank 1 on {socket.gethostname()}" in failures[0]
    expected, actual = (weights(folder / name, 8) for name in ("whole", "killed"))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert records(folder / "whole", "rollouts.jsonl") == records(folder / "killed", "rollouts.jsonl")
