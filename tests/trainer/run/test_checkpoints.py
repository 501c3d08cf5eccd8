"""The checkpoint layer: what a manifest notices, and what is never deleted."""

import json
import os
import shutil
from pathlib import Path

import pytest

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.checkpoints import MANIFEST_FILE, delete, find_fault, publish, rotate, seal
from rekatrain.trainer.run.folder import RunFolder, newest_checkpoint


def write_checkpoint(checkpoints: Path, step: int) -> Path:
    """Write a whole checkpoint of three small files, one of them in a subfolder."""
    partial = checkpoints / ".rekatrain-partial" / f"checkpoint-{step}"
    (partial / "global_step").mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "global_step/optim.pt"):
        (partial / name).write_text(f"{name} of {step}")
    seal(partial, step=step, stage="rloo", launch={"num_processes": 1})
    final = checkpoints / f"checkpoint-{step}"
    publish(partial, final)
    return final


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def run(checkpoints: Path) -> RunFolder:
    return RunFolder(checkpoints.parent)


def test_rotate_goes_by_step_not_by_time(checkpoints: Path) -> None:
    for step in (2, 9, 10, 11):
        path = write_checkpoint(checkpoints, step)
        os.utime(path, (2e9 - step, 2e9 - step))  # the clock goes back
    rotate(checkpoints, 2, newest=11)
    assert names(checkpoints) == ["checkpoint-10", "checkpoint-11"]


def test_rotate_keeps_the_best_checkpoint(checkpoints: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(checkpoints, step)
    rotate(checkpoints, 1, newest=3, best=1)
    assert names(checkpoints) == ["checkpoint-1", "checkpoint-3"]


def test_rotate_counts_only_whole_checkpoints_up_to_the_newest(checkpoints: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(checkpoints, step)
    (checkpoints / "checkpoint-2" / "model.safetensors").unlink()
    rotate(checkpoints, 2, newest=3)  # a run that continued from 1, because 2 was damaged
    assert names(checkpoints) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    rotate(checkpoints, 1, newest=3)
    assert names(checkpoints) == ["checkpoint-3", "checkpoint-4"]


def test_rotate_deletes_nothing_that_the_run_did_not_write(checkpoints: Path, tmp_path: Path) -> None:
    outside = write_checkpoint(tmp_path / "outside", 1)
    (checkpoints / "checkpoint-1").symlink_to(outside)
    for name in ("checkpoint-best", "checkpoint-2-keep", "checkpoint-2", "checkpoint-2.partial", "notes.partial"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "model.safetensors").write_text("the user's")
    (checkpoints / "checkpoint-2" / "trainer_state.json").write_text("{}")
    before = names(checkpoints)
    write_checkpoint(checkpoints, 3)
    write_checkpoint(checkpoints, 4)
    rotate(checkpoints, 1, newest=4)
    assert names(checkpoints) == sorted([*before, "checkpoint-4"])
    assert find_fault(outside) is None


def test_delete_keeps_files_that_the_manifest_does_not_list(checkpoints: Path) -> None:
    path = write_checkpoint(checkpoints, 1)
    (path / "notes.txt").write_text("the user's")
    delete(path)
    assert names(path) == ["notes.txt"]


def test_delete_leaves_no_half_of_a_checkpoint(
    checkpoints: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(checkpoints, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: pytest.fail("deletes a file of a checkpoint with a name"))
        patch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            delete(path)
    assert names(checkpoints) == []
    run.start(_recipe(run), 0)
    assert list(checkpoints.iterdir()) == []


def test_start_completes_the_last_rotation(checkpoints: Path, run: RunFolder) -> None:
    for step in (1, 2, 3, 4, 5):
        write_checkpoint(checkpoints, step)
    (checkpoints / "checkpoint-1" / "notes.txt").write_text("the user's")
    state = checkpoints / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps({"best_model_checkpoint": "elsewhere/checkpoint-2"}))
    seal(state.parent, step=4, stage="rloo", launch={})
    recipe = Recipe(stage="sft", output_dir=str(run.path), model={}, dataset={}, sft={"save_total_limit": 1})
    run.start(recipe, 4)
    kept = {f"checkpoint-{number}" for number in (1, 2, 4, 5)}
    assert {path.name for path in checkpoints.iterdir()} == {*kept, "best"}
    assert (checkpoints / "best").readlink() == Path("checkpoint-2")
    assert names(checkpoints / "checkpoint-1") == ["notes.txt"]


def test_publish_moves_a_folder_of_the_user_aside(checkpoints: Path) -> None:
    (checkpoints / "checkpoint-3").mkdir()
    (checkpoints / "checkpoint-3" / "notes.txt").write_text("the user's")
    assert find_fault(write_checkpoint(checkpoints, 3)) is None
    assert names(checkpoints / "checkpoint-3.moved-1") == ["notes.txt"]
    assert find_fault(write_checkpoint(checkpoints, 3)) is None  # ours is replaced
    assert names(checkpoints) == ["checkpoint-3", "checkpoint-3.moved-1"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = {
    "bit flip": ("model.safetensors", _flip, "model.safetensors is damaged: its SHA-256 is not that of the manifest"),
    "bit flip below": ("global_step/optim.pt", _flip, "global_step/optim.pt is damaged"),
    "truncated": ("global_step/optim.pt", _truncate, "global_step/optim.pt has 23 bytes; the manifest says 26"),
    "missing": ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
    "manifest missing": (MANIFEST_FILE, Path.unlink, "it has no manifest.json"),
    "manifest flipped": (MANIFEST_FILE, _flip, "its manifest.json is damaged"),
    "manifest truncated": (MANIFEST_FILE, _truncate, "its manifest.json is damaged"),
    "manifest of NULs": (MANIFEST_FILE, lambda path: path.write_bytes(bytes(50)), "its manifest.json is damaged"),
    "manifest not an object": (MANIFEST_FILE, lambda path: path.write_text("[]"), "its manifest.json is damaged"),
    "manifest deep": (MANIFEST_FILE, lambda path: path.write_text("[" * 10**5), "its manifest.json is damaged"),
    "manifest not UTF-8": (MANIFEST_FILE, lambda path: path.write_bytes(b"\xff\xfe{"), "its manifest.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_choose_checkpoint_skips_a_damaged_one(
    checkpoints: Path, run: RunFolder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, harm, message = DAMAGES[damage]
    for step in (8, 9, 10):
        write_checkpoint(checkpoints, step)
    harm(checkpoints / "checkpoint-10" / name)
    assert run.choose_checkpoint(resume=True) == checkpoints / "checkpoint-9"
    assert f"skipped {checkpoints / 'checkpoint-10'}: {message}" in caplog.text
    assert run.choose_checkpoint(resume=False) is None
    assert names(checkpoints) == ["checkpoint-10", "checkpoint-8", "checkpoint-9"]


def test_choose_checkpoint_skips_one_with_foreign_weights(
    checkpoints: Path, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    expected, newest = write_checkpoint(checkpoints, 2), write_checkpoint(checkpoints, 3)
    (newest / "notes.txt").write_text("the user's")
    assert run.choose_checkpoint(resume=True) == newest
    (newest / "pytorch_model.bin").write_text("another program's")  # transformers would load it
    assert run.choose_checkpoint(resume=True) == expected
    assert "pytorch_model.bin was not written by the run: move it away" in caplog.text


def test_choose_checkpoint_skips_a_renamed_copy(checkpoints: Path, run: RunFolder) -> None:
    write_checkpoint(checkpoints, 2).rename(checkpoints / "checkpoint-7")
    expected = write_checkpoint(checkpoints, 3)
    assert run.choose_checkpoint(resume=True) == expected


def test_choose_checkpoint_without_an_undamaged_one_is_an_error(checkpoints: Path, run: RunFolder) -> None:
    assert run.choose_checkpoint(resume=True) is None
    _flip(write_checkpoint(checkpoints, 1) / "model.safetensors")
    (write_checkpoint(checkpoints, 2) / MANIFEST_FILE).unlink()
    with pytest.raises(InputError) as raised:
        run.choose_checkpoint(resume=True)
    message = str(raised.value)
    assert "checkpoint-1: model.safetensors is damaged" in message and "checkpoint-2: it has no manifest" in message
    assert "versions before 0.2.0" in message and "rekatrain export" in message and "\n" not in message


def test_newest_checkpoint_verifies_the_weights(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(checkpoints.parent) is None
    one, two = write_checkpoint(checkpoints, 1), write_checkpoint(checkpoints, 2)
    _flip(two / "global_step/optim.pt")
    assert newest_checkpoint(checkpoints.parent) == two  # an export reads no optimizer
    _flip(two / "model.safetensors")
    assert newest_checkpoint(checkpoints.parent) == one
    assert "checkpoint-2: model.safetensors is damaged" in caplog.text


def test_newest_checkpoint_of_an_older_version_has_no_manifest(
    checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (9, 10):
        (write_checkpoint(checkpoints, step) / MANIFEST_FILE).unlink()
    assert newest_checkpoint(checkpoints.parent) == checkpoints / "checkpoint-10"
    assert "cannot be verified" in caplog.text


def test_manifest_cannot_name_files_outside(checkpoints: Path, tmp_path: Path) -> None:
    path = write_checkpoint(checkpoints, 1)
    (tmp_path / "mine").write_text("the user's")
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    manifest["files"]["../../../mine"] = {"size": 10, "sha256": ""}
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))
    delete(path)
    assert (tmp_path / "mine").exists() and (path / "model.safetensors").exists()


def test_start_deletes_unfinished_checkpoints_alone(checkpoints: Path, run: RunFolder) -> None:
    (run.partial_checkpoint(3)).mkdir(parents=True)
    for name in ("checkpoint-best", "checkpoint-4-keep", "checkpoint-5", "checkpoint-6.partial", "x.partial"):
        (checkpoints / name).mkdir()
    before = names(checkpoints)
    run.start(_recipe(run), 0)
    assert names(checkpoints) == before and not run.partial.exists()


def test_check_rejects_linked_checkpoints(run: RunFolder, tmp_path: Path) -> None:
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a link"):
        run.check(_recipe(run), resume=True)


def test_check_accepts_a_run_that_was_killed_before_its_recipe(run: RunFolder) -> None:
    run.partial.mkdir()
    run.check(_recipe(run), resume=False)
    (run.checkpoints / "checkpoint-best").mkdir()
    with pytest.raises(InputError, match="not a run folder and not empty"):
        run.check(_recipe(run), resume=False)


def test_check_says_how_to_repair_a_run_folder(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="metrics.jsonl' is a folder: put back"):
        run.check(_recipe(run), resume=True)
    (run.path / "metrics.jsonl").rmdir()
    write_checkpoint(run.checkpoints, 1)
    with pytest.raises(InputError, match="holds checkpoints, but no recipe.yaml: put a copy"):
        run.check(_recipe(run), resume=True)
    for damaged in (b"", b"stage: [", b"\xff\xfe", b"rloo: max_s"):
        (run.path / "recipe.yaml").write_bytes(damaged)
        with pytest.raises(InputError, match="^--resume: .*recipe.yaml' is damaged: put a copy"):
            run.check(_recipe(run), resume=True)


def _recipe(run: RunFolder) -> Recipe:
    return Recipe(stage="rloo", output_dir=str(run.path), model={}, dataset={})
