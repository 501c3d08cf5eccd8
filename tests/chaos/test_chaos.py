"""Short forms of the chaos scripts: a few kills, damages, full disks, and a soak of some steps."""

import sys
from pathlib import Path

import pytest

from tests.chaos import damage, disk, kills, soak

pytestmark = [pytest.mark.slow, pytest.mark.launched]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the scripts make theirs. They keep it if something is wrong."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def run(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    module.main()  # type: ignore[attr-defined]  # a module


def test_first_resume_after_a_kill_ends_with_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(kills, monkeypatch, "--kills", "4", "--seed", "3")
    assert capsys.readouterr().out.splitlines()[-2].split() == ["all", "4", "0", "4", "4"]
    assert not list(folder.glob("rekatrain-chaos-*"))


def test_damage_is_repaired_or_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(damage, monkeypatch, "--every", "60")
    assert ", 0 other than expected" in capsys.readouterr().out
    assert not list(folder.glob("rekatrain-chaos-*"))


def test_full_disk_costs_no_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(disk, monkeypatch, "--sizes", "1")
    assert "\n4 runs, 0 faults" in capsys.readouterr().out
    assert not list(folder.glob("rekatrain-chaos-*"))


def test_soak_loses_no_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(soak, monkeypatch, "--steps", "40", "--ends", "2", "--failures", "0.05")
    output = capsys.readouterr().out
    assert "SIGKILL of all" in output and "\n40 steps, " in output
    assert not list(folder.glob("rekatrain-chaos-*"))
