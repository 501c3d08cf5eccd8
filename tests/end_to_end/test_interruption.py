"""Interrupted runs: a step is finished or abandoned, a checkpoint saved, and the resumed run has the same bits."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rekatrain.data.errors import InputError
from rekatrain.trainer import sft
from rekatrain.trainer.cli import main
from rekatrain.trainer.recipe.durations import seconds_of
from rekatrain.trainer.rloo import step as rloo_step
from rekatrain.trainer.rloo import train as rloo_stage
from rekatrain.trainer.rloo.sampler.in_process import Sampler
from rekatrain.trainer.run import folder as run_folder
from rekatrain.trainer.trl_stages import guards as trl_guards
from tests.end_to_end.small_runs import LORA, OPTIONS, rloo_recipe, start, write_data, write_recipe
from tests.end_to_end.test_checkpoints import assert_equal_runs

# Its noise comes from a random state of the trainer, which abandoned calls must not move. If the file `interrupt` holds
# 1, a call interrupts the run and goes on for a minute.
REWARD = '''
import os, random, signal, time
from pathlib import Path

def letters(completions, **kwargs):
    """Return the fraction of letters in each completion, and noise."""
    file = Path("interrupt")
    if file.exists():
        left = int(file.read_text()) - 1
        file.write_text(str(left))
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    return [sum(c.isalpha() for c in text) / 20 + random.random() / 10 for text in completions]
'''

STUBBORN = """
import time
from pathlib import Path

def letters(completions, **kwargs):
    Path("waits").touch()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


@pytest.fixture(autouse=True)
def interactive() -> Iterator[None]:
    """Have Ctrl-C arrive, as in a terminal: a shell's background job ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def recipe(stage: str, folder: Path, name: str, model: Path, **options: Any) -> str:
    """Write a recipe of three steps, with a checkpoint at the end only."""
    settings: dict[str, Any] = {"max_steps": 3, "save_steps": 100, **options}
    if stage == "rloo":
        return str(rloo_recipe(folder, name, model, lora=LORA, rloo={**OPTIONS, **settings}))
    dataset = {"path": str(folder / f"{stage}.jsonl"), "format": "prompt_answer" if stage == "sft" else "preference"}
    settings |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
    return str(write_recipe(folder, name, model, stage=stage, lora=LORA, dataset=dataset, **{stage: settings}))


def interrupt_at(owner: object, function: str, call: int, number: int, patch: pytest.MonkeyPatch) -> None:
    """Send this process a signal at the given call of a function of the program, which then goes on."""
    original: Callable[..., Any] = getattr(owner, function)
    calls = iter(range(1, 100_000))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    patch.setattr(owner, function, interrupted)


def last_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is interrupted, and return its line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(command)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 75, lines
    assert [line for line in lines if line.startswith("rekatrain: ")] == lines[-1:]
    return lines[-1].removeprefix("rekatrain: interrupted by ")


def checkpoints(run: Path) -> list[str]:
    """Return the names of a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


MOMENTS: dict[str, tuple[str, object, str, int, int]] = {
    "rloo-samples": ("rloo", Sampler, "_append", 250, signal.SIGTERM),
    "rloo-trains": ("rloo", rloo_step, "policy_loss", 3, signal.SIGUSR1),
    "sft-trains": ("sft", trl_guards.GuardedTrainer, "training_step", 2, signal.SIGINT),
    "reward-trains": ("reward", trl_guards.GuardedTrainer, "training_step", 2, signal.SIGTERM),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_run_resumes_to_the_same_bits(
    folder: Path, model_folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, owner, function, call, number = MOMENTS[moment]
    main(["train", recipe(stage, folder, "whole", model_folder)])
    path = recipe(stage, folder, "cut", model_folder)
    with monkeypatch.context() as patch:
        interrupt_at(owner, function, call, number, patch)
        line = last_line(["train", path], capsys)
    (name,) = checkpoints(folder / "cut")
    assert name in ("checkpoint-1", "checkpoint-2")
    expected = f"{signal.Signals(number).name} after step {name[-1]}: {name} is saved. Go on"
    assert line.startswith(expected)
    main(["train", path, "--resume"])
    assert_equal_runs(stage, folder / "whole", folder / "cut")


@pytest.mark.slow
def test_wait_for_rewards_is_abandoned_without_a_trace(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", recipe("rloo", folder, "whole", model_folder)])
    path = recipe("rloo", folder, "cut", model_folder)
    (folder / "interrupt").write_text("1")
    started = time.monotonic()
    assert "in its first step, before there was anything to save" in last_line(["train", path], capsys)
    assert time.monotonic() - started < 50 and checkpoints(folder / "cut") == []
    (folder / "interrupt").write_text("3")
    assert "SIGTERM after step 2: checkpoint-2 is saved" in last_line(["train", path, "--resume"], capsys)
    assert len(checkpoints(folder / "cut")) == 1
    (folder / "interrupt").unlink()
    main(["train", path, "--resume"])
    assert_equal_runs("rloo", folder / "whole", folder / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_interruption_while_saving_keeps_that_checkpoint(
    folder: Path, model_folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(stage, folder, "run", model_folder, save_steps=1)
    with monkeypatch.context() as patch:
        interrupt_at(run_folder, "publish", 1, signal.SIGTERM, patch)
        line = last_line(["train", path], capsys)
    last = 1 if stage == "rloo" else 2  # the next step samples first, and is abandoned; one of SFT is finished
    assert line.startswith(f"SIGTERM after step {last}: ")
    assert checkpoints(folder / "run") == [f"checkpoint-{number}" for number in range(1, last + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_interruption_while_loading_leaves_nothing(
    folder: Path, model_folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(stage, folder, "run", model_folder, max_steps=1)
    with monkeypatch.context() as patch:
        interrupt_at(sft if stage == "sft" else rloo_stage, "load_policy", 1, signal.SIGTERM, patch)
        assert last_line(["train", path], capsys).startswith("SIGTERM before its first step: nothing is lost")
    assert not (folder / "run").exists()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert handlers == [signal.SIG_DFL, signal.SIG_DFL]
    main(["train", path])  # also a run after an interrupted one in the same process


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_time_limit_saves_before_it_is_exceeded(
    folder: Path, model_folder: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(stage, folder, "run", model_folder, max_steps=100_000, save_steps=100_000)
    limit = time.time() - psutil.Process().create_time() + 15.0
    line = last_line(["train", path, f"time_limit={limit}"], capsys)
    assert time.time() - psutil.Process().create_time() < limit + 2.0  # what comes after the checkpoint
    (name,) = checkpoints(folder / "run")
    assert line.startswith(f"time_limit after step {name.removeprefix('checkpoint-')}: {name} is saved")
    assert "time_limit before its first step" in last_line(["train", path, "--resume", "time_limit=1"], capsys)


@pytest.mark.slow
@pytest.mark.launched
def test_second_signal_ends_the_run_at_once(folder: Path, model_folder: Path) -> None:
    (folder / "my_rewards.py").write_text(STUBBORN)
    process = start(folder, "-m", "rekatrain", "train", recipe("rloo", folder, "run", model_folder))
    deadline = time.monotonic() + 300
    while not (folder / "waits").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.5)
    assert workers and process.poll() is None
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=10)[1].decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr.splitlines()[-1].startswith("rekatrain: a second signal (SIGTERM) ended the run. Go on")
    assert "Traceback" not in stderr and not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 90),
        (0.5, 0.5),
        ("45s", 45),
        ("3h50m", 13_800),
        ("03:50:00", 13_800),
        ("1-00:00:30", 86_430),
        ("2d", 172_800),
    ],
)
def test_time_limit_reads_durations(text: float | str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", [0, -1, float("nan"), float("inf"), 1e12, "", "0s", "soon", "3:50", "1:99:00", "5m3h", "90"]
)
def test_time_limit_rejects_other_text(text: float | str) -> None:
    with pytest.raises(InputError, match="time_limit"):
        seconds_of(text)
