"""Model loading in one place: what is checked before a weight is read, and how it is read."""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keywords
from rekatrain.data.tokenizer import load_tokenizer
from rekatrain.trainer.launch import read_launch
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run_folder import RECIPE_FILE, newest_checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

logger = logging.getLogger(__name__)

Policy = PreTrainedModel | PeftModel


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model's files are: `folder` holds the tokenizer, `base` the weights, `adapter` what goes on top."""

    folder: str
    base: str
    adapter: str | None


def find_source(pretrained_model_name_or_path: str) -> Source:
    """Tell a run folder (its newest checkpoint), an adapter folder and a model (folder or hub id) apart."""
    path = Path(pretrained_model_name_or_path)
    if (path / RECIPE_FILE).exists():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise InputError(f"the run {str(path)!r} has no checkpoint yet")
        path = checkpoint
    elif not path.exists() and pretrained_model_name_or_path.startswith((".", "/", "~", "runs/")):
        raise InputError(f"no model folder at {pretrained_model_name_or_path!r}")
    if (path / "adapter_config.json").exists():
        base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
        return Source(folder=str(path), base=str(base), adapter=str(path))
    return Source(folder=str(path), base=str(path), adapter=None)


def load_model(
    pretrained_model_name_or_path: str,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    attn_implementation: str | None = None,
    quantization_config: dict[str, Any] | None = None,
) -> Policy:
    """Load a causal language model from a folder, the hub, an adapter folder or a run folder; the recipe's `model:`.

    quantization_config: keywords of `transformers.BitsAndBytesConfig`, for QLoRA
    """
    source = find_source(pretrained_model_name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.base,
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            quantization_config=make_quantization(quantization_config, dtype),
        )
    except OSError as error:
        raise InputError(f"no weights could be loaded from {source.base!r}: {str(error).splitlines()[0]}") from error
    return PeftModel.from_pretrained(model, source.adapter) if source.adapter else model


def make_quantization(section: dict[str, Any] | None, dtype: str) -> BitsAndBytesConfig | None:
    """The recipe's `model.quantization_config:`; what it does not say is computed in the model's dtype."""
    return None if section is None else BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": dtype, **section})


def check_quantization(recipe: Recipe, *, has_gpu: bool, zero_stage: int | None) -> None:
    """Raise InputError for a `model.quantization_config:` (QLoRA, arXiv 2305.14314) that such a launch cannot train.

    peft's prepare_model_for_kbit_training is not needed: `get_peft_model` freezes the base, Llama's norms compute in
    float32 by themselves, and TRL makes the embeddings' outputs require gradients where checkpointing needs it.
    """
    section = recipe.model.get("quantization_config")
    if section is None:
        return
    name = "model.quantization_config"
    check_keywords(name, section, BitsAndBytesConfig, reserved=("kwargs",))
    if not section.get("load_in_4bit") and not section.get("load_in_8bit"):
        raise InputError(f"{name} quantizes nothing: set load_in_4bit: true (QLoRA), or take it out")
    if recipe.lora is None:
        raise InputError(f"{name} needs a lora: section: quantized weights cannot be trained, an adapter on them can")
    if not has_gpu:
        raise InputError(f"{name} needs a GPU, and there is none: take it out to train a plain adapter here")
    if zero_stage == 3:
        raise InputError(
            f"{name} keeps the quantized weights whole on each GPU, which ZeRO-3 would shard: launch with "
            "recipes/accelerate/zero2.yaml or ddp.yaml"
        )


def check_quantization_here(recipe: Recipe) -> None:
    """The same for this process as it was launched, and that the package is there."""
    check_quantization(recipe, has_gpu=torch.cuda.is_available(), zero_stage=read_launch().zero_stage)
    if recipe.model.get("quantization_config") is not None and find_spec("bitsandbytes") is None:
        raise InputError(
            "model.quantization_config needs bitsandbytes: pip install -c tests/constraints.txt -e '.[qlora]'"
        )


def load_model_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with the recipe's model, checked."""
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    return load_tokenizer(source.folder, revision=recipe.model.get("revision"))


def check_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Everything about the model that can be wrong, found from its config and a build without weights.

    Raises InputError for a model that is not there, a vocabulary smaller than the tokenizer's, an eos id that the
    tokenizer does not have, and LoRA targets that the architecture does not have.
    """
    check_quantization_here(recipe)
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    try:
        config = AutoConfig.from_pretrained(source.base, revision=recipe.model.get("revision"))
    except (OSError, ValueError) as error:
        raise InputError(f"no model could be loaded from {source.base!r}: {str(error).splitlines()[0]}") from error
    if config.vocab_size < len(tokenizer):
        raise InputError(
            f"the model has {config.vocab_size} embedding rows but the tokenizer {len(tokenizer)} ids: "
            f"{source.folder!r} holds the tokenizer of another model"
        )
    eos_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in eos_ids:
        raise InputError(
            f"config.json names eos id {config.eos_token_id}, the tokenizer {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token}): a model with the wrong eos never stops; set both to the same id"
        )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    if recipe.lora is not None:
        skeleton = add_adapter(skeleton, recipe.lora)
    logger.info("model: %s", describe(skeleton, source.base))
    return config


def check_attention(config: PretrainedConfig) -> None:
    """Raise InputError unless the sampler's attention and RLOO's, plain causal attention, are the model's own."""
    for key in ("sliding_window", "attention_chunk_size", "attn_logit_softcapping"):
        if getattr(config, key, None) is not None:
            raise InputError(
                f"the model's config.json has {key} {getattr(config, key)}: sampling and RLOO attend to every earlier "
                "token, as Llama does, and would run another model than this one"
            )


def check_trainable(recipe: Recipe, *, is_deepspeed: bool, bf16: bool) -> None:
    """Raise InputError for a start that cannot be trained as the recipe asks.

    bf16: whether the stage computes in bfloat16; DeepSpeed then keeps float32 copies of bfloat16 weights.
    """
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    if source.adapter:
        raise InputError(
            f"{source.folder!r} is an adapter on {source.base!r}; make one model of them: rekatrain export RUN OUT"
        )
    is_bfloat16 = recipe.model.get("dtype", "bfloat16") == "bfloat16"
    if is_deepspeed and is_bfloat16 and not bf16:
        raise InputError(
            "DeepSpeed trains bfloat16 weights, with float32 copies of them, in bfloat16 arithmetic alone: set "
            f"{recipe.stage}.bf16: true, or model.dtype to float32"
        )
    if recipe.lora is None and is_bfloat16 and not is_deepspeed:
        raise InputError(
            "full fine-tuning of bfloat16 weights rounds small updates away: set model.dtype to float32 "
            "(and bf16: true for bfloat16 arithmetic), launch with DeepSpeed, or add a lora: section"
        )


def add_adapter(
    model: Policy, lora: dict[str, Any], *, task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
) -> PeftModel:
    """Put a fresh LoRA adapter on the model; only the adapter is trained, and a classifier's head."""
    try:
        # An adapter of another type than the frozen weights breaks ZeRO-3's gathers (DeepSpeed issue 8072); under
        # DeepSpeed its float32 copy is the optimizer's.
        return get_peft_model(
            model,
            LoraConfig(task_type=task_type, **lora),
            autocast_adapter_dtype=not is_deepspeed_zero3_enabled(),
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"lora: {str(error).splitlines()[0]}") from error


def load_policy(recipe: Recipe) -> Policy:
    """The model to train: the recipe's weights, with a fresh adapter where the recipe has a `lora:` section."""
    model = load_model(**recipe.model)
    if recipe.lora is not None:
        return add_adapter(model, recipe.lora)
    return model


def describe(model: torch.nn.Module, name: str) -> str:
    """A model's size, and how much of it is trained."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{name}, {total:,} parameters, {trained:,} trained"
