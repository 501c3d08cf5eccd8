"""Fingerprints of what a run reads beside its recipe: rows, base weights and rewards, and the versions that computed.

origin.py keeps them in each checkpoint, and compares them when the run is resumed.
"""

import hashlib
import inspect
import json
import platform
import sysconfig
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers.utils.hub import cached_file, extract_commit_hash

import rekatrain
from rekatrain.rewards.registry import find
from rekatrain.trainer.models.source import find_source
from rekatrain.trainer.processes.launch import read_launch
from rekatrain.trainer.recipe.load import Recipe

# Names of files of weights, of a whole model or an adapter.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.safetensors")
# Keys of config.json that no weight and no activation depends on.
BOOKKEEPING = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")
# The start, the middle and the end of each tensor are read: 21 billion parameters are 6 MB of reading.
WINDOW = 4096
# Of a file without a table of its tensors.
NUM_WINDOWS = 256
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "math-verify", "reasoning-gym")
# Options of rewards that name a file which the run writes.
WRITTEN = ("cache",)


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Hashes are SHA-256, in hexadecimal digits.

    num_rows:     number of rows, pairs or prompts that are trained
    rows:         of their ids and, in stage rloo, of the columns for the rewards: also another tokenizer changes it
    architecture: of the base model's config.json
    base_weights: of each file's size and of the first, middle and last 4 KiB of each tensor; for the hub, the commit
    rewards:      name of a reward -> of the file with its code, and of files beside it that it imports
    files:        `NAME.OPTION` of a reward -> of the file or the model that the option names
    environment:  versions, launch and device
    """

    num_rows: int
    rows: str
    architecture: str
    base_weights: str
    rewards: dict[str, str]
    files: dict[str, str]
    environment: dict[str, str]


def take_fingerprints(recipe: Recipe, rows: Iterable[Sequence[object]]) -> Fingerprints:
    """Read what the fingerprints are of; the model must exist.

    rows: the parts of each trained row, such as its token ids, its labels or JSON values
    """
    digest, num_rows = hashlib.sha256(), 0
    for row in rows:
        for part in row:
            content = _bytes_of(part)
            digest.update(len(content).to_bytes(8, "little") + content)
        num_rows += 1
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    architecture, weights = _fingerprint_model(source.base, source.revision or recipe.model.get("revision"))
    if source.adapter is not None:  # that a run continues
        weights += f", adapter {_fingerprint_folder(Path(source.adapter))}"
    return Fingerprints(
        num_rows=num_rows,
        rows=digest.hexdigest(),
        architecture=architecture,
        base_weights=weights,
        rewards={name: _fingerprint_code(name) for name in recipe.rewards},
        files=dict(_fingerprint_options(recipe)),
        environment=_describe_environment(),
    )


def _bytes_of(part: object) -> bytes:
    """Return the content of a part of a row; token ids as numbers of 8 bytes, in a third of the time of JSON."""
    if isinstance(part, np.ndarray):
        return part.astype("<i8").tobytes()
    if isinstance(part, list) and part and type(part[0]) is int:
        return array("q", part).tobytes()
    return json.dumps(part, sort_keys=True, default=repr).encode()


def _fingerprint_model(base: str, revision: str | None) -> tuple[str, str]:
    """Return the fingerprints of a model's config.json and of its weights."""
    path = Path(base)
    config = path / "config.json" if path.is_dir() else Path(str(cached_file(base, "config.json", revision=revision)))
    content = json.loads(config.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in BOOKKEEPING}
    architecture = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    # Below the cache of the hub, a folder is named by its commit.
    commit = extract_commit_hash(str(config), None)
    return architecture, f"commit {commit}" if commit else _fingerprint_folder(path)


def _fingerprint_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            for start, length in _windows(file):
                content.seek(start)
                digest.update(content.read(length))
    return digest.hexdigest()


def _windows(file: Path) -> Iterator[tuple[int, int]]:
    """Return offsets and lengths of the parts of a file that its fingerprint reads."""
    size = file.stat().st_size
    spans = _tensors(file) or [(size * n // NUM_WINDOWS, size * (n + 1) // NUM_WINDOWS) for n in range(NUM_WINDOWS)]
    yield 0, min(spans)[0]
    for start, end in spans:
        length = min(WINDOW, end - start)
        yield from dict.fromkeys((offset, length) for offset in (start, (start + end - length) // 2, end - length))


def _tensors(file: Path) -> list[tuple[int, int]]:
    """Return the start and the end of each tensor of a safetensors file; nothing for another, or a damaged one."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if file.suffix != ".safetensors" or length > file.stat().st_size:
            return []
        try:
            header = json.loads(content.read(length))
        except ValueError:
            return []
    offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return [(8 + length + start, 8 + length + end) for start, end in offsets]


def _fingerprint_code(name: str) -> str:
    """Return the fingerprint of the code of a reward; an empty text for one without a source file, such as C."""
    function = find(name)
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    if file is None:
        return ""
    digest = hashlib.sha256()
    for path in _with_imports(Path(file), inspect.getmodule(function)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _with_imports(file: Path, module: ModuleType | None) -> list[Path]:
    """Return the file of a user's module, and the user's files that it imports, directly or not; they are not run.

    An installed module is covered by the versions of the environment: its file alone is returned.
    """
    installed = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
    if module is None or module.__name__.startswith("rekatrain.") or any(file.is_relative_to(at) for at in installed):
        return [file]
    depth = module.__name__.count(".") + (file.name == "__init__.py")
    finder = ModuleFinder(path=[str(file.parents[depth])])
    finder.import_hook(module.__name__)
    found = [Path(path) for part in finder.modules.values() if (path := getattr(part, "__file__", None))]
    return [file, *sorted(path for path in found if path != file)]


def _fingerprint_options(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for name, options in recipe.rewards.items():
        for key, value in (options or {}).items():
            if isinstance(value, str) and key not in WRITTEN and Path(value).exists():
                path = Path(value)
                is_file = path.is_file()
                yield (
                    f"{name}.{key}",
                    hashlib.sha256(path.read_bytes()).hexdigest() if is_file else _fingerprint_folder(path),
                )


def _describe_environment() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {
        "rekatrain": rekatrain.__version__,
        **{name: metadata.version(name) for name in LIBRARIES},
        "launch": str(read_launch()),
        "device": device,
    }
