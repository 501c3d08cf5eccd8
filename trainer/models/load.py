"""Model loading: the checks before a weight is read, and the reading itself."""

import logging
import re
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import load_tokenizer
from rekatrain.trainer.models.config import build_skeleton, check_config
from rekatrain.trainer.models.float32_weights import load_in_float32, train_in_float32
from rekatrain.trainer.models.lora_targets import check_head, check_quantized_targets, check_targets
from rekatrain.trainer.models.optimizers import check_matrices, check_optim_here
from rekatrain.trainer.models.quantization import check_quantization_here, make_quantization
from rekatrain.trainer.models.source import base_revision, commit_of, find_source, read_adapter_config
from rekatrain.trainer.models.tied_weights import check_tied_model
from rekatrain.trainer.models.weight_files import check_weight_files, local_folder
from rekatrain.trainer.models.weights import (
    check_finite,
    check_report,
    check_tensors,
    load_adapter,
    quiet_transformers,
    readable,
)
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.lora_keys import LORA_OWN
from rekatrain.trainer.recipe.optimizers import MUON, optim_of

logger = logging.getLogger(__name__)

Policy = PreTrainedModel | PeftModel
# transformers also loads kernels of the hub by their name: code, which is never fetched here.
AttnImplementation = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


def load_model(
    pretrained_model_name_or_path: str,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    attn_implementation: AttnImplementation | None = None,
    quantization_config: dict[str, Any] | None = None,
) -> Policy:
    """Load a causal language model from a folder, the hub, an adapter folder or a run folder; the recipe's `model:`.

    quantization_config: keywords of `transformers.BitsAndBytesConfig`, for QLoRA
    """
    source = find_source(pretrained_model_name_or_path)
    base = base_revision(source, revision)
    folder = local_folder(source.base, base)
    if folder is not None:
        check_weight_files(folder)
    with quiet_transformers(), readable(source.base):
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # with the report, a pair
            source.base,
            revision=base,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            quantization_config=make_quantization(quantization_config, dtype),
            output_loading_info=True,
        )
    model, report = loaded
    check_report(source.base, model, report)
    check_tied_model(source.base, model)
    policy = load_adapter(model, source.adapter) if source.adapter else model
    check_finite(policy, pretrained_model_name_or_path)
    return policy


def load_model_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load and check the tokenizer of the recipe's model."""
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    return load_tokenizer(source.folder, revision=recipe.model.get("revision"))


def check_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Check the model from its config and from a build without weights, and return its config.

    Raises InputError for a model that does not exist, tensors that are not those of its config, a vocabulary smaller
    than the tokenizer's, an eos id other than the tokenizer's, and LoRA targets that the architecture does not have.
    """
    check_quantization_here(recipe)
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    revision = base_revision(source, recipe.model.get("revision"))
    with readable(source.base):
        config = AutoConfig.from_pretrained(source.base, revision=revision)
    check_config(source.base, config)
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
    # `flash_attention_2` needs a package and a GPU: transformers looks for them as it builds the model.
    implementation = recipe.model.get("attn_implementation")
    skeleton = build_skeleton(
        source.base, config, AutoModelForCausalLM, **({"attn_implementation": implementation} if implementation else {})
    )
    check_tensors(source, revision, skeleton)
    policy: Policy = skeleton
    if recipe.lora is not None:
        policy = adapted = add_adapter(skeleton, recipe.lora)
        check_targets(adapted, recipe.lora)
        if recipe.model.get("quantization_config") is not None:
            check_quantized_targets(adapted)
    if optim_of(recipe) == MUON:
        check_matrices(policy)
    logger.info("model: %s", describe(policy, source.base))
    return config


def check_trainable(recipe: Recipe, *, is_deepspeed: bool, bf16: bool) -> None:
    """Raise InputError if the recipe's model cannot be trained as the recipe and the launch say, by its optimizer.

    bf16: True if the stage computes in bfloat16; DeepSpeed then keeps float32 copies of bfloat16 weights
    """
    check_optim_here(recipe, is_deepspeed=is_deepspeed)
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
    model: Policy,
    lora: dict[str, Any],
    *,
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM",
    revision: str | None = None,
) -> PeftModel:
    """Put a new LoRA adapter on the model; only the adapter and a classifier's head are trained.

    revision: commit of the model on the hub, which the adapter's config names; an export merges onto that commit
    """
    if task_type == "SEQ_CLS":
        check_head(model, lora)
    try:
        with warnings.catch_warnings():
            # Of names that match nothing, and of tied weights: both are errors of check_targets.
            warnings.simplefilter("ignore")
            adapted = get_peft_model(
                model,
                # A copy: PEFT adds a classifier's head to the list in modules_to_save.
                LoraConfig(task_type=task_type, **{key: deepcopy(lora[key]) for key in lora if key not in LORA_OWN}),
                autocast_adapter_dtype=_keeps_float32(),
                revision=revision,
            )
    except (ValueError, TypeError) as error:
        raise InputError(f"lora: {_reason(error)}") from error
    config = adapted.peft_config["default"]
    for key in ("target_modules", "exclude_modules"):
        names = getattr(config, key)
        if isinstance(names, set):  # PEFT would save them in an order that differs between processes
            setattr(config, key, sorted(names))
    if _keeps_float32():
        train_in_float32(adapted)
    return adapted


def _keeps_float32() -> bool:
    """Return False if the optimizer alone has float32 copies of the trained weights of a bfloat16 model.

    Another dtype than that of the frozen weights breaks ZeRO-3's gathers (DeepSpeed issue 8072). At stages 1 and 2
    DeepSpeed makes all weights bfloat16 itself.
    """
    return not is_deepspeed_zero3_enabled()


def _reason(error: Exception) -> str:
    """Return the first line of PEFT's message; where it shows a module on many lines, the class of that module."""
    first = str(error).splitlines()[0]
    shown = re.match(r"Target module (\w+)\(", first)
    if shown is None:
        return first
    return f"target_modules includes a {shown[1]}, and LoRA adapts Linear and Embedding layers alone: name those"


def load_policy(recipe: Recipe) -> Policy:
    """Load the model to train: the recipe's weights, with a new adapter if the recipe has a `lora:` section.

    If the model is an adapter itself, it is that adapter that is trained.
    """
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    if source.adapter is not None:
        revision = base_revision(source, recipe.model.get("revision"))
        base = load_model(**recipe.model | {"pretrained_model_name_or_path": source.base, "revision": revision})
        config = read_adapter_config(Path(source.adapter))
        config.lora_dropout = (recipe.lora or {}).get("lora_dropout", 0.0)
        keeps_float32 = _keeps_float32()
        policy = load_adapter(
            base, source.adapter, is_trainable=True, config=config, autocast_adapter_dtype=keeps_float32
        )
        if keeps_float32 and train_in_float32(policy):
            load_in_float32(policy, source.adapter)
        check_finite(policy, source.adapter)
        return policy
    model = load_model(**recipe.model)
    if recipe.lora is not None:
        base = recipe.model["pretrained_model_name_or_path"]
        return add_adapter(model, recipe.lora, revision=commit_of(base, recipe.model.get("revision")))
    return model


def describe(model: torch.nn.Module, name: str) -> str:
    """Return one line with the name of the model and its numbers of parameters, all and trained."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{name}, {total:,} parameters, {trained:,} trained"
