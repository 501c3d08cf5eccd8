"""QLoRA (arXiv 2305.14314): the recipe's `model.quantization_config:`, and the launches that can train with it.

peft's prepare_model_for_kbit_training is not needed: `get_peft_model` freezes the base, Llama's norms compute in
float32 on their own, and TRL makes the embeddings' outputs require gradients if checkpointing needs it.
"""

from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.float32_weights import load_in_float32
from rekatrain.trainer.processes.launch import read_launch
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.shipped import shipped_file
from rekatrain.trainer.recipe.upstream import check_quantization_section

NAME = "model.quantization_config"


def make_quantization(section: dict[str, Any] | None, dtype: str) -> BitsAndBytesConfig | None:
    """Make the configuration of the section; the model's dtype is the default for computation."""
    return None if section is None else BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": dtype, **section})


def check_quantization(recipe: Recipe, *, has_gpu: bool, zero_stage: int | None) -> None:
    """Raise InputError if a launch with this hardware and ZeRO stage cannot train the recipe's quantized model."""
    section = recipe.model.get("quantization_config")
    if section is None:
        return
    check_quantization_section(section)
    if not section.get("load_in_4bit") and not section.get("load_in_8bit"):
        raise InputError(f"{NAME} quantizes nothing: set load_in_4bit: true (QLoRA), or remove it")
    if recipe.lora is None:
        raise InputError(f"{NAME} needs a lora: section: quantized weights cannot be trained, an adapter on them can")
    if recipe.lora.get("target_parameters"):
        raise InputError(
            f"{NAME} packs weights, so that lora.target_parameters has nothing to adapt: name layers in "
            "lora.target_modules"
        )
    if recipe.lora.get("init_lora_weights") == "orthogonal":
        raise InputError(
            f"{NAME} packs weights, of whose dtype lora.init_lora_weights: orthogonal makes its matrices: remove it"
        )
    if not has_gpu:
        raise InputError(f"{NAME} needs a GPU, and there is none: remove it to train a plain adapter here")
    if zero_stage == 3:
        raise InputError(
            f"{NAME} keeps the quantized weights whole on each GPU, which ZeRO-3 would shard: launch with "
            f"{shipped_file('accelerate/zero2.yaml')} or ddp.yaml"
        )


def keep_adapter_dtype(model: nn.Module, adapter: str | None) -> None:
    """Undo TRL's cast of all that is trained on a quantized base to bfloat16, which rounds small updates away.

    A resumed run is float32, too, so that it would otherwise give other weights than the unbroken run.

    adapter: folder of the adapter that the run continues, whose weights TRL has rounded
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    if adapter is not None:
        assert isinstance(model, PeftModel)
        load_in_float32(model, adapter)


def check_quantization_here(recipe: Recipe) -> None:
    """Raise InputError if this process, as it was launched, cannot train the recipe's quantized model."""
    check_quantization(recipe, has_gpu=torch.cuda.is_available(), zero_stage=read_launch().zero_stage)
    if recipe.model.get("quantization_config") is not None and find_spec("bitsandbytes") is None:
        raise InputError(f"{NAME} needs the package bitsandbytes: pip install bitsandbytes")
