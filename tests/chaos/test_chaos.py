"""Short forms of the chaos scripts: a few kills, damages, full disks, and a soak of some steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.launched]

FOLDER = Path(__file__).parent


def run(name: str, tmp_path: Path, *arguments: str) -> str:
    """Run a script that must end well, and return its output."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    # The scripts keep their folder if something is wrong. Libraries of killed processes leave folders, too.
    assert not list(tmp_path.glob("rekatrain-chaos-*"))
    return result.stdout


def test_first_resume_after_a_kill_ends_with_the_same_bits(tmp_path: Path) -> None:
    last = run("kills.py", tmp_path, "--kills", "4", "--seed", "3").splitlines()[-2]
    assert last.split() == ["all", "4", "0", "4", "4"]


def test_damage_is_repaired_or_reported(tmp_path: Path) -> None:
    assert ", 0 other than expected" in run("damage.py", tmp_path, "--every", "60")


def test_full_disk_costs_no_step(tmp_path: Path) -> None:
    assert "\n4 runs, 0 faults" in run("disk.py", tmp_path, "--sizes", "1")


def test_soak_loses_no_record(tmp_path: Path) -> None:
    output = run("soak.py", tmp_path, "--steps", "40", "--ends", "2", "--failures", "0.05")
    assert "SIGKILL of all" in output and "\n40 steps, " in output
