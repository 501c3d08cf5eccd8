"""A reward run's weights as a folder that the reward `reward_model`, transformers and vLLM load.

OUT holds sharded safetensors, the tokenizer with a pad token, the frozen scale of the scores in reward_model.json, the
model card and serving/. A fresh process scores a few answers with it before it gets its name. No process holds the
whole model: layers are read, merged, written and run one at a time (lazy_weights.py).
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import ByteLevel
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from rekatrain.data.chat import render_completion, render_prompt
from rekatrain.data.reward_model_input import RewardModelInput, encode_reward_model_input
from rekatrain.data.tokenizer import is_encoder, load_classifier_tokenizer
from rekatrain.rewards.models.classifier import RewardModelCard, classify, context_of, set_pad
from rekatrain.trainer.export.folders import save_tokenizer, write_model
from rekatrain.trainer.export.lazy_weights import LazyWeights, streaming
from rekatrain.trainer.export.probe import verify_in_fresh_process
from rekatrain.trainer.export.publish import publish, written_aside
from rekatrain.trainer.models.source import Source, find_source
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.reward_model.evaluate_pairs import evaluate_pairs
from rekatrain.trainer.reward_model.measures import describe_evaluation
from rekatrain.trainer.reward_model.pairs import leave_out_trained, load_pairs
from rekatrain.trainer.reward_model.score_probe import check_scores

logger = logging.getLogger(__name__)

NUM_SCALE_PAIRS = 256
# Tokens of one forward. Each forward reads all layers from the files, so it is larger than for weights in memory.
STREAMED_TOKENS = 16_384
PROBES = [("What is 2+2?", "4"), ("What is 2+2?", ""), ("Say hello.\nBe brief.", "Hello, <b>you</b> | 1,234!")]


def export_reward_model(
    source: Source,
    out: Path,
    recipe: Recipe,
    *,
    run: Path,
    averaged: Sequence[Path] = (),
    stored_dtype: str,
    max_shard_size: str,
) -> None:
    """Write a checkpoint of a reward run as a classifier's folder, and verify it.

    The scale is measured on the first 256 held-out pairs, or on training pairs if the recipe has no eval_dataset.

    averaged: checkpoints whose mean is exported, the last one that of `source`; empty for one checkpoint
    """
    tokenizer = load_classifier_tokenizer(source.folder)
    weights = _open(source)
    if averaged:
        weights = weights.averaged([_open(find_source(str(path))) for path in averaged[:-1]])
    model = weights.model
    set_pad(model, tokenizer)
    _check_training(weights, recipe, source, averaged)
    stored = weights.rounded(getattr(torch, stored_dtype))
    if tokenizer.pad_token is None:  # a classifier reads batches, which transformers rejects without a pad token
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.get_text_config().pad_token_id)
    if not is_encoder(tokenizer):  # the model was trained without a BOS, which servers add if the tokenizer does
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)

    # The score has no fixed range. Without this, servers and pipelines return its sigmoid.
    model.config.problem_type = "regression"

    context = context_of(model)
    pairs = load_pairs(recipe.dataset, tokenizer, recipe.chat, max_length=context)
    measured_on = "training pairs"
    if recipe.eval_dataset is not None:
        held_out = load_pairs(recipe.eval_dataset, tokenizer, recipe.chat, max_length=context, name="eval_dataset")
        pairs, measured_on = leave_out_trained(held_out, pairs), "held-out pairs"
    pairs = pairs[:NUM_SCALE_PAIRS]
    with streaming(stored, _device()):
        evaluation = evaluate_pairs(model, pairs, micro_batch_tokens=STREAMED_TOKENS)
        reference = _score_probes(model, tokenizer)
    description = describe_evaluation(evaluation, measured_on)
    if averaged:
        description += f"; the weights are the mean of {', '.join(path.name for path in averaged)}"
    print(f"{source.folder}: {description}")

    card = RewardModelCard(
        template="reka",
        reasoning=bool(recipe.chat.get("reasoning", False)),
        mean=evaluation.mean,
        std=evaluation.std,
        measured_on=f"both answers of {len(pairs)} {measured_on}",
    )
    with written_aside(out) as partial:
        write_model(partial, stored, max_shard_size=max_shard_size)
        save_tokenizer(tokenizer, partial)
        card.save(partial)
        _verify(partial, reference)
        publish(partial, out, "reward", recipe, run, source, evaluation=description)


def _open(source: Source) -> LazyWeights:
    return LazyWeights(source, auto_class=AutoModelForSequenceClassification, num_labels=1)


def _check_training(weights: LazyWeights, recipe: Recipe, source: Source, averaged: Sequence[Path]) -> None:
    """Raise InputError if the loaded model is another than the one in training, or than the mean of checkpoints."""
    trained, error = getattr(torch, recipe.model.get("dtype", "bfloat16")), None
    if averaged:
        with tempfile.TemporaryDirectory() as folder:
            verify_in_fresh_process("rekatrain.trainer.export.average", Path(folder), *map(str, averaged))
            with streaming(weights, _device()) as model:
                error = check_scores(model, Path(folder), torch.float32)
    elif recipe.model.get("quantization_config") is None:  # QLoRA trains on another base than is exported
        with streaming(weights, _device()) as model:
            error = check_scores(model, Path(source.folder), trained)
    if error is not None:
        by = "a separate mean" if averaged else "the training process"
        logger.info("scores within %.1e of %s", error, by)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _score_probes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return prompts, completions and the scores of the exporting process, for the verification."""
    inputs = [
        RewardModelInput(prompt=[{"role": "user", "content": question}], answer=answer) for question, answer in PROBES
    ]
    encoded = [encode_reward_model_input(probe, tokenizer, "reka", max_length=context_of(model)) for probe in inputs]
    return {
        "prompts": [render_prompt(probe.prompt) for probe in inputs],
        "completions": [render_completion(None, probe.answer) for probe in inputs],
        "scores": classify(model, encoded, micro_batch_tokens=STREAMED_TOKENS)[:, 0].tolist(),
    }


def _verify(folder: Path, reference: dict[str, Any]) -> None:
    """Verify that the reward `reward_model` gives the same scores from `folder`, in a fresh process."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(reference, file)
        file.flush()
        verify_in_fresh_process("rekatrain.trainer.export.verify_reward_model", folder, file.name)
