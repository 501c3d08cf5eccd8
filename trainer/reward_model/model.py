"""A reward model: any model folder with one output in the place of its LM head."""

import logging
from typing import Any, Final, Literal

import torch
from peft import PeftModel
from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import load_classifier_tokenizer
from rekatrain.rewards.models.classifier import set_pad
from rekatrain.trainer.models import (
    Policy,
    add_adapter,
    check_quantization_here,
    describe,
    find_source,
    make_quantization,
)
from rekatrain.trainer.recipe.load import Recipe
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# peft then trains and saves the new head whole, whatever lora.target_modules names.
TASK_TYPE: Final = "SEQ_CLS"


def load_reward_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with the recipe's model, checked."""
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    return load_classifier_tokenizer(source.folder, revision=recipe.model.get("revision"))


def check_reward_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int:
    """Find what is wrong with the model from its config and a build without weights -> its context in tokens.

    Raises InputError for a model that is not there, one that has no sequence-classification form or several labels, a
    vocabulary smaller than the tokenizer's, and LoRA targets that the architecture does not have.
    """
    check_quantization_here(recipe)
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    try:
        config = AutoConfig.from_pretrained(source.base, revision=recipe.model.get("revision"), num_labels=1)
        with torch.device("meta"):
            skeleton = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise InputError(f"no reward model can be made of {source.base!r}: {str(error).splitlines()[0]}") from error
    text_config = config.get_text_config()
    if text_config.vocab_size < len(tokenizer):
        raise InputError(
            f"the model has {text_config.vocab_size} embedding rows but the tokenizer {len(tokenizer)} ids: "
            f"{source.folder!r} holds the tokenizer of another model"
        )
    if recipe.lora is not None:
        skeleton = add_adapter(skeleton, recipe.lora, task_type=TASK_TYPE)
    logger.info("reward model: %s", describe(skeleton, source.base))
    return int(text_config.max_position_embeddings)


def load_reward_model(
    tokenizer: PreTrainedTokenizerBase,
    pretrained_model_name_or_path: str,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    attn_implementation: str | None = None,
    quantization_config: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
) -> Policy:
    """Load a model to train (its head is random where the folder has none), an export or a run folder."""
    source = find_source(pretrained_model_name_or_path)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source.base,
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            quantization_config=make_quantization(quantization_config, dtype),
            num_labels=1,
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a head of another number of labels
        raise InputError(f"no weights could be loaded from {source.base!r}: {str(error).splitlines()[0]}") from error
    set_pad(model, tokenizer)
    if source.adapter:
        return PeftModel.from_pretrained(model, source.adapter)
    return add_adapter(model, lora, task_type=TASK_TYPE) if lora is not None else model
