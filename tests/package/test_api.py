"""The commands as functions: `from rekatrain import train, evaluate, export, sample, load_recipe`."""

import json
import sys
from pathlib import Path

import pytest
import torch

import rekatrain
from rekatrain import InputError, evaluate, export, load_recipe, sample, train
from rekatrain.trainer.run.folder import METRICS_FILE
from rekatrain.trainer.run.records import read_records
from tests.package.processes import finish, write_recipes

# Without a guard: the top level runs again if a child process imports it.
HERE_DOCUMENT = """
from rekatrain import InputError, load_recipe, train
print("top level")
run = train("sft.yaml")
try:
    train("sft.yaml")
except InputError as error:
    print("InputError:", error)
print("run:", train(load_recipe("rloo.yaml"), "rloo.beta=0.1"))
"""
SCRIPT = """
from rekatrain import sample
print("top level")
(group,) = sample("rloo.yaml", num_prompts=1)
print("completions:", len(group.completions))
"""


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, in which the test works."""
    write_recipes(tmp_path, model_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.launched
def test_train_works_in_a_here_document(folder: Path) -> None:
    shown = finish(folder, sys.executable, "-", text=HERE_DOCUMENT)
    assert shown.count("top level") == 1
    assert "InputError: output_dir 'sft' already holds a run" in shown
    assert "run: rloo\n" in shown
    (record,) = read_records(folder / "rloo" / METRICS_FILE)
    assert record["rewards/my_rewards:letters/errors"] == 0


@pytest.mark.slow
@pytest.mark.launched
def test_sample_works_in_a_script_without_a_guard(folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT)
    shown = finish(folder, sys.executable, "script.py")
    assert shown.count("top level") == 1
    assert shown.endswith("completions: 2\n") or "completions: 2\n" in shown


def test_train_returns_the_run_that_export_takes(folder: Path) -> None:
    run = train("sft.yaml", "sft.max_steps=2")
    assert run == Path("sft")
    assert [record["step"] for record in read_records(run / METRICS_FILE)] == [1, 2]
    assert train("sft.yaml", "sft.max_steps=2", resume=True) == run
    out = export(run, "out", dtype="float32")
    assert out == Path("out") and (out / "model.safetensors").exists()


def test_train_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(load_recipe("rloo.yaml"), "seed=7", dry_run=True) == Path("rloo")
    assert "seed: 7\n" in capsys.readouterr().out
    assert not Path("rloo").exists()


def test_evaluate_returns_the_accuracy(folder: Path) -> None:
    (folder / "held_out.jsonl").write_text(json.dumps({"prompt": "50 + 50 =", "answer": 100}) + "\n")
    settings = ["eval_dataset={path: held_out.jsonl, format: prompt_answer}", "evaluate.max_completion_length=4"]
    result = evaluate("rloo.yaml", *settings, out="result.json")
    assert (result.num_graded, json.loads(Path("result.json").read_text())["num_graded"]) == (1, 1)


@pytest.mark.parametrize("function", [train, evaluate, sample])
def test_functions_raise_input_error_for_a_wrong_key(function, folder: Path) -> None:
    with pytest.raises(InputError, match="^unknown key rloo.num_generation: did you mean rloo.num_generations"):
        function("rloo.yaml", "rloo.num_generation=4")
    with pytest.raises(InputError, match="^no recipe at 'absent.yaml'"):
        function("absent.yaml")


def test_sample_rejects_a_recipe_without_rollouts(folder: Path) -> None:
    with pytest.raises(InputError, match="^stage sft samples nothing: give sample an rloo recipe$"):
        sample("sft.yaml")


def test_package_has_a_version_and_no_other_names() -> None:
    assert rekatrain.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rekatrain.nothing  # noqa: B018
    assert torch is not None and set(rekatrain.__all__) >= {"train", "evaluate", "export", "sample", "load_recipe"}
