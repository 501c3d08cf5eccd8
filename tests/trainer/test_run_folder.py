"""Records of a run: what a resumed run keeps of them."""

import json
from pathlib import Path

import pytest

from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.records import read_records
from rekatrain.trainer.run_folder import METRICS_FILE, ROLLOUTS_FILE, RunFolder

LINES = [json.dumps({"step": step, "text": "\u2028 é"}, ensure_ascii=False).encode() for step in range(1, 7)]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def start(run: RunFolder, step: int, stage: str = "rloo") -> list[int]:
    """Start a run at a step, and return the steps of the metrics that it keeps."""
    run.start(Recipe(stage=stage, output_dir=str(run.path), model={}, dataset={}), step)  # type: ignore[arg-type]
    return [record["step"] for record in read_records(run.path / METRICS_FILE)]


def write(run: RunFolder, content: bytes, name: str = METRICS_FILE) -> None:
    (run.path / name).write_bytes(content)


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(b"\x00\x01garbage{", id="garbage"),
        pytest.param(bytes(40), id="NULs"),
        pytest.param(b'{"step": 3, "text": "\xff"}', id="not UTF-8"),
        pytest.param(b'{"reward": 1}', id="without a step"),
        pytest.param(b'{"step": "3"}', id="step is no number"),
        pytest.param(b"[3]", id="not an object"),
        pytest.param(b"[" * 10**5, id="deep"),
        pytest.param(LINES[2][:9], id="torn"),
    ],
)
def test_start_drops_damaged_records_and_reports_them(
    run: RunFolder, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [*LINES[:2], damaged, *LINES[3:]]
    for name in (METRICS_FILE, ROLLOUTS_FILE):
        write(run, b"\n".join(lines) + b"\n", name)
    assert start(run, 4) == [1, 2, 4]
    assert (run.path / METRICS_FILE).read_bytes() == b"\n".join([*LINES[:2], LINES[3]]) + b"\n"
    for name in (METRICS_FILE, ROLLOUTS_FILE):
        assert f"{run.path / name}: dropped damaged lines: 3" in caplog.messages
        assert f"{run.path / name}: the records of some steps are lost: 3" in caplog.messages


def test_start_after_a_kill_loses_nothing(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    for name in (METRICS_FILE, ROLLOUTS_FILE):
        write(run, b"\n".join(LINES[:4]), name)  # the last line lacks its newline alone
    assert start(run, 4) == [1, 2, 3, 4]
    assert start(run, 2) == [1, 2]
    assert not caplog.messages


def test_start_reports_a_deleted_file(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    write(run, b"\n".join(LINES), ROLLOUTS_FILE)
    assert start(run, 6) == []
    assert caplog.messages == [
        f"{run.path / METRICS_FILE}: the records of some steps are lost: 1, 2, 3, 4, 5, ... (6 in all)"
    ]


def test_start_of_sft_expects_no_record_of_each_step(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    write(run, LINES[1] + b"\n" + LINES[3] + b"\n")
    assert start(run, 4, "sft") == [2, 4]
    assert not caplog.messages
