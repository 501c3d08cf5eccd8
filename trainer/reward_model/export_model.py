"""A reward run's weights as a folder that `reward_model`, transformers and vLLM load, and proof that it scores alike.

OUT holds sharded safetensors, the tokenizer with a pad token, the frozen scale of the scores in reward_model.json, the
model card and serving/.
"""

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers.processors import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rekatrain.data.chat import render_completion, render_prompt
from rekatrain.data.reward_model_input import RewardModelInput, encode_reward_model_input
from rekatrain.data.tokenizer import is_encoder, load_classifier_tokenizer
from rekatrain.rewards.models.classifier import RewardModelCard, classify, context_of
from rekatrain.trainer.export.folders import save_tokenizer
from rekatrain.trainer.export.publish import publish
from rekatrain.trainer.models import Source
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.reward_model.evaluate_pairs import MICRO_BATCH_TOKENS, describe_evaluation, evaluate_pairs
from rekatrain.trainer.reward_model.model import load_reward_model
from rekatrain.trainer.reward_model.pairs import leave_out_trained, load_pairs

logger = logging.getLogger(__name__)

NUM_SCALE_PAIRS = 256
PROBES = [("What is 2+2?", "4"), ("What is 2+2?", ""), ("Say hello.\nBe brief.", "Hello, <b>you</b> | 1,234!")]


def export_reward_model(
    source: Source, out: Path, recipe: Recipe, *, run: Path, stored_dtype: str, max_shard_size: str
) -> None:
    """Write a checkpoint of a run as a classifier's folder, and verify it.

    The scale is that of the first 256 held-out pairs, of training pairs where the recipe holds none out.
    """
    tokenizer = load_classifier_tokenizer(source.folder)
    model = _merged(source, tokenizer).to(getattr(torch, stored_dtype))
    if tokenizer.pad_token is None:  # a classifier reads batches; transformers refuses them without
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.get_text_config().pad_token_id)
    if not is_encoder(tokenizer):  # it was trained without a BOS, which servers would add where the tokenizer does
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)

    # One number on a scale of its own: without this, servers and pipelines give its sigmoid.
    model.config.problem_type = "regression"

    context = context_of(model)
    pairs = load_pairs(recipe.dataset, tokenizer, recipe.chat, max_length=context)
    measured_on = "training pairs"
    if recipe.eval_dataset is not None:
        held_out = load_pairs(recipe.eval_dataset, tokenizer, recipe.chat, max_length=context, name="eval_dataset")
        pairs, measured_on = leave_out_trained(held_out, pairs), "held-out pairs"
    pairs = pairs[:NUM_SCALE_PAIRS]
    evaluation = evaluate_pairs(model, pairs)
    measured = describe_evaluation(evaluation, measured_on)
    print(f"{source.folder}: {measured}")

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, partial)
    RewardModelCard(
        template="reka",
        reasoning=bool(recipe.chat.get("reasoning", False)),
        mean=evaluation.mean,
        std=evaluation.std,
        measured_on=f"both answers of {len(pairs)} {measured_on}",
    ).save(partial)
    _verify(partial, model, tokenizer, stored_dtype)
    publish(partial, out, "reward", recipe, run, source, evaluation=measured)


def _merged(source: Source, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model = load_reward_model(tokenizer, source.folder, dtype="float32").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model


def _verify(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, dtype: str) -> None:
    """Have another process score probes by the reward that users name: memory here proves nothing about the files."""
    judged = [
        RewardModelInput(prompt=[{"role": "user", "content": question}], answer=answer) for question, answer in PROBES
    ]
    rows = [encode_reward_model_input(one, tokenizer, "reka", max_length=context_of(model)) for one in judged]
    reference = {
        "prompts": [render_prompt(one.prompt) for one in judged],
        "completions": [render_completion(None, one.answer) for one in judged],
        "scores": classify(model, rows, micro_batch_tokens=MICRO_BATCH_TOKENS)[:, 0].tolist(),
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(reference, file)
        file.flush()
        command = [sys.executable, "-m", "rekatrain.trainer.reward_model.verify_export", str(folder), dtype, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the export in {folder} failed its verification:\n{done.stderr.strip()}")
    logger.info(done.stdout.strip())
