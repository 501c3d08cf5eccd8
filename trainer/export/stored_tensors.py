"""The tensors in the weight files of a model, read one at a time."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from rekatrain.trainer.models.source import Source
from rekatrain.trainer.models.weight_files import check_weight_files, local_folder, stored_names
from rekatrain.trainer.models.weights import check_report, quiet_transformers, readable

FILES = ("*.safetensors", "*.json")


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files that transformers reads: an item is a copy of its bytes."""

    def __init__(self, folder: Path) -> None:
        self._files = stored_names(folder)

    def __getitem__(self, name: str) -> Tensor:
        # A file that stays open keeps the pages that were read; and a tensor may share them, so it is copied.
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_tensors(source: Source, auto_class: Any, names: Collection[str], **options: Any) -> Mapping[str, Tensor]:
    """Return the base's tensors: lazily from safetensors files that name them as the model does.

    transformers converts the files of some architectures as it loads them, and reads pickles. Such a base is loaded
    whole, in the dtype in which it is stored.

    names: those that the model needs; options: keywords of its config
    """
    folder = local_folder(source.base, source.revision)
    if folder is None:
        with readable(source.base):
            folder = Path(snapshot_download(source.base, revision=source.revision, allow_patterns=list(FILES)))
    if check_weight_files(folder):
        stored = StoredTensors(folder)
        if set(names) <= set(stored):
            return stored
    with quiet_transformers(), readable(source.base):
        model, report = auto_class.from_pretrained(
            source.base, revision=source.revision, dtype="auto", output_loading_info=True, **options
        )
    check_report(source.base, model, report, may_lack_head=bool(options))
    whole: dict[str, Tensor] = model.state_dict()
    return whole
