"""Checkpoints of the RLOO stage: their states are JSON, and a pickle in one is not read."""

import contextlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from rekatrain.trainer.cli import main
from rekatrain.trainer.resume.states import RUN_STATE_FILE
from rekatrain.trainer.run.checkpoints import seal
from tests.end_to_end.small_runs import rloo_recipe, write_data


@pytest.fixture
def run(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A recipe, and the checkpoint after its first step."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = str(rloo_recipe(tmp_path, "run", model_folder, rloo={"max_steps": 1, "grad_norm_quantile": 0.5}))
    main(["train", recipe])
    return recipe, tmp_path / "run" / "checkpoints" / "checkpoint-1"


class Attack:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def reseal(checkpoint: Path) -> None:
    """Write a manifest that fits the files, as somebody who changes a checkpoint on purpose would."""
    seal(checkpoint, step=1, stage="rloo", launch={})


def rejection(capsys: pytest.CaptureFixture[str], recipe: str) -> str:
    """Return the line on stderr of a resumed run that stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["train", recipe, "--resume", "rloo.max_steps=2"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_checkpoint_holds_the_norms_as_json(run: tuple[str, Path]) -> None:
    recipe, checkpoint = run
    assert not list(checkpoint.glob("custom_checkpoint*"))
    (norm,) = json.loads((checkpoint / RUN_STATE_FILE).read_text())["gradient_clipper"]["norms"]
    assert norm > 0
    main(["train", recipe, "--resume", "rloo.max_steps=2"])
    state = json.loads((checkpoint.with_name("checkpoint-2") / RUN_STATE_FILE).read_text())
    assert state["gradient_clipper"]["norms"][0] == norm and len(state["gradient_clipper"]["norms"]) == 2


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
@pytest.mark.parametrize("keeps_state", [True, False])
def test_checkpoint_with_a_pickle_is_rejected_and_runs_no_code(
    run: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str, keeps_state: bool
) -> None:
    recipe, checkpoint = run
    attack, control = checkpoint / "custom_checkpoint_0.pkl", tmp_path / "control.pkl"
    for path, made in ((attack, tmp_path / "attacked"), (control, tmp_path / "controlled")):
        if protocol == "torch":
            torch.save(Attack(made), path)
        else:
            path.write_bytes(pickle.dumps(Attack(made)))
    with contextlib.suppress(RuntimeError):  # torch reads one object, and finds that it is no number
        torch.load(control, weights_only=False)
    assert (tmp_path / "controlled").exists()  # the file does run code when it is read
    if not keeps_state:
        (checkpoint / RUN_STATE_FILE).unlink()
        reseal(checkpoint)
    line = rejection(capsys, recipe)
    assert "checkpoint-1' holds custom_checkpoint_0.pkl, a pickle, which can run code and is not read" in line
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("text", [None, "", '{"gradient_clipper": {"norms": [0.5'])
def test_checkpoint_without_readable_states_is_rejected(
    run: tuple[str, Path], capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    recipe, checkpoint = run
    (checkpoint / RUN_STATE_FILE).unlink()
    if text is not None:
        (checkpoint / RUN_STATE_FILE).write_text(text)
    reseal(checkpoint)
    assert "run_state.json' cannot be read" in rejection(capsys, recipe)
