"""The environment of workers: scorers that print all that they can see of it find no secret."""

import json
import os
import sys
from pathlib import Path

import pytest

from rekatrain.rewards import InputError, build_reward_functions
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.rewards.workers.context import SERVER
from rekatrain.rewards.workers.environment import allowed_names

PRINTER = """
import json, os


def printer(completion, *, path):
    initial = open("/proc/self/environ", "rb").read().decode(errors="replace")
    server = open(f"/proc/{os.getppid()}/environ", "rb").read().decode(errors="replace")
    arguments = open(f"/proc/{os.getppid()}/cmdline", "rb").read().decode(errors="replace")
    texts = {"environ": dict(os.environ), "initial": initial, "server": server, "arguments": arguments}
    with open(path, "w") as file:
        json.dump(texts, file)
    return 0.0
"""
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "JUDGE_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_PROFILE",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "DB_PASSWORD",
    "MY_SECRET",
    "GITHUB_TOKEN",
    "PYTHON_KEYRING_PASSWORD",
    "OMP_TOKEN",
    "SLURM_JWT",
    "UNKNOWN",
)


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a scorer that writes its environment to a file; variables with secrets are set."""
    (tmp_path / "printers.py").write_text(PRINTER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in SECRETS:
        monkeypatch.setenv(name, f"hunter2-{name}")
    SERVER._stop()  # type: ignore[attr-defined]  # one that an earlier test started has an earlier environment
    yield tmp_path
    SERVER._stop()  # type: ignore[attr-defined]


def printed(folder: Path, **scoring: list[str]) -> dict:
    """Return the record of one completion."""
    path = folder / "record.json"
    with Grader(build_reward_functions({"printers:printer": None}), ScoringConfig(num_workers=1, **scoring)) as grader:
        batch = {"prompts": ["?"], "completions": ["x <sep>"], "completion_ids": [[1]]}
        scores = grader.score(**batch, columns={"path": [str(path)]})
    assert scores.errors == [{}]
    return json.loads(path.read_text())


def test_worker_sees_no_secret(secrets: Path) -> None:
    before = dict(os.environ)
    record = printed(secrets)
    assert "hunter2" not in json.dumps(record)
    assert not set(record["environ"]) & set(SECRETS)
    assert record["environ"]["PATH"] == os.environ["PATH"]
    assert record["environ"].get("PYTHONPATH") == os.environ.get("PYTHONPATH")
    assert dict(os.environ) == before


def test_scoring_environment_passes_variables_by_name(secrets: Path) -> None:
    record = printed(secrets, environment=["OPENAI_API_KEY", "UNKNOWN"])
    passed = {name: value for name, value in record.pop("environ").items() if "hunter2" in value}
    assert passed == {"OPENAI_API_KEY": "hunter2-OPENAI_API_KEY", "UNKNOWN": "hunter2-UNKNOWN"}
    assert "hunter2" not in json.dumps(record)  # neither in the server, which all pools share


def test_scoring_environment_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABSENT", raising=False)
    with pytest.raises(InputError, match="scoring.environment names ABSENT, which is not set: export it, or remove it"):
        Grader(build_reward_functions({"reasoning_format": None}), ScoringConfig(environment=["ABSENT"]))


def test_allowed_names_are_those_that_programs_need() -> None:
    needed = ["PATH", "HOME", "LANG", "LC_ALL", "OMP_NUM_THREADS", "PYTHONPATH", "LD_LIBRARY_PATH", "HF_HUB_OFFLINE"]
    assert allowed_names([*needed, *SECRETS]) == needed
