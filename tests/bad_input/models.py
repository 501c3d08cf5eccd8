"""Changes of a copy of a model folder, each by its name in the cases."""

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
WEIGHTS = {"model": "model.safetensors", "classifier": "model.safetensors", "adapter": "adapter_model.safetensors"}


def change_model(folder: Path, models: Path, changes: Sequence[Any]) -> None:
    """Replace the workspace's link to a model by a copy, and make the changes; the first may be {of: adapter}.

    A change is a mapping from the name of a function below to its argument.
    """
    name = "model"
    for change in changes:
        ((kind, argument),) = change.items()
        if kind == "of":
            name = argument
            continue
        if (folder / name).is_symlink():
            (folder / name).unlink()
            shutil.copytree(models / name, folder / name)
        CHANGES[kind](folder / name, argument)


def _edit_tensors(folder: Path, edit: Callable[[Tensors], None]) -> None:
    path = folder / WEIGHTS[folder.name]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop(folder: Path, name: str) -> None:
    """Remove a tensor."""
    _edit_tensors(folder, lambda tensors: tensors.__delitem__(name))


def rename(folder: Path, names: list[str]) -> None:
    """Give a tensor another name."""
    _edit_tensors(folder, lambda tensors: tensors.update({names[1]: tensors.pop(names[0])}))


def add(folder: Path, name: str) -> None:
    """Add a tensor that the model does not have."""
    _edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))


def reshape(folder: Path, shape: dict[str, list[int]]) -> None:
    """Give a tensor another shape."""
    _edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(*of) for name, of in shape.items()}))


def fill(folder: Path, values: dict[str, float]) -> None:
    """Put a value, such as NaN, into one place of a tensor."""

    def edit(tensors: Tensors) -> None:
        for name, value in values.items():
            tensors[name].view(-1)[-1] = value

    _edit_tensors(folder, edit)


def cast(folder: Path, dtype: str) -> None:
    """Store all tensors in another dtype."""
    _edit_tensors(
        folder, lambda tensors: tensors.update({key: value.to(getattr(torch, dtype)) for key, value in tensors.items()})
    )


def config(folder: Path, changes: dict[str, Any]) -> None:
    """Change keys of config.json; a null removes one."""
    _edit_json(folder / "config.json", changes)


def json_file(folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Change keys of a JSON file."""
    for name, keys in changes.items():
        _edit_json(folder / name, keys)


def _edit_json(path: Path, changes: dict[str, Any]) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def write(folder: Path, files: dict[str, str]) -> None:
    """Write text into files."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def delete(folder: Path, names: str | list[str]) -> None:
    """Delete files; `*` all of them."""
    for pattern in [names] if isinstance(names, str) else names:
        for path in folder.glob(pattern):
            path.unlink()


def truncate(folder: Path, sizes: dict[str, int]) -> None:
    """Keep so many bytes of a file; a negative number cuts off so many."""
    for name, size in sizes.items():
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:size])


def append(folder: Path, names: list[str]) -> None:
    """Add zero bytes to the end of files."""
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes() + bytes(7))


def header(folder: Path, text: str) -> None:
    """Replace the header of the weights by a text of the right length."""
    path = folder / WEIGHTS[folder.name]
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(64))


def shard(folder: Path, changes: dict[str, Any]) -> None:
    """Split the weights into two files with an index.

    changes: `delete`: a shard to leave out; `move`: a tensor that the index has in the wrong shard; `index`: a text in
             place of the index; `weight_map`: a value in place of the map
    """
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = sorted(tensors)
    weight_map = {}
    for file, part in zip(files, (names[:5], names[5:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if "move" in changes:
        weight_map[changes["move"]] = files[0] if weight_map[changes["move"]] == files[1] else files[1]
    index: dict[str, Any] = {"metadata": {}, "weight_map": changes.get("weight_map", weight_map)}
    (folder / "model.safetensors.index.json").write_text(changes.get("index", json.dumps(index)))
    if "delete" in changes:
        (folder / files[changes["delete"]]).unlink()


def pickle_only(folder: Path, kind: str) -> None:
    """Store the weights as pytorch_model.bin: `whole`, `torn`, or with a tensor `missing`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "missing":
        tensors.pop("model.layers.1.mlp.up_proj.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    if kind == "torn":
        truncate(folder, {"pytorch_model.bin": 2000})


def replace_by(folder: Path, kind: str) -> None:
    """Put a file, nothing, or a link to nowhere in place of the folder."""
    shutil.rmtree(folder)
    if kind == "file":
        folder.write_text("not a folder")
    elif kind == "link":
        folder.symlink_to("nowhere")
    elif kind == "empty":
        folder.mkdir()


CHANGES: dict[str, Callable[[Path, Any], None]] = {
    function.__name__: function
    for function in (
        drop, rename, add, reshape, fill, cast, config, json_file, write, delete, truncate, append, header, shard,
        pickle_only, replace_by,
    )
}  # fmt: skip
