"""Records of a run: what a resumed run keeps of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.folder import METRICS_FILE, ROLLOUTS_FILE, RunFolder
from rekatrain.trainer.run.records import read_records

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


def save(run: RunFolder, step: int) -> None:
    """Save a checkpoint of a run that has appended its records."""
    run.partial_checkpoint(step).mkdir(parents=True)
    run.publish(step, stage="sft", launch={}, save_total_limit=None)


def append(run: RunFolder, *steps: int) -> None:
    for step in steps:
        run.append(METRICS_FILE, [{"step": step, "loss": 1 / step}])


def test_resume_keeps_what_a_checkpoint_has_sealed(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    start(run, 0, "sft")
    append(run, 2, 4)
    save(run, 4)
    append(run, 6)
    whole = (run.path / METRICS_FILE).read_bytes()
    for again in (run, RunFolder(run.path)):  # a seal goes on over a resume
        assert start(again, 4, "sft") == [2, 4]
        append(again, 6)
        assert (run.path / METRICS_FILE).read_bytes() == whole
    save(again, 6)
    assert start(RunFolder(run.path), 6, "sft") == [2, 4, 6]
    write(run, whole + bytes(9))  # a torn tail of a later step
    assert start(RunFolder(run.path), 6, "sft") == [2, 4, 6]
    write(run, whole[:-1])  # nothing is lost but a newline
    assert start(RunFolder(run.path), 6, "sft") == [2, 4, 6]
    write(run, whole * 2)  # of two runs at once
    assert start(RunFolder(run.path), 6, "sft") == [2, 4, 6]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("change", "left", "kept"),
    [
        pytest.param(lambda content: content[:-3], 1, [2], id="torn"),
        pytest.param(lambda content: content[: content.index(b"\n") + 1], 1, [2], id="cut between lines"),
        pytest.param(lambda _: b"", 0, [], id="emptied"),
        pytest.param(lambda content: content.replace(b"0.5", b"0.7"), 2, [2, 4], id="changed number"),
        pytest.param(None, 0, [], id="deleted"),
    ],
)
def test_resume_reports_every_change_of_sealed_records(
    run: RunFolder,
    change: Callable[[bytes], bytes] | None,
    left: int,
    kept: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    start(run, 0, "sft")
    append(run, 2, 4)
    save(run, 4)
    path = run.path / METRICS_FILE
    content = path.read_bytes()
    path.unlink()
    if change:
        write(run, change(content))
    assert start(RunFolder(run.path), 4, "sft") == kept
    assert caplog.messages[-1] == (
        f"{path}: it is not as the run left it at step 4: it has {left} of 2 records up to there"
    )
