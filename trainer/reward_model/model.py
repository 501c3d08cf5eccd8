"""A reward model: any model folder, with one output instead of its LM head."""

import logging
from typing import Any, Final, Literal

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import load_classifier_tokenizer
from rekatrain.rewards.models.classifier import set_pad
from rekatrain.trainer.models.config import build_skeleton, check_context
from rekatrain.trainer.models.load import Policy, add_adapter, describe
from rekatrain.trainer.models.lora_targets import check_new_parts, check_quantized_targets, check_targets
from rekatrain.trainer.models.optimizers import check_matrices
from rekatrain.trainer.models.quantization import check_quantization_here, make_quantization
from rekatrain.trainer.models.source import base_revision, commit_of, find_source
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
from rekatrain.trainer.recipe.optimizers import MUON, optim_of

logger = logging.getLogger(__name__)

# With this task type PEFT also trains and saves the whole new head, independent of lora.target_modules.
TASK_TYPE: Final = "SEQ_CLS"


def load_reward_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load and check the tokenizer in the folder of the recipe's model."""
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    return load_classifier_tokenizer(source.folder, revision=recipe.model.get("revision"))


def check_reward_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, may_lack_head: bool = True) -> int:
    """Check the model by its config and a build without weights; return its context length in tokens.

    Raise InputError for a missing model, one that has no sequence-classification form, tensors that are not those of
    its config, a vocabulary smaller than the tokenizer's, and LoRA targets that the architecture does not have.

    may_lack_head: False for a model that is not trained first; an adapter brings its head
    """
    check_quantization_here(recipe)
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    revision = base_revision(source, recipe.model.get("revision"))
    with readable(source.base):
        config = AutoConfig.from_pretrained(source.base, revision=revision, num_labels=1)
    check_context(source.base, config)
    implementation = recipe.model.get("attn_implementation")
    skeleton = build_skeleton(
        source.base,
        config,
        AutoModelForSequenceClassification,
        **({"attn_implementation": implementation} if implementation else {}),
    )
    text_config = config.get_text_config()
    if text_config.vocab_size < len(tokenizer):
        raise InputError(
            f"the model has embeddings for {text_config.vocab_size} ids but the tokenizer has {len(tokenizer)}: "
            f"{source.folder!r} holds the tokenizer of another model"
        )
    new = check_tensors(source, revision, skeleton, may_lack_head=may_lack_head or source.adapter is not None)
    classifier: Policy = skeleton
    if recipe.lora is not None:
        classifier = adapted = add_adapter(skeleton, recipe.lora, task_type=TASK_TYPE)
        check_targets(adapted, recipe.lora)
        check_new_parts(new, adapted)
        if recipe.model.get("quantization_config") is not None:
            check_quantized_targets(adapted)
    if optim_of(recipe) == MUON:
        check_matrices(classifier)
    logger.info("reward model: %s", describe(classifier, source.base))
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
    base = base_revision(source, revision)
    folder = local_folder(source.base, base)
    if folder is not None:
        check_weight_files(folder)
    with quiet_transformers(), readable(source.base):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source.base,
            revision=base,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            quantization_config=make_quantization(quantization_config, dtype),
            num_labels=1,
            output_loading_info=True,
        )
    check_report(source.base, model, report, may_lack_head=True)
    set_pad(model, tokenizer)
    check_finite(model, source.base)
    if source.adapter:
        adapted = load_adapter(model, source.adapter)
        check_finite(adapted, source.adapter)
        return adapted
    if lora is None:
        return model
    adapted = add_adapter(model, lora, task_type=TASK_TYPE, revision=commit_of(source.base, revision))
    check_new_parts(report["missing_keys"], adapted)
    return adapted
