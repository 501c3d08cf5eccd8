"""Build the model of a recipe without weights, and count its parameters.

The model is built on the meta device, which takes a second or two for Reka Flash 3. If the hub cannot be reached, the
configs in recipes/reka-flash-3/configs/ are used for the models that they are named after.
"""

import copy
import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from rekatrain import RECIPES
from rekatrain.data.errors import InputError
from rekatrain.trainer.models.config import check_attention, check_config, check_context, check_dense, check_numbers
from rekatrain.trainer.models.load import Policy, add_adapter
from rekatrain.trainer.models.optimizers import is_8bit, is_matrix
from rekatrain.trainer.models.source import base_revision, find_source
from rekatrain.trainer.models.weights import readable
from rekatrain.trainer.recipe.load import Recipe

logger = logging.getLogger(__name__)

CONFIGS = RECIPES / "reka-flash-3" / "configs"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model, as numbers of elements (not bytes).

    num_base:       parameters without the adapter
    num_trained:    parameters that have a gradient
    num_matrices:   trained weights that Muon updates
    largest_matrix: rows and columns of the largest of them
    newton_schulz:  FLOPs by which Muon orthogonalizes their updates
    num_8bit:       trained weights whose moments 8-bit AdamW keeps in 8 bits
    largest_trained: weights of the largest trained tensor
    num_adapter:    parameters of the adapter and of modules that are trained with it (a classifier's head)
    num_linear:     weights of the decoder's linear layers, which a quantized base stores in 4 bits
    num_head:       weights of the LM head, counted even if they are tied to the embedding
    num_layers:     decoder layers
    largest_module: parameters of the largest single module (its submodules excluded), which ZeRO-3 gathers whole
    largest_linear: weights of the largest linear layer of the decoder
    kv_dims:        elements of the KV cache per token and layer, keys and values together
    attention_dims: elements of the queries per token and layer
    vocab_size:     outputs of the LM head
    context:        the model's maximum sequence length, in tokens
    """

    num_base: int
    num_trained: int
    num_matrices: int
    largest_matrix: tuple[int, int]
    newton_schulz: int
    num_8bit: int
    largest_trained: int
    num_adapter: int
    num_linear: int
    num_head: int
    num_layers: int
    largest_module: int
    largest_linear: int
    kv_dims: int
    attention_dims: int
    vocab_size: int
    context: int

    @property
    def num_all(self) -> int:
        """Number of parameters, adapter included."""
        return self.num_base + self.num_adapter


def load_config(recipe: Recipe) -> PretrainedConfig:
    """Load the config of the recipe's model: from its folder, the hub, or, without the hub, the shipped configs.

    Raise InputError if none of them has the model.
    """
    name = recipe.model["pretrained_model_name_or_path"]
    labels = {"num_labels": 1} if recipe.stage == "reward" else {}
    source = find_source(name)
    try:
        with readable(source.base):
            config = AutoConfig.from_pretrained(
                source.base, revision=base_revision(source, recipe.model.get("revision")), **labels
            )
    except InputError:
        shipped = _shipped_config(name)
        if shipped is None:
            raise
        config = AutoConfig.from_pretrained(shipped, **labels)
    check_numbers(source.base, config)
    if recipe.stage == "reward":
        check_context(source.base, config)
    else:
        check_config(source.base, config)
    if recipe.stage == "rloo":
        check_attention(config)
    return config


@lru_cache  # so that the message is logged once per model, not once per plan
def _shipped_config(name: str) -> Path | None:
    shipped = CONFIGS / f"{Path(name).name}.json"
    if not shipped.exists():
        return None
    logger.info("plan: %s cannot be loaded; using the architecture in %s", name, shipped.name)
    return shipped


def build(config: PretrainedConfig, recipe: Recipe, num_layers: int | None = None, **options: Any) -> Policy:
    """Build the recipe's model, adapter included, with new weights on the current default device.

    num_layers: number of decoder layers to build; None: all
    options:    further arguments of `from_config`
    """
    whole, config = config, copy.deepcopy(config)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if vars(config).get("layer_types"):
            config.layer_types = config.layer_types[:num_layers]
    auto = AutoModelForSequenceClassification if recipe.stage == "reward" else AutoModelForCausalLM
    dtype = getattr(torch, recipe.model.get("dtype", "bfloat16"))
    if recipe.stage == "reward" and config.pad_token_id is None:
        config.pad_token_id = 0
    with readable(recipe.model["pretrained_model_name_or_path"]):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, **options)
    check_dense(recipe.model["pretrained_model_name_or_path"], model)
    if recipe.lora is None:
        return model
    lora = recipe.lora
    if config.num_hidden_layers < whole.num_hidden_layers and _names_layers(lora):
        sections = json.dumps(recipe.model), json.dumps(lora)
        lora = json.loads(_lora_of_every_layer(type(whole).from_dict, whole.to_json_string(), recipe.stage, *sections))
    return add_adapter(model, lora, task_type="SEQ_CLS" if recipe.stage == "reward" else "CAUSAL_LM")


def _names_layers(lora: dict[str, Any]) -> bool:
    """Return True if the section may give some layers other adapters than others."""
    if lora.get("layers_to_transform") is not None or lora.get("exclude_modules") is not None:
        return True
    targets = lora.get("target_modules")
    return targets != "all-linear" and (isinstance(targets, str) or any("." in name for name in targets or []))


@lru_cache(maxsize=64)
def _lora_of_every_layer(
    make_config: Callable[[dict[str, Any]], PretrainedConfig],
    config: str,
    stage: Literal["sft", "reward", "rloo"],
    model: str,
    lora: str,
) -> str:
    """Return a section `lora:` for fewer layers, in which each layer has the adapters that any layer of the model has.

    Fewer layers may lack those that the recipe's section names. Their memory is an upper bound.

    make_config:         makes a configuration of its values
    config, model, lora: as JSON text, which is hashable
    """
    section = json.loads(lora)
    recipe = Recipe(stage=stage, output_dir="", model=json.loads(model), lora=section, dataset={})
    with torch.device("meta"):
        adapted = build(make_config(json.loads(config)), recipe)
    assert isinstance(adapted, PeftModel)
    ranks: dict[str, int] = {}
    for name, module in adapted.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and not name.endswith(".lora_A"):
            # model.layers.7.mlp.up_proj: the name within a layer; of a module outside the layers, the last one
            kind = re.split(r"\.\d+\.", name)[-1] if re.search(r"\.\d+\.", name) else name.rsplit(".", 1)[-1]
            ranks[kind] = max(ranks.get(kind, 0), module.r["default"])
    own = {"layers_to_transform", "layers_pattern", "exclude_modules", "alpha_pattern"}
    kept = {key: value for key, value in section.items() if key not in own}
    return json.dumps(kept | {"target_modules": sorted(ranks), "rank_pattern": ranks})


def measure_shape(config: PretrainedConfig, recipe: Recipe) -> ModelShape:
    """Count the parameters of the recipe's model."""
    with torch.device("meta"):
        model = build(config, recipe)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    head = base.get_output_embeddings()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    trained = [parameter.numel() for parameter in parameters.values()]
    matrices = [(each.shape[0], each.shape[1]) for name, each in parameters.items() if is_matrix(name, each)]
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    num_adapter = sum(trained) if isinstance(model, PeftModel) else 0
    linear = [module.weight.numel() for module in _linear_modules(base.base_model.modules()) if module is not head]
    text = config.get_text_config()
    attention_dims, kv_dims = attention_sizes(config)
    return ModelShape(
        num_base=sum(sizes.values()) - num_adapter,
        num_trained=sum(trained),
        num_matrices=sum(rows * columns for rows, columns in matrices),
        largest_matrix=max(matrices, key=math.prod, default=(0, 0)),
        newton_schulz=sum(newton_schulz_flops(rows, columns) for rows, columns in matrices),
        num_8bit=sum(each.numel() for each in parameters.values() if is_8bit(each) and each not in embeddings),
        largest_trained=max(trained),
        num_adapter=num_adapter,
        num_linear=sum(linear),
        num_head=head.weight.numel() if isinstance(head, nn.Linear) else 0,
        num_layers=text.num_hidden_layers,
        largest_module=max(
            sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()
        ),
        largest_linear=max(linear),
        kv_dims=kv_dims,
        attention_dims=attention_dims,
        vocab_size=text.vocab_size,
        context=text.max_position_embeddings,
    )


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Return the FLOPs of torch's Muon for one matrix: 5 steps, each with A = X X', A A and (A A) X."""
    short, long = sorted((rows, columns))
    return 5 * (2 * 2 * short**2 * long + 2 * short**3)


def attention_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """Return the elements per token and layer of the queries, and of the keys and values together."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return text.num_attention_heads * head_dim, 2 * kv_heads * head_dim


def _linear_modules(modules: Iterable[nn.Module]) -> list[nn.Linear | Conv1D]:
    """Return the linear layers of the base model, including those with an adapter, but not the adapter's layers."""
    modules = list(modules)
    adapters = {
        id(part)
        for module in modules
        for name in ("lora_A", "lora_B")
        if isinstance(getattr(module, name, None), nn.ModuleDict)
        for part in getattr(module, name).values()
    }
    return [module for module in modules if isinstance(module, nn.Linear | Conv1D) and id(module) not in adapters]


@lru_cache(maxsize=64)
def model_of(stage: Literal["sft", "reward", "rloo"], model: str, lora: str) -> tuple[PretrainedConfig, ModelShape]:
    """Return the config and the sizes of a model, cached because many plans are made for one model.

    model, lora: the recipe's sections as JSON text, which is hashable
    """
    recipe = Recipe(stage=stage, output_dir="", model=json.loads(model), lora=json.loads(lora), dataset={})
    config = load_config(recipe)
    return config, measure_shape(config, recipe)
