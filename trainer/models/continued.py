"""A run that continues an adapter: `model:` names its folder or its run, and there is no section `lora:`.

The section is filled from the adapter's config, so that all that reads a recipe (the plan, the checks of rollout
servers, a resumed run) knows the adapter. The reference of stage rloo is the model with the adapter as it was loaded.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.source import find_source, read_adapter_config
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.lora_keys import LORA_ALLOWED, LORA_OWN, LORA_REFUSED
from rekatrain.trainer.recipe.upstream import check_lora, check_rollout_adapter

# Keys of a stored config that say where the adapter comes from, or how it started.
BASE = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "runtime_config", "fan_in_fan_out")
START = ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config")


def continue_adapter(recipe: Recipe) -> Recipe:
    """Return the recipe, with the section `lora:` of the adapter if its model is one.

    Raises InputError for an adapter that cannot be trained, and for a section that is not the adapter's.
    """
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    if source.adapter is None:
        return recipe
    if recipe.stage == "reward":
        raise InputError(
            f"{source.folder!r} is an adapter on {source.base!r}, and a reward model has another head: merge them into "
            "one model: rekatrain export RUN OUT"
        )
    lora = _section_of(source.adapter)
    if recipe.stage == "rloo":
        lora["lora_dropout"] = 0.0  # the sampler has none
    own = {key: value for key, value in (recipe.lora or {}).items() if key in LORA_OWN}
    lora |= own
    if recipe.lora not in (None, own, lora):
        raise InputError(
            f"{source.folder!r} is an adapter with its own settings: remove the section lora: to go on with it; or, to "
            "put a new adapter on top of it, merge it first: rekatrain export RUN OUT"
        )
    check_lora(lora)
    if recipe.stage == "rloo" and recipe.rloo.get("vllm_server_base_url"):
        check_rollout_adapter(lora)
    return replace(recipe, lora=lora)


def is_adapter(recipe: Recipe) -> bool:
    """Return True if the recipe's model is an adapter, which the run then continues."""
    return find_source(recipe.model["pretrained_model_name_or_path"]).adapter is not None


def _section_of(adapter: str) -> dict[str, Any]:
    """Return the settings of a stored adapter that are not PEFT's defaults."""
    config, defaults = read_adapter_config(Path(adapter)).to_dict(), LoraConfig().to_dict()
    for key in LORA_REFUSED:
        if key not in (*BASE, *START) and config.get(key) != defaults.get(key):
            raise InputError(f"the adapter {adapter!r} has {key}, which is not supported: {LORA_REFUSED[key]}")
    section = {}
    for key in LORA_ALLOWED:
        value = config.get(key)
        if key not in START and (key == "r" or value != defaults.get(key)):
            section[key] = sorted(value) if isinstance(value, set) else value
    return section
