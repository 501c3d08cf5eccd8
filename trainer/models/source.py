"""The files of a model: from a name in a recipe to the folders that hold its tokenizer, weights and adapter."""

import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import peft
from peft import LoraConfig, PeftConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from rekatrain.data.errors import InputError
from rekatrain.data.locations import names_path
from rekatrain.trainer.run.folder import RECIPE_FILE, newest_checkpoint

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# Beginnings of `init_lora_weights` of adapters that PEFT loads onto changed weights of the base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Values of a key by which PEFT leaves a feature out.
OFF: tuple[object, ...] = (None, False, "", [], {})


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the files of a model are.

    folder:   folder or hub id of the tokenizer
    base:     folder or hub id of the weights
    adapter:  folder of a LoRA adapter on them, or None
    revision: commit of the base that the adapter was trained on, where its config names one
    """

    folder: str
    base: str
    adapter: str | None
    revision: str | None = None


def base_revision(source: Source, requested: str | None) -> str | None:
    """Return the revision of the base to load: the adapter's, or else the requested one (`model.revision`).

    Raises InputError for a requested revision that nothing would use.
    """
    if requested is not None and (source.revision or (source.adapter is None and Path(source.base).exists())):
        base = f", an adapter on {source.base!r} at revision {source.revision}" if source.revision else ""
        raise InputError(
            f"model.revision is {requested}, which is for models of the hub, and {source.folder!r} is a folder{base}: "
            "remove it"
        )
    return source.revision or requested


def commit_of(base: str, revision: str | None) -> str | None:
    """Return the commit that a revision of a hub's model names now; None for a folder."""
    return (
        None if Path(base).exists() else extract_commit_hash(cached_file(base, "config.json", revision=revision), None)
    )


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
    elif path.exists() and not path.is_dir():
        raise InputError(f"{pretrained_model_name_or_path!r} is a file: name the folder that holds the model")
    elif not path.exists() and names_path(pretrained_model_name_or_path):
        raise InputError(f"no model folder at {pretrained_model_name_or_path!r}")
    if (path / ADAPTER_CONFIG).exists():
        config = read_adapter_config(path)
        base = str(config.base_model_name_or_path)
        if names_path(base) and not Path(base).is_dir():
            raise InputError(f"{str(path)!r} is an adapter on {base!r}, which is no folder here: move the base back")
        if not (Path(base) / CONFIG).exists() and any(
            (Path(base) / name).exists() for name in (ADAPTER_CONFIG, RECIPE_FILE)
        ):
            raise InputError(
                f"{str(path)!r} is an adapter on {base!r}, which is an adapter or a run itself: merge that one first: "
                "rekatrain export RUN OUT; and name OUT as base_model_name_or_path"
            )
        return Source(folder=str(path), base=base, adapter=str(path), revision=config.revision)
    if not (path / CONFIG).exists() and any(path.glob("adapter_model.*")):
        raise InputError(
            f"{str(path)!r} holds the weights of an adapter and no {ADAPTER_CONFIG}, which names its base and scale: "
            "copy that file, too"
        )
    return Source(folder=str(path), base=str(path), adapter=None)


def read_adapter_config(folder: Path) -> LoraConfig:
    """Return the config of a LoRA adapter's folder; InputError for one that is damaged or of another kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about keys of another version or kind, which the check below names
            config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT lets out errors of JSON, of look-ups and of its classes' constructors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{str(folder / ADAPTER_CONFIG)!r} cannot be read: {reason}") from error
    if not isinstance(config, LoraConfig) or not config.base_model_name_or_path:
        kind = "names no base model" if isinstance(config, LoraConfig) else f"is a {config.peft_type} adapter, not LoRA"
        raise InputError(f"{str(folder / ADAPTER_CONFIG)!r} {kind}: use the folder of a LoRA adapter or a whole model")
    _check_keys(folder, config)
    start = str(config.init_lora_weights).lower()
    if start.startswith(CHANGES_BASE):
        raise InputError(
            f"the adapter {str(folder)!r} has init_lora_weights {start}, which moves a part of the base's weights into "
            "it: on the base as it is stored it is another model; convert it to plain LoRA: PEFT's save_pretrained "
            "with path_initial_model_for_weight_conversion"
        )
    return config


def _check_keys(folder: Path, config: LoraConfig) -> None:
    """Raise InputError for a key of an adapter's config that this PEFT ignores, unless its value is off or empty."""
    known = {field.name for field in fields(LoraConfig)}
    stored = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    unknown = {key: value for key, value in sorted(stored.items()) if key not in known and value not in OFF}
    if unknown:
        named = ", ".join(f"{key} {json.dumps(value)[:60]}" for key, value in unknown.items())
        raise InputError(
            f"the adapter {str(folder)!r} has {named}, which PEFT {peft.__version__} does not know and would ignore "
            f"(the adapter was saved by PEFT {config.peft_version or 'of an unknown version'}): install that version "
            "here, or remove from adapter_config.json what changes nothing"
        )
