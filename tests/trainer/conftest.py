"""Fixtures of the command line: a folder to work in, good recipes, and commands that must fail."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rekatrain.trainer.cli import main
from tests.trainer.small_recipes import DATASET, ROWS, STAGES, Rekatrain, write_rows


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, which is also home; the command line's entry on sys.path goes with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading any weights fails the test."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("weights would be loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.fixture
def recipe_of(model_folder: Path, workspace: Path) -> Callable[..., str]:
    """Writes a good recipe of a stage, with some sections replaced, and three rows; gives its path."""

    def write(stage: str, **sections: object) -> str:
        if not (workspace / "rows.jsonl").exists():
            write_rows(workspace / "rows.jsonl", *ROWS)
        recipe = {
            "stage": stage,
            "output_dir": "run",
            "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
            "dataset": DATASET,
            **STAGES[stage],
            **sections,
        }
        (workspace / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        return "recipe.yaml"

    return write


@pytest.fixture
def error_of(no_weights: None, workspace: Path, capsys: pytest.CaptureFixture[str]) -> Rekatrain:
    """Runs a command that must fail; gives what follows `rekatrain: error: ` on its one line."""

    def run(*arguments: str) -> str:
        def everything() -> dict[Path, bytes | None]:
            return {path: path.read_bytes() if path.is_file() else None for path in sorted(workspace.rglob("*"))}

        before = everything()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        message = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message.endswith("\n") and message.count("\n") == 1, message
        assert everything() == before
        prefix = "rekatrain: error: "
        assert message.startswith(prefix)
        return message.removeprefix(prefix).removesuffix("\n")

    return run
