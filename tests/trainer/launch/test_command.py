"""`rekatrain launch` up to the start of its processes: paths, ports, variables, and folders in use."""

import shlex
import shutil
import socket
from itertools import pairwise
from pathlib import Path
from urllib.request import proxy_bypass

import pytest
from filelock import FileLock

from rekatrain import RECIPES
from rekatrain.trainer.cli import main
from rekatrain.trainer.launch.commands import trainer_commands
from rekatrain.trainer.launch.hosts import Host
from rekatrain.trainer.launch.nodes import Placement
from rekatrain.trainer.launch.section import LaunchConfig
from rekatrain.trainer.recipe.load import dump_recipe, load_recipe
from rekatrain.trainer.rloo.sampler.vllm.serve import VLLM_PYTHON
from rekatrain.trainer.run import folder as run_folder
from tests.end_to_end.small_runs import rloo_recipe, write_data


@pytest.fixture
def home(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a user, with a Python that has vLLM, rows and a launch file; `run.yaml` is in another folder."""
    work, home = tmp_path / "work", tmp_path / "it's my home"
    for folder in (work, home / "my env"):
        folder.mkdir(parents=True)
        write_data(folder)
    python = home / "my env" / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    (home / "my env" / "sums.jsonl").rename(home / "my rows.jsonl")
    shutil.copy(RECIPES / "accelerate" / "single.yaml", home / "my file.yaml")
    rloo_recipe(work, "run", model_folder)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    return home


def started(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """Return the words of each process that a launch would start, without its variables."""
    with pytest.raises(SystemExit) as caught:
        main(["launch", "run.yaml", "--dry-run", *arguments])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    return {
        name.removeprefix("# "): [word for word in shlex.split(command) if not word[0].isupper()]
        for name, command in pairwise(lines)
        if name.startswith("# ")
    }


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line of a launch that starts nothing."""
    with pytest.raises(SystemExit) as caught:
        main(["launch", "run.yaml", *arguments])
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize("form", ["~", "relative", "absolute"])
def test_paths_are_found_from_home_and_here(home: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    place = {"~": Path("~"), "relative": Path("..", home.name), "absolute": home}[form]
    rows = f"dataset.path={place / 'my rows.jsonl'}"
    paths = [f"launch.vllm_python={place / 'my env' / 'python'}", f"launch.config_file={place / 'my file.yaml'}", rows]
    processes = started(capsys, *paths, "output_dir=my runs/one")
    assert [*processes] == ["server", "trainer"]
    options = dict(pairwise(processes["trainer"]))
    for found, name in ((processes["server"][0], "my env/python"), (options["--config_file"], "my file.yaml")):
        assert Path(found).resolve() == home / name
    assert {rows, "output_dir=my runs/one"} <= {*processes["trainer"]}


def test_variable_with_vllms_python_may_begin_at_home(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VLLM_PYTHON, "~/my env/python")
    assert started(capsys)["server"][0] == str(home / "my env" / "python")


def test_variables_of_another_launcher_make_no_rank_of_it(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)  # of a job file for torchrun
    assert [*started(capsys)] == ["trainer"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "launch.gpus is 9999, but this machine has" in error(capsys, "launch.gpus=9999")


def test_trainers_reach_their_servers_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [Host(address="127.0.0.1"), Host(address="node2")]
    placement = Placement(kind="split")

    def proxied() -> set[str]:
        """Return which of some addresses a trainer requests through the proxy."""
        command = trainer_commands(["run.yaml"], LaunchConfig(), placement, hosts)[0]
        with monkeypatch.context() as patch:
            for name, value in command.environment.items():
                patch.setenv(name, value)
            return {name for name in ("127.0.0.1", "node2", "judge.example") if not proxy_bypass(name)}

    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    assert proxied() == {"judge.example"}
    monkeypatch.setenv("NO_PROXY", "judge.example")
    assert proxied() == set()
    monkeypatch.delenv("HTTP_PROXY")
    assert "no_proxy" not in trainer_commands(["run.yaml"], LaunchConfig(), placement, hosts)[0].environment


def test_port_in_use_is_one_error(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        line = error(capsys, "launch.gpus=0", "launch.vllm_python=~/my env/python", f"launch.port={port}")
    assert f"port {port} for server 0 cannot be used" in line and "launch.port" in line


def test_folder_of_a_running_run_is_one_error(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.1)
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(dump_recipe(load_recipe("run.yaml")))
    python = "launch.vllm_python=/nowhere/python"  # found after the lock
    with FileLock("run/run.lock", timeout=0):
        assert "run' is in use: another run has locked" in error(capsys, "--resume", "launch.gpus=0", python)
    assert "/nowhere/python' cannot be started" in error(capsys, "--resume", "launch.gpus=0", python)
