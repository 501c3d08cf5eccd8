"""Check the config.json of a model, and build the model without weights that the other checks compare with."""

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig, PreTrainedModel

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.weights import quiet_transformers, readable

# Numbers of a config.json that are above 0 in every model.
POSITIVE = (
    "max_position_embeddings",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
)


def check_config(base: str, config: PretrainedConfig) -> None:
    """Raise InputError for a config that is not a text-only decoder's, or whose weights are quantized already."""
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(config, key, None), int):
            raise InputError(
                f"the config.json of {base!r} (model_type {config.model_type}) has no {key}: it is no text-only "
                "decoder like Llama"
            )
    check_context(base, config)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise InputError(
            f"{base!r} (model_type {config.model_type}) is an encoder, whose tokens see those after them: stage reward "
            "alone trains it"
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        raise InputError(
            f"{base!r} is quantized already (quantization_config in its config.json): use the model that it was made "
            "from; model.quantization_config quantizes that one as it is loaded"
        )


def check_context(base: str, config: PretrainedConfig) -> None:
    """Raise InputError for a config without a context length, and for one of an encoder with a decoder."""
    if not isinstance(getattr(config.get_text_config(), "max_position_embeddings", None), int):
        raise InputError(
            f"the config.json of {base!r} (model_type {config.model_type}) has no max_position_embeddings: models "
            "without a context length, of relative positions or with a recurrent state, are not trained here"
        )
    if config.is_encoder_decoder:
        raise InputError(
            f"{base!r} (model_type {config.model_type}) is an encoder with a decoder: name a model that is "
            "one of them alone"
        )


def check_dense(base: str, model: nn.Module) -> None:
    """Raise InputError for a mixture of experts; `model` needs no weights.

    Nobody has tried one with this program: its plan counts each weight once per token, and its rollouts, its adapters
    and its exports are not held against training.
    """
    experts = next((name for name, each in model.named_modules() if "Experts" in type(each).__name__), None)
    if experts is not None:
        raise InputError(
            f"{base!r} is a mixture of experts ({type(model).__name__}, {experts}): only dense models are trained here"
        )


def check_attention(config: PretrainedConfig) -> None:
    """Raise InputError unless the model uses plain causal attention, as the sampler and RLOO do."""
    text = config.get_text_config()
    for key in ("sliding_window", "attention_chunk_size", "attn_logit_softcapping"):
        if getattr(text, key, None) is not None:
            raise InputError(
                f"the model's config.json has {key} {getattr(text, key)}: sampling and RLOO attend to every earlier "
                "token, as Llama does, and would compute another model than this one"
            )
    others = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    if others:
        raise InputError(
            f"the model's config.json has layer_types {', '.join(others)}: sampling and RLOO attend to every earlier "
            "token in each layer, as Llama does, and would compute another model than this one"
        )
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # a class
    if model_class is not None and not model_class._supports_attention_backend:
        raise InputError(
            f"{model_class.__name__} (model_type {config.model_type}) computes its attention by code of its family, "
            "which sampling and RLOO cannot replace by theirs: stage sft alone trains it"
        )


def check_numbers(base: str, config: PretrainedConfig) -> None:
    """Raise InputError for a size of a config.json that is not above 0, and for numbers that are not finite."""
    _check_numbers(base, "config.json", config.to_dict())


def build_skeleton(base: str, config: PretrainedConfig, auto_class: Any, **options: Any) -> PreTrainedModel:
    """Return the model of a config on the meta device, without weights.

    Raises InputError where transformers cannot build one, for a config with numbers that make no sense, and for one
    that names another architecture than its model_type builds.

    auto_class: transformers' `AutoModelForCausalLM` or another Auto class
    """
    check_numbers(base, config)
    with readable(base), quiet_transformers(), torch.device("meta"):
        model = cast(PreTrainedModel, auto_class.from_config(config, **options))
    check_dense(base, model)
    names, ours = config.architectures or [], type(model).__name__
    is_same = ours in names if model.can_generate() else _family(ours) in map(_family, names)
    if names and not is_same:
        raise InputError(
            f"the config.json of {base!r} names the architecture {', '.join(names)}, and its model_type "
            f"{config.model_type} would be loaded as {ours}: it is another kind of model, or has another's config.json"
        )
    return model


def _family(architecture: str) -> str:
    """Return `Llama` for LlamaForCausalLM and for LlamaModel."""
    return re.split(r"For[A-Z]|Model|LMHead", architecture)[0]


def _check_numbers(base: str, name: str, tree: object) -> None:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            _check_numbers(base, f"{name}: {key}", value)
            is_positive_key = key in POSITIVE and isinstance(value, int | float)
            if is_positive_key and not value > 0:
                raise InputError(f"{base!r} has {key} {value} in its config.json: it should be above 0")
    elif isinstance(tree, float) and not math.isfinite(tree):
        raise InputError(f"{base!r} has {name} {tree}: it should be a finite number")
