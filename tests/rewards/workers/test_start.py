"""The start of workers, with real processes: from any script or folder, without importing the main module again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rekatrain.data.errors import InputError
from rekatrain.rewards import build_reward_functions
from rekatrain.rewards.grader import Grader

PACKAGES = Path(__file__).parents[3] / ".package"

# As people write it: no function around it and no `if __name__ == "__main__":`.
SCRIPT = """
from rekatrain.rewards import build_reward_functions
from rekatrain.rewards.grader import Grader

print("started")
with Grader(build_reward_functions({"rewards:brevity": {"limit": 3}})) as grader:
    batch = {"prompts": ["?"] * 2, "completions": ["abc <sep>", "abcd <sep>"], "completion_ids": [[1]] * 2}
    print(grader.score(**batch, columns={}).total)
"""
BREVITY = """
def brevity(completion, *, limit: int = 50):
    return float(len(completion.answer) <= limit)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a reward module and with files that have the names of our packages; none of them may be run."""
    (tmp_path / "rewards.py").write_text(BREVITY)
    for name in ("data", "trainer", "rekatrain_data"):
        (tmp_path / f"{name}.py").write_text(f"raise AssertionError('{name}.py is imported')\n")
    return tmp_path


def run(folder: Path, *arguments: str, text: str | None = None) -> str:
    """Run Python in the folder and return its output; it must succeed and print nothing on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "workers" not in done.stderr, done.stderr
    return done.stdout


def test_workers_start_from_a_here_document(folder: Path) -> None:
    assert run(folder, "-", text=SCRIPT) == "started\n[1.0, 0.0]\n"


def test_workers_start_from_a_notebook(folder: Path) -> None:
    """A notebook's main module has neither a file nor a spec, as that of `python -c`."""
    assert run(folder, "-c", SCRIPT) == "started\n[1.0, 0.0]\n"


def test_workers_start_from_an_unguarded_script(folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT)
    assert run(folder, "script.py") == "started\n[1.0, 0.0]\n"


def test_workers_start_beside_files_named_like_python_modules(folder: Path) -> None:
    for name in ("queue", "random", "socket"):
        (folder / f"{name}.py").write_text(f"raise AssertionError('{name}.py is imported')\n")
    assert run(folder, "-P", "-c", SCRIPT) == "started\n[1.0, 0.0]\n"


@pytest.mark.slow
def test_workers_start_from_python_m_rekatrain(folder: Path, model_folder: Path) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    recipe = {
        "stage": "rloo",
        "output_dir": "run",
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": {"path": "rows.jsonl"},
        "rloo": {"max_steps": 1, "num_generations": 2, "max_completion_length": 4},
        "rewards": {"rewards:brevity": {"limit": 3}, "reasoning_format": None},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    shown = run(folder, "-m", "rekatrain", "train", "recipe.yaml", "--dry-run")
    assert "rewards:brevity 0.0, reasoning_format 0.0" in shown


def test_workers_leave_the_users_own_multiprocessing_alone(folder: Path) -> None:
    script = SCRIPT + (
        "from multiprocessing.forkserver import _forkserver\n"
        "assert _forkserver._preload_modules == ['__main__'] and _forkserver._forkserver_pid is None\n"
    )
    assert run(folder, "-", text=script) == "started\n[1.0, 0.0]\n"


def test_workers_have_the_environment_of_the_training_process(folder: Path) -> None:
    (folder / "rewards.py").write_text(
        "import os\n"
        f"EXPECTED = {[str(PACKAGES), None]!r}\n"
        "def brevity(completion, *, limit: int = 50):\n"
        "    return float([os.environ.get(name) for name in ('PYTHONPATH', 'PYTHONSAFEPATH')] == EXPECTED)\n"
    )
    assert run(folder, "-", text=SCRIPT) == "started\n[1.0, 1.0]\n"


# Modules that cannot be imported


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_find_rejects_a_reward_of_the_main_module() -> None:
    with pytest.raises(InputError, match="reward __main__:brevity: workers cannot import the script or notebook that"):
        build_reward_functions({"__main__:brevity": None})


@pytest.mark.parametrize("name", ["json", "torch", "json.brevity"])
def test_find_names_the_installed_module_that_comes_first(here: Path, name: str) -> None:
    top = name.partition(".")[0]
    (here / f"{top}.py").write_text(BREVITY)
    with pytest.raises(InputError) as caught:
        build_reward_functions({f"{name}:brevity": None})
    where = sys.modules[top].__file__
    assert f"Python found the installed module {top} ({where}) before {top}.py in the current directory" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_find_takes_a_module_in_a_package_of_the_folder(here: Path) -> None:
    (here / "my_package").mkdir()
    (here / "my_package" / "brief.py").write_text(BREVITY)
    with Grader(build_reward_functions({"my_package.brief:brevity": {"limit": 3}})) as grader:
        batch = {"prompts": ["?"], "completions": ["abc <sep>"], "completion_ids": [[1]]}
        assert grader.score(**batch, columns={}).total == [1.0]
