"""Short forms of the chaos scripts: a few kills, damages, full disks, and a soak of some steps."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import damage, disk, kills, soak

pytestmark = [pytest.mark.slow, pytest.mark.launched]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script, which must end well, and returns its output. It keeps its folder if something is wrong."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def run(main: Callable[[], None], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        main()
        assert not list(tmp_path.glob("rekatrain-chaos-*"))
        return capsys.readouterr().out

    return run


def test_first_resume_after_a_kill_ends_with_the_same_bits(run: Callable[..., str]) -> None:
    last = run(kills.main, "--kills", "4", "--seed", "3").splitlines()[-2]
    assert last.split() == ["all", "4", "0", "4", "4"]


def test_damage_is_repaired_or_reported(run: Callable[..., str]) -> None:
    assert ", 0 other than expected" in run(damage.main, "--every", "60")


def test_full_disk_costs_no_step(run: Callable[..., str]) -> None:
    assert "\n4 runs, 0 faults" in run(disk.main, "--sizes", "1")


def test_soak_loses_no_record(run: Callable[..., str]) -> None:
    output = run(soak.main, "--steps", "40", "--ends", "2", "--failures", "0.05")
    assert "SIGKILL of all" in output and "\n40 steps, " in output
