"""At least 500 bad inputs: each gets one line and status 2 before a weight is loaded, and changes no file."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input.runner import read_group, run_group
from tests.bad_input.workspace import GROUPS, make_models, make_workspace, snapshot


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models that all cases share; read only."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def test_corpus_has_500_cases_of_every_kind() -> None:
    cases = [case for path in GROUPS for case in read_group(path)]
    assert len(cases) >= 500
    assert len({repr(case) for case in cases}) == len(cases)
    assert sum(case.expect == "accepted" for case in cases) >= 50


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: path.stem)
def test_bad_input_gets_one_clear_line(path: Path, tmp_path: Path, models: Path) -> None:
    faults = [
        f"{outcome.kind}: {case}: {outcome.detail}"
        for case, outcome in run_group(path, tmp_path / "work", models)
        if outcome.kind not in ("rejected", "accepted")
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.launched
def test_bad_input_gets_one_line_in_a_real_process(tmp_path: Path, models: Path) -> None:
    make_workspace(tmp_path, models, has_run=False)
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    (tmp_path / "bomb.yaml").write_text(bomb)
    before = snapshot(tmp_path)
    for arguments, words in (
        (["train", "bomb.yaml"], "holds more than 20,000 values"),
        (["train", "sft.yaml", "sft.learning_rate=.nan"], "sft.learning_rate is nan"),
        (["train", "sft.yaml", "model.pretrained_model_name_or_path=classifier"], "LlamaForSequenceClassification"),
    ):
        command = [sys.executable, "-m", "rekatrain", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before
