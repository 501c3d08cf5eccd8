"""The weight files of a model folder, checked by their headers alone: nothing is loaded, whatever their size.

A safetensors file begins with the length of a JSON header, which has each tensor's name, dtype, shape and byte range.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rekatrain.data.errors import InputError

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
# Formats that transformers reads by unpickling, with weights_only. They have no header to check.
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# A larger header is a damaged one; that of 21B has about 100 kB.
MAX_HEADER_BYTES = 100_000_000
FLOATS = ("F64", "F32", "F16", "BF16")
LFS_MARK = b"version https://git-lfs"
HOW_TO_COPY = "copy or download the folder again"


def local_folder(base: str, revision: str | None) -> Path | None:
    """Return the folder of a model, in the hub's cache for a hub id, or None if it is not on this machine yet."""
    path = Path(base)
    if path.is_dir():
        return path
    cached = try_to_load_from_cache(base, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def check_weight_files(folder: Path) -> bool:
    """Check the headers of a model's weight files; return False if they are of a kind that has none.

    Raises InputError for a folder without weights, an index that names missing files or tensors, a file that is cut off
    or a pointer of Git LFS, and tensors that are not floating-point numbers.
    """
    if (folder / SAFETENSORS).exists():
        _check_dtypes(folder / SAFETENSORS, read_header(folder / SAFETENSORS))
        return True
    if (folder / INDEX).exists():
        for shard, names in _read_index(folder / INDEX).items():
            header = read_header(folder / shard)
            _check_dtypes(folder / shard, header)
            missing = sorted(names - set(header))
            if missing:
                raise InputError(
                    f"{str(folder / shard)!r} lacks the tensor {missing[0]}, which {INDEX} says it holds: {HOW_TO_COPY}"
                )
        return True
    if any((folder / name).exists() for name in PICKLED):
        return False
    raise InputError(f"no weights in {str(folder)!r}: it has neither {SAFETENSORS} nor {INDEX}; {HOW_TO_COPY}")


def stored_names(folder: Path) -> dict[str, Path]:
    """Return the tensors of a checked folder, each with its file: those that transformers reads, and no other files."""
    if (folder / SAFETENSORS).exists():
        return dict.fromkeys(read_header(folder / SAFETENSORS), folder / SAFETENSORS)
    if not (folder / INDEX).exists():
        return {}
    return {name: folder / shard for shard, names in _read_index(folder / INDEX).items() for name in names}


def read_header(path: Path) -> dict[str, Any]:  # JSON values
    """Return the header of a safetensors file: name -> dtype, shape and data_offsets.

    Raises InputError for a file that is not one, and for one whose size is not what the header says.
    """
    if not path.is_file():
        raise InputError(f"{str(path)!r} is missing or is not a file: {HOW_TO_COPY}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if LFS_MARK.startswith(start) and start:
            raise InputError(f"{str(path)!r} is a pointer of Git LFS, not the weights: run git lfs pull in its folder")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{str(path)!r} is no safetensors file, or is cut off ({size:,} bytes): {HOW_TO_COPY}")
        content = file.read(length)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes_are_good = all(
            isinstance(entry["dtype"], str) and all(isinstance(n, int) for n in entry["shape"])
            for entry in header.values()
        )
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        shapes_are_good, end, header = False, 0, {}
    if not shapes_are_good:
        raise InputError(f"{str(path)!r} has a damaged header: {HOW_TO_COPY}")
    if end != size - 8 - length:
        raise InputError(
            f"{str(path)!r} is cut off or damaged: it has {size:,} bytes, and its header says {end + 8 + length:,}; "
            f"{HOW_TO_COPY}"
        )
    return dict(header)


def _read_index(path: Path) -> dict[str, set[str]]:
    """Return the tensors of each file that an index names."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(shard, set()).add(name)
        if any(Path(shard).name != shard for shard in shards):
            raise ValueError(shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{str(path)!r} is no index of weight files: {HOW_TO_COPY}") from None
    missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
    if missing or not shards:
        named = f"{missing[0]}, which is missing" if missing else "no file"
        raise InputError(f"{str(path)!r} names {named}: {HOW_TO_COPY}")
    return shards


def _check_dtypes(path: Path, header: Mapping[str, Any]) -> None:
    for name, entry in header.items():
        # Buffers such as position_ids are integers.
        if entry["dtype"] not in FLOATS and name.endswith("weight"):
            raise InputError(
                f"{str(path)!r} stores {name} as {entry['dtype']}; weights are trained from {', '.join(FLOATS)}: use "
                "the model that is not quantized (model.quantization_config quantizes it as it is loaded)"
            )
