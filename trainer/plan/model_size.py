"""The model of a recipe without its weights: how many parameters of which kind, and skeletons of any depth.

Built on the meta device: Reka Flash 3 in a second or two. Where the hub cannot be reached, the configs that lie in
recipes/reka-flash-3/configs/ stand in for those of the models that they are named after.
"""

import copy
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from rekatrain.data.errors import InputError
from rekatrain.trainer.models import Policy, add_adapter, find_source
from rekatrain.trainer.recipe.load import Recipe
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from rekatrain import RECIPES

logger = logging.getLogger(__name__)

CONFIGS = RECIPES / "reka-flash-3" / "configs"
# A layer more than these many costs what the last of them did.
FEW_LAYERS = (2, 3)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a plan needs to know of a model.

    num_base:       parameters without the adapter
    num_trained:    parameters that have a gradient
    num_adapter:    parameters of the adapter and of what is trained beside it (a classifier's head)
    num_linear:     weights of the decoder's linear layers, which a quantized base holds in four bits
    num_head:       weights of the LM head, also where they are the embedding's
    num_layers:     decoder layers
    largest_module: parameters of the largest module that holds any itself, which ZeRO-3 gathers whole
    largest_linear: weights of the largest linear layer of the decoder
    kv_dims:        numbers a token leaves in the cache of one layer, keys and values together
    attention_dims: heads times their size
    vocab_rows:     rows of the LM head
    context:        positions that the model knows
    """

    num_base: int
    num_trained: int
    num_adapter: int
    num_linear: int
    num_head: int
    num_layers: int
    largest_module: int
    largest_linear: int
    kv_dims: int
    attention_dims: int
    vocab_rows: int
    context: int

    @property
    def num_all(self) -> int:
        """All parameters."""
        return self.num_base + self.num_adapter


def load_config(recipe: Recipe) -> PretrainedConfig:
    """The config of the recipe's model, from its folder, the hub, or the configs shipped for a hub out of reach."""
    name = recipe.model["pretrained_model_name_or_path"]
    labels = {"num_labels": 1} if recipe.stage == "reward" else {}
    source = find_source(name)
    try:
        return AutoConfig.from_pretrained(source.base, revision=recipe.model.get("revision"), **labels)
    except (OSError, ValueError) as error:
        shipped = _shipped_config(name)
        if shipped is None:
            raise InputError(f"no model could be loaded from {source.base!r}: {str(error).splitlines()[0]}") from error
        return AutoConfig.from_pretrained(shipped, **labels)


@lru_cache  # told once, however many plans are of the model
def _shipped_config(name: str) -> Path | None:
    shipped = CONFIGS / f"{Path(name).name}.json"
    if not shipped.exists():
        return None
    logger.info("plan: %s is out of reach; its architecture is taken from %s", name, shipped.name)
    return shipped


def build(config: PretrainedConfig, recipe: Recipe, num_layers: int | None = None, **options: Any) -> Policy:
    """The recipe's model, adapter included, with fresh weights on the device that is current."""
    config = copy.deepcopy(config)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    auto = AutoModelForSequenceClassification if recipe.stage == "reward" else AutoModelForCausalLM
    dtype = getattr(torch, recipe.model.get("dtype", "bfloat16"))
    if recipe.stage == "reward" and config.pad_token_id is None:
        config.pad_token_id = 0
    model: PreTrainedModel = auto.from_config(config, dtype=dtype, **options)
    if recipe.lora is None:
        return model
    return add_adapter(model, recipe.lora, task_type="SEQ_CLS" if recipe.stage == "reward" else "CAUSAL_LM")


def measure_shape(config: PretrainedConfig, recipe: Recipe) -> ModelShape:
    """Count the parameters of the recipe's model."""
    with torch.device("meta"):
        model = build(config, recipe)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    head = base.get_output_embeddings()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    num_adapter = sum(trained) if isinstance(model, PeftModel) else 0
    linear = [module.weight.numel() for module in _linear_modules(base.base_model.modules()) if module is not head]
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return ModelShape(
        num_base=sum(sizes.values()) - num_adapter,
        num_trained=sum(trained),
        num_adapter=num_adapter,
        num_linear=sum(linear),
        num_head=head.weight.numel() if isinstance(head, nn.Linear) else 0,
        num_layers=text.num_hidden_layers,
        largest_module=max(
            sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()
        ),
        largest_linear=max(linear),
        kv_dims=2 * kv_heads * head_dim,
        attention_dims=text.num_attention_heads * head_dim,
        vocab_rows=text.vocab_size,
        context=text.max_position_embeddings,
    )


def _linear_modules(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Linear layers of the base model, those that an adapter is on included, without the adapter's own."""
    modules = list(modules)
    adapters = {
        id(part)
        for module in modules
        for name in ("lora_A", "lora_B")
        if isinstance(getattr(module, name, None), nn.ModuleDict)
        for part in getattr(module, name).values()
    }
    return [module for module in modules if isinstance(module, nn.Linear) and id(module) not in adapters]


@lru_cache(maxsize=64)
def model_of(stage: Literal["sft", "reward", "rloo"], model: str, lora: str) -> tuple[PretrainedConfig, ModelShape]:
    """Config and shape by a recipe's sections, the latter two as JSON: many plans are of one model."""
    recipe = Recipe(stage=stage, output_dir="", model=json.loads(model), lora=json.loads(lora), dataset={})
    config = load_config(recipe)
    return config, measure_shape(config, recipe)
