"""Training and exports in a folder whose files have the names of our packages, by real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.helpers.exports import write_sft_recipe

# A file of the user's that leaves a trace when it is imported, even if its exception is caught.
TRAP = """from pathlib import Path
with Path(__file__).with_name("imported.txt").open("a") as trace:
    trace.write(__name__ + "\\n")
raise RuntimeError(f"{__file__} was imported")
"""
PACKAGES = ("data", "rewards", "trainer")
SCRIPT = Path(sys.executable).with_name("rekatrain")


def write_traps(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(TRAP)


def run(folder: Path, *command: str) -> str:
    """Run a command in `folder`, with the installed package; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def rekatrain(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "rekatrain", *arguments)


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user: traps named as our packages, data/ and a clone, and an SFT run of one step."""
    folder = tmp_path_factory.mktemp("user")
    write_traps(folder, *PACKAGES)
    (folder / "rekatrain").mkdir()  # as `git clone` leaves it, without an __init__.py
    write_traps(folder / "rekatrain", "rekatrain", "data", "trainer")
    recipe = json.loads(write_sft_recipe(folder, tokenizer).read_text())
    (folder / "data").mkdir()
    (folder / "sums.jsonl").rename(folder / "data" / "train.jsonl")
    recipe["dataset"]["path"] = "data/train.jsonl"
    recipe["sft"]["max_steps"] = 1
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"output_dir": "run"}))
    rekatrain(folder, "train", "recipe.yaml")
    return folder


def assert_untouched(folder: Path) -> None:
    """Assert that no trap was imported and that no unfinished export is left."""
    assert not list(folder.rglob("imported.txt"))
    assert not list(folder.rglob("*partial*"))


@pytest.mark.slow
@pytest.mark.launched
@pytest.mark.parametrize("form", ["merged", "adapter", "gguf"])
def test_export_works_beside_files_named_as_our_packages(folder: Path, form: str) -> None:
    shown = rekatrain(folder, "export", "run", f"out-{form}", "--as", form)
    assert "verified" in shown
    assert_untouched(folder)
    if form == "gguf":
        assert (folder / "out-gguf" / "model-f32.gguf").stat().st_size > 0
    else:
        AutoModelForCausalLM.from_pretrained(folder / f"out-{form}")


@pytest.mark.slow
@pytest.mark.launched
def test_export_of_a_reward_model_works_beside_such_files(folder: Path) -> None:
    rows = [{"prompt": f"{n} + {n} =", "chosen": f"It is {2 * n}.", "rejected": f"{2 * n}"} for n in range(1, 5)]
    (folder / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "stage": "reward",
        "output_dir": "reward-run",
        "model": {"pretrained_model_name_or_path": "model", "dtype": "float32"},
        "dataset": {"path": "data/pairs.jsonl", "format": "preference"},
        "reward": {"max_steps": 1, "per_device_train_batch_size": 4},
    }
    (folder / "reward.yaml").write_text(json.dumps(recipe))
    rekatrain(folder, "train", "reward.yaml")
    assert "verified" in rekatrain(folder, "export", "reward-run", "reward")
    assert_untouched(folder)
    AutoModelForSequenceClassification.from_pretrained(folder / "reward")


@pytest.mark.slow
@pytest.mark.launched
def test_export_script_imports_nothing_from_the_working_folder(folder: Path, tmp_path: Path) -> None:
    # The script `rekatrain` does not search the working folder, so its verifying child must not do so either.
    write_traps(tmp_path, *PACKAGES, "random", "safetensors", "transformers")
    assert "verified" in run(tmp_path, str(SCRIPT), "export", str(folder / "run"), "out")
    assert_untouched(tmp_path)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.launched
def test_help_works_beside_a_folder_named_rekatrain(tmp_path: Path) -> None:
    (tmp_path / "rekatrain").mkdir()
    write_traps(tmp_path / "rekatrain", "rekatrain", "data", "trainer")
    for command in ([sys.executable, "-m", "rekatrain"], [str(SCRIPT)]):
        assert "export" in run(tmp_path, *command, "--help")
    where = run(tmp_path, sys.executable, "-c", "import rekatrain; print(rekatrain.__file__)")
    assert not Path(where.strip()).is_relative_to(tmp_path)
    assert_untouched(tmp_path)
