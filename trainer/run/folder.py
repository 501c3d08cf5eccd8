"""The folder of one run.

recipe.yaml      the resolved recipe
metrics.jsonl    one line per step
rollouts.jsonl   one line per completion (stage rloo)
checkpoints/best            a link to the best checkpoint, with `metric_for_best_model` (best.py)
checkpoints/checkpoint-N/   weights as transformers or PEFT load them, and the whole state that step N + 1 depends on
                            (checkpoints.py)
run.lock         locked by the main process of the run that writes to the folder
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import Recipe, dump_recipe, load_recipe
from rekatrain.trainer.resume.changes import check_changes, find_changes
from rekatrain.trainer.run.best import best_step, link_best
from rekatrain.trainer.run.checkpoints import (
    MANIFEST_FILE,
    PARTIAL_SUFFIX,
    STATE_FILE,
    find_fault,
    numbered_checkpoints,
    publish,
    read_manifest,
    rotate,
    seal,
    write_whole,
)
from rekatrain.trainer.run.records import RecordFile

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
LOCK_FILE = "run.lock"
# In each checkpoint: the recipe and the fingerprints of the run that wrote it (../resume/origin.py).
ORIGIN_FILE = "origin.json"
# Children of a run that was killed may hold its lock for a moment.
LOCK_SECONDS = 5.0
# Bytes that a start writes to find out that the disk is full or the folder read-only.
PROBE_BYTES = 2**20
# Suffixes of the files of a checkpoint from which weights and tokenizer are loaded.
WEIGHTS_FILES = (".safetensors", ".json", ".jinja")


class RunFolder:
    """Paths, checkpoints and appended records of one run; as a context manager, it unlocks the folder at the end."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        # Checkpoints are written in here and moved to `checkpoints` when they are complete.
        self.partial = self.checkpoints / PARTIAL_SUFFIX
        self._records = {name: RecordFile(self.path / name) for name in (METRICS_FILE, ROLLOUTS_FILE)}
        self._is_new = False
        self._origin: Mapping[str, Any] = {}
        self._lock = FileLock(self.path / LOCK_FILE, timeout=LOCK_SECONDS, thread_local=False)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock.is_locked and not (self.path / RECIPE_FILE).exists():
            # The run ended before it started, for example because the model has no weights: it leaves nothing.
            (self.path / LOCK_FILE).unlink(missing_ok=True)
            for folder in (self.partial, self.checkpoints, *([self.path] if self._is_new else [])):
                with suppress(OSError):
                    folder.rmdir()
        self._lock.release()

    def check(self, recipe: Recipe, *, resume: bool) -> None:
        """Raise InputError if the folder is in use, holds a run of another recipe, or is not ours; write nothing."""
        stored_file = self.path / RECIPE_FILE
        if self.checkpoints.is_symlink():
            raise InputError(
                f"{str(self.checkpoints)!r} is a link; checkpoints are deleted only in the run folder itself: replace "
                "the link by its folder, or make output_dir the link"
            )
        for path in (self.checkpoints, *(file.path for file in self._records.values())):
            if path.exists() and path.is_dir() != (path == self.checkpoints):
                raise InputError(
                    f"{str(path)!r} is {'a' if path.is_dir() else 'no'} folder: put back what the run left there"
                )
        if not stored_file.exists():
            if numbered_checkpoints(self.checkpoints):
                raise InputError(
                    f"output_dir {str(self.path)!r} holds checkpoints, but no {RECIPE_FILE}: put a copy of the run's "
                    "recipe there to continue it, or choose another"
                )
            if self._holds_other_files():
                raise InputError(f"output_dir {str(self.path)!r} is not a run folder and not empty; choose another")
            return
        if not resume:
            raise InputError(
                f"output_dir {str(self.path)!r} already holds a run; continue it with --resume or choose another folder"
            )
        try:
            stored = load_recipe(stored_file)
        except InputError as error:
            raise InputError(
                f"--resume: {str(stored_file)!r} is damaged: put a copy of the run's recipe there ({error})"
            ) from error
        check_changes(find_changes(stored, recipe))

    def check_unlocked(self) -> None:
        """Raise InputError if another run has locked the folder; write nothing."""
        if (self.path / LOCK_FILE).exists():
            self._acquire()
            self._lock.release()

    def choose_checkpoint(self, *, resume: bool) -> Path | None:
        """Return the newest checkpoint that verifies, or None for a fresh start; log each one that is skipped.

        The main process verifies; every process must call this, after the processes are connected.
        """
        return on_main_process(self._choose_checkpoint) if resume else None

    def open(
        self,
        recipe: Recipe,
        checkpoint: Path | None,
        *,
        resume: bool,
        origin: Callable[[Path | None], Mapping[str, Any]],
    ) -> None:
        """Lock the folder; raise InputError if another run has it, or if it cannot be written.

        Every process must call this, before weights are loaded and after all else is checked, because it writes. The
        main process does the work.

        checkpoint: the one to continue from, which another run may have deleted meanwhile
        origin:     compares the run with the checkpoint that it continues, and returns the content of ORIGIN_FILE
        """
        on_main_process(lambda: self._open(recipe, checkpoint, resume=resume))
        self._origin = on_main_process(lambda: origin(checkpoint))

    def start(self, recipe: Recipe, step: int) -> None:
        """Write the recipe, and delete the records of the steps after `step`, which the run will repeat.

        Also deletes checkpoints that a killed run has left half written, or has not yet deleted.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / RECIPE_FILE, dump_recipe(recipe).encode())
        # A kill may have interrupted the last rotation, which deletes in `partial`.
        best = best_step(self.checkpoint(step))
        link_best(self.checkpoints, best)
        rotate(self.checkpoints, _save_total_limit(recipe), newest=step, best=best)
        if self.partial.is_dir() and not self.partial.is_symlink():
            shutil.rmtree(self.partial)
        # Each step of RLOO has records; the other stages log every few steps, and no rollouts.
        sealed = read_manifest(self.checkpoint(step)).get("records", {}) if self.checkpoint(step).exists() else {}
        for name, file in self._records.items():
            file.keep(step, sealed.get(name), every_step=recipe.stage == "rloo")

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records to one of the run's JSON-lines files."""
        self._records[name].append(records)

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps."""
        return self.checkpoints / f"checkpoint-{step}"

    def partial_checkpoint(self, step: int) -> Path:
        """Return the path at which the checkpoint after `step` steps is written."""
        return self.partial / f"checkpoint-{step}"

    def publish(self, step: int, *, stage: str, launch: Mapping[str, Any], save_total_limit: int | None) -> None:
        """Complete the checkpoint in `partial_checkpoint(step)`, then delete the oldest ones beyond the limit.

        The best one (best.py) is kept anyway.

        launch: the launch that a resumed run must have; it is kept in the manifest
        """
        partial = self.partial_checkpoint(step)
        records = {name: file.seal() for name, file in self._records.items() if file.path.exists()}
        (partial / ORIGIN_FILE).write_text(json.dumps(self._origin, indent=1, default=str) + "\n", encoding="utf-8")
        seal(partial, step=step, stage=stage, launch=launch, records=records)
        publish(partial, self.checkpoint(step))
        best = best_step(self.checkpoint(step))
        link_best(self.checkpoints, best)
        rotate(self.checkpoints, save_total_limit, newest=step, best=best)
        with suppress(OSError):
            self.partial.rmdir()

    def _choose_checkpoint(self) -> Path | None:
        faults = {}
        for path in reversed(numbered_checkpoints(self.checkpoints)):
            fault = find_fault(path)
            if fault is None:
                return path
            logger.warning("skipped %s: %s", path, fault)
            faults[path.name] = fault
        if not faults:
            return None
        is_old = any(fault == f"it has no {MANIFEST_FILE}" for fault in faults.values())
        raise InputError(
            f"--resume: no checkpoint of {str(self.path)!r} is complete and undamaged: "
            + "; ".join(f"{name}: {fault}" for name, fault in faults.items())
            + (f" (checkpoints of versions before 0.2.0 have no {MANIFEST_FILE})" if is_old else "")
            + ". Export one that still loads, rekatrain export RUN/checkpoints/checkpoint-N OUT, and start a new run "
            "from it; or move them away to start at step 0"
        )

    def _open(self, recipe: Recipe, checkpoint: Path | None, *, resume: bool) -> None:
        try:
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            for folder in [self.path, *([self.checkpoints] if self.checkpoints.exists() else [])]:
                probe = folder / f"probe{PARTIAL_SUFFIX}"
                try:
                    write_whole(probe, bytes(PROBE_BYTES))
                finally:
                    probe.unlink(missing_ok=True)
            for file in self._records.values():
                if file.path.exists():
                    file.path.open("r+b").close()
        except OSError as error:
            raise InputError(
                f"output_dir {str(self.path)!r} cannot be written: {error.strerror} ({error.filename}); free space, or "
                "choose another"
            ) from error
        # Another run may have worked here between the first check and the lock.
        self.check(recipe, resume=resume)
        fault = find_fault(checkpoint, hashes=False) if checkpoint else None
        if fault:
            raise InputError(f"{str(checkpoint)!r} has changed since this run started: {fault}; start it again")

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise InputError(
                f"output_dir {str(self.path)!r} is in use: another run has locked {str(self.path / LOCK_FILE)!r}; wait "
                "for its end, or choose another folder"
            ) from None

    def _holds_other_files(self) -> bool:
        """Return True if the folder holds more than a run that was killed before it wrote its recipe leaves behind."""
        if not self.path.is_dir():
            return self.path.exists() or self.path.is_symlink()
        found = {*self.path.iterdir(), *(self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())}
        others = found - {self.path / LOCK_FILE, self.checkpoints}
        return not all(path.name.endswith(PARTIAL_SUFFIX) for path in others)


def newest_checkpoint(run: str | Path) -> Path | None:
    """Return the newest checkpoint of a run whose weights verify, or None if it has none yet; log skipped ones.

    Runs of versions before 0.2.0 have no manifests: the newest complete one is returned, with a warning.
    """
    paths = numbered_checkpoints(Path(run) / "checkpoints")
    for path in reversed(paths):
        fault = find_fault(path, is_needed=lambda name: name.endswith(WEIGHTS_FILES))
        if fault is None:
            return path
        logger.warning("skipped %s: %s", path, fault)
    unverified = next((path for path in reversed(paths) if _is_older_version(path)), None)
    if unverified:
        logger.warning("%s was saved without a %s: its files cannot be verified", unverified, MANIFEST_FILE)
    return unverified


def _save_total_limit(recipe: Recipe) -> int | None:
    limit: int | None = getattr(recipe, recipe.stage).get("save_total_limit")
    return limit


def _is_older_version(checkpoint: Path) -> bool:
    return (checkpoint / STATE_FILE).exists() and not (checkpoint / MANIFEST_FILE).exists()


def on_main_process(function: Callable[[], Result]) -> Result:
    """Call `function` on the main process alone; return its result, or raise its InputError, on every process."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    result: Result = outcome[0]
    return result
