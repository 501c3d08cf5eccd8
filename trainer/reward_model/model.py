"""A reward model: any model folder, with one output instead of its LM head."""

import logging
from typing import Any, Final, Literal

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import load_classifier_tokenizer
from rekatrain.rewards.models.classifier import set_pad
from rekatrain.trainer.model_source import find_source
from rekatrain.trainer.models import Policy, add_adapter, describe
from rekatrain.trainer.quantization import check_quantization_here, make_quantization
from rekatrain.trainer.recipe.load import Recipe

logger = logging.getLogger(__name__)

# With this task type PEFT also trains and saves the whole new head, independent of lora.target_modules.
TASK_TYPE: Final = "SEQ_CLS"


def load_reward_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load and check the tokenizer in the folder of the recipe's model."""
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    return load_classifier_tokenizer(source.folder, revision=recipe.model.get("revision"))


def check_reward_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int:
    """Check the model by its config and a build without weights; return its context length in tokens.

    Raise InputError for a missing model, one that has no sequence-classification form, a vocabulary smaller than the
    tokenizer's, and LoRA targets that the architecture does not have.
    """
    check_quantization_here(recipe)
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    try:
        config = AutoConfig.from_pretrained(source.base, revision=recipe.model.get("revision"), num_labels=1)
        with torch.device("meta"):
            skeleton = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise InputError(f"{source.base!r} cannot be made a reward model: {str(error).splitlines()[0]}") from error
    text_config = config.get_text_config()
    if text_config.vocab_size < len(tokenizer):
        raise InputError(
            f"the model has embeddings for {text_config.vocab_size} ids but the tokenizer has {len(tokenizer)}: "
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
    """Load a model to train, an export or a run folder; the head is random if the folder has none."""
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
