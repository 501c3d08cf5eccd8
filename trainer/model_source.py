"""The files of a model: from a name in a recipe to the folders that hold its tokenizer, weights and adapter."""

from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig

from rekatrain.data.errors import InputError
from rekatrain.data.locations import names_path
from rekatrain.trainer.run_folder import RECIPE_FILE, newest_checkpoint


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the files of a model are.

    folder:  folder or hub id of the tokenizer
    base:    folder or hub id of the weights
    adapter: folder of a LoRA adapter on them, or None
    """

    folder: str
    base: str
    adapter: str | None


def find_source(pretrained_model_name_or_path: str) -> Source:
    """Return the source of a run folder (its newest checkpoint), an adapter folder, a model folder or a hub id.

    Raises InputError for a path that does not exist and for a run without a checkpoint.
    """
    path = Path(pretrained_model_name_or_path)
    if (path / RECIPE_FILE).exists():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise InputError(f"the run {str(path)!r} has no checkpoint yet")
        path = checkpoint
    elif not path.exists() and names_path(pretrained_model_name_or_path):
        raise InputError(f"no model folder at {pretrained_model_name_or_path!r}")
    if (path / "adapter_config.json").exists():
        base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
        return Source(folder=str(path), base=str(base), adapter=str(path))
    return Source(folder=str(path), base=str(path), adapter=None)
