"""The name rekatrain works in any folder, whatever the user's files there are called."""

import json
import sys
from pathlib import Path

import pytest

import rekatrain
from tests.package.processes import BIN, ROOT, finish, run, write_recipes

# A user's file that must not be imported: it leaves a trace, even if its exception is caught.
TRAP = """import pathlib
with pathlib.Path(__file__).with_name("imported.txt").open("a") as trace:
    trace.write(__name__ + "\\n")
raise SystemExit(f"{__file__} was imported")
"""
pytestmark = [pytest.mark.slow, pytest.mark.launched]


@pytest.fixture
def clashing(tmp_path: Path, model_folder: Path) -> Path:
    """A user's folder with files named like our packages, like installed packages, and a clone's folder."""
    for name in ("rewards", "trainer", "datasets", "torch", "evaluate", "random"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    for name in ("recipes", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(TRAP)
    (tmp_path / "rekatrain").mkdir()  # a clone: the folder of the project, which is not the package
    (tmp_path / "rekatrain" / "README.md").write_text("")
    write_recipes(tmp_path, model_folder, rows="data/rows.jsonl")
    return tmp_path


def last_metrics(run_folder: Path) -> dict[str, float]:
    return json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_python_m_trains_beside_clashing_files(clashing: Path) -> None:
    # The scorer runs in worker processes.
    finish(clashing, sys.executable, "-m", "rekatrain", "train", "rloo.yaml")
    assert last_metrics(clashing / "rloo")["rewards/my_rewards:letters/errors"] == 0
    assert not (clashing / "imported.txt").exists()


def test_accelerate_launch_trains_beside_clashing_files(clashing: Path) -> None:
    (clashing / "data" / "__init__.py").write_text(TRAP)
    launch = [BIN / "accelerate", "launch", "--config_file", ROOT / "recipes" / "accelerate" / "single.yaml"]
    finish(clashing, *launch, "-m", "rekatrain", "train", "rloo.yaml")
    assert last_metrics(clashing / "rloo")["step"] == 1
    assert not (clashing / "imported.txt").exists()


def test_console_script_trains_beside_a_user_s_rekatrain_py(tmp_path: Path, model_folder: Path) -> None:
    # `python -m rekatrain` would run the user's file: Python looks there first. The script does not.
    write_recipes(tmp_path, model_folder)
    for name in ("rekatrain", "data"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    finish(tmp_path, BIN / "rekatrain", "train", "rloo.yaml")
    assert last_metrics(tmp_path / "rloo")["rewards/my_rewards:letters/errors"] == 0
    assert not (tmp_path / "imported.txt").exists()


def test_reward_module_named_like_a_package_is_one_line(tmp_path: Path, model_folder: Path) -> None:
    write_recipes(tmp_path, model_folder)
    (tmp_path / "json.py").write_text("def good(completion):\n    return 1.0\n")
    result = run(tmp_path, BIN / "rekatrain", "train", "rloo.yaml", "rewards={json:good: {weight: 1.0}}")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("rekatrain: error: reward json:good: json ")


@pytest.mark.parametrize("command", [[sys.executable, "-m", "rekatrain"], [str(BIN / "rekatrain")]])
def test_bare_command_prints_the_commands(command: list[str], tmp_path: Path) -> None:
    shown = finish(tmp_path, *command)
    for name in ("train", "plan", "sample", "evaluate", "export", "recipes"):
        assert f"\n    {name} " in shown
    assert finish(tmp_path, *command, "--version") == f"rekatrain {rekatrain.__version__}\n"


def test_import_rekatrain_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, rekatrain; rekatrain.load_recipe; rekatrain.train; print('torch' in sys.modules)"
    assert finish(tmp_path, sys.executable, "-c", code) == "False\n"
