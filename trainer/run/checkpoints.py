"""Checkpoints of all stages: folders that are written aside, verified and deleted by their manifest.

    checkpoints/checkpoint-N/manifest.json   step, stage, launch; size and SHA-256 of the other files and of the records
    checkpoints/.rekatrain-partial/          checkpoints that are being written; a start of the run deletes it

A folder without a manifest is not a checkpoint. Only files that a manifest lists are ever deleted.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
# The last file that a stage writes; before version 0.2.0 it was the mark of a complete checkpoint.
STATE_FILE = "trainer_state.json"
# Ends the names of files and folders that are being written. Nobody else uses it, so what bears it may be deleted.
PARTIAL_SUFFIX = ".rekatrain-partial"
# Hashing releases the GIL: a thread hashes about 1 to 2 GB/s.
HASH_THREADS = 8
# Weights that the libraries would load from a checkpoint, some in place of the run's own.
WEIGHTS = {
    f"{kind}.{suffix}" for kind in ("model", "adapter_model", "pytorch_model") for suffix in ("safetensors", "bin")
}
WEIGHTS |= {f"{name}.index.json" for name in WEIGHTS}
# torch and safetensors report a failed write by errors of other classes.
WRITE_FAILURE = re.compile(r"unexpected pos|iostream error|PytorchStreamWriter|I/O error|os error \d+")


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of steps taken before the checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Return the folders checkpoint-N that lie in `folder`, by step; links are left out."""
    paths = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted((path for path in paths if path.is_dir() and not path.is_symlink()), key=checkpoint_step)


def seal(
    folder: Path, *, step: int, stage: str, launch: Mapping[str, Any], records: Mapping[str, Any] | None = None
) -> None:
    """Sync every file of a checkpoint to disk, then write and sync its manifest.

    launch:  the launch that saved it
    records: the state of the run's JSON-lines files by their names (records.py)
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        entries = threads.map(_sync_and_describe, paths)
        files = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    body = {"step": step, "stage": stage, "launch": dict(launch), "records": dict(records or {}), "files": files}
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1)
    write_whole(folder / MANIFEST_FILE, (text + "\n").encode())
    for path in (path for path in folder.rglob("*") if path.is_dir()):
        _sync_folder(path)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest; raise ValueError, with the reason, if there is none or it is damaged."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
        is_whole = isinstance(manifest, dict) and manifest.pop("sha256", None) == _digest(manifest)
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST_FILE}") from None
    except (ValueError, RecursionError, OSError):
        raise ValueError(f"its {MANIFEST_FILE} is damaged") from None
    if not is_whole or not _is_manifest(manifest):
        raise ValueError(f"its {MANIFEST_FILE} is damaged")
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in manifest["files"]):
        raise ValueError(f"its {MANIFEST_FILE} names files outside the folder")
    return manifest


def find_fault(
    checkpoint: Path, *, hashes: bool = True, is_needed: Callable[[str], bool] = lambda _: True
) -> str | None:
    """Return the first difference between a checkpoint and its manifest as text, or None if there is none.

    hashes:    compare contents too, not only sizes
    is_needed: the names of the files to verify; all by default
    """
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    if manifest["step"] != checkpoint_step(checkpoint):
        return f"its {MANIFEST_FILE} is of step {manifest['step']}"
    foreign = sorted(name for name in WEIGHTS - {*manifest["files"]} if os.path.lexists(checkpoint / name))
    if foreign:
        return f"{foreign[0]} was not written by the run: move it away"
    files = {name: entry for name, entry in manifest["files"].items() if is_needed(name)}
    for name, entry in files.items():
        path = checkpoint / name
        if not os.path.isfile(path):  # False for a name that no file can have, too
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size:,} bytes; the manifest says {entry['size']:,}"
    if hashes:
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            actual = threads.map(_hash_or_error, (checkpoint / name for name in files))
            for (name, entry), digest in zip(files.items(), actual, strict=True):
                if digest != entry["sha256"]:
                    return f"{name} is damaged: its SHA-256 is not that of the manifest"
    return None


def publish(partial: Path, final: Path) -> None:
    """Give a sealed folder its name; a folder that has the name already is deleted, or moved if it is not ours."""
    if os.path.lexists(final):
        delete(final)
    if os.path.lexists(final):
        aside = next(
            path for n in range(1, 10**6) if not os.path.lexists(path := final.with_name(f"{final.name}.moved-{n}"))
        )
        final.rename(aside)
        logger.warning("%s was not written by this run: renamed to %s", final, aside.name)
    partial.rename(final)
    _sync_folder(final.parent)


def rotate(folder: Path, limit: int | None, *, newest: int, best: int | None = None) -> None:
    """Delete the checkpoints before the last `limit` whole ones up to step `newest`; None or 0 means no limit.

    Call it after the checkpoint of step `newest` is published. It is kept, and the one of step `best` too.
    """
    if not limit or limit < 0:
        return
    ours = [path for path in numbered_checkpoints(folder) if _has_manifest(path) and checkpoint_step(path) <= newest]
    kept = [path for path in ours if find_fault(path, hashes=False) is None][-limit:]
    for path in ours[: ours.index(kept[0]) if kept else 0]:
        if checkpoint_step(path) != best:
            delete(path)


def delete(checkpoint: Path) -> None:
    """Delete the files that a checkpoint's manifest lists, and the folder if nothing else is in it.

    A folder without a manifest, and a link, stays as it is.
    """
    if checkpoint.is_symlink() or not _has_manifest(checkpoint):
        return
    files = [*read_manifest(checkpoint)["files"], MANIFEST_FILE]
    if _list_files(checkpoint) <= {*files}:
        # It loses its name in one operation: a kill leaves no half of a checkpoint.
        aside = checkpoint.parent / PARTIAL_SUFFIX / f"{checkpoint.name}.deleted"
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():
            shutil.rmtree(aside)
        checkpoint.rename(aside)
        shutil.rmtree(aside)
        return
    # The manifest goes last: after a kill, the next deletion still knows the files.
    for name in files:
        (checkpoint / name).unlink(missing_ok=True)
    for path in sorted(
        (path for path in checkpoint.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True
    ):
        with suppress(OSError):
            path.rmdir()
    logger.warning("%s: the checkpoint is deleted; files that the run did not write stay", checkpoint)


def _list_files(folder: Path) -> set[str]:
    """Return the names, relative to a folder, of all files and links in it, and of folders without any."""
    names: set[str] = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            names.add(path.relative_to(folder).as_posix())
    return names


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, and sync it to disk."""
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


@contextmanager
def write_failures(folder: Path) -> Iterator[None]:
    """Raise OSError for the errors of other classes by which torch and safetensors report a failed write."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        if not WRITE_FAILURE.search(text):
            raise
        free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
        code = errno.ENOSPC if free < 2**26 else errno.EIO
        raise OSError(code, f"{os.strerror(code)} ({text}); {free / 2**20:,.0f} MB free", str(folder)) from error


def _has_manifest(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except ValueError:
        return False
    return True


def _is_manifest(body: Mapping[str, Any]) -> bool:
    """Return True if a manifest has all its parts: another program may have written one with a right digest."""
    files = body.get("files")
    return (
        isinstance(body.get("step"), int)
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values())
        and all(isinstance(entry["size"], int) for entry in files.values())
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync_and_describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _hash_or_error(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # an unreadable file is a damaged one
        return str(error)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)
