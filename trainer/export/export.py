"""`rekatrain export RUN OUT`: a run's weights as a folder that serves, and proof that it loads.

    --as merged    safetensors, adapter merged in float32: transformers and vLLM
    --as adapter   the LoRA adapter alone, for PEFT and for a vLLM that serves the base
    --as gguf      one file a type: llama.cpp

Whatever the form, OUT also holds the model card (README.md) and the start lines and plugins of serving/. It is written
beside its place, loaded by another process and compared, and only then takes its name.
"""

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from rekatrain.data.chat import Message, encode_text, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import load_tokenizer
from rekatrain.trainer.export.folders import write_adapter, write_merged
from rekatrain.trainer.export.probe import probe_logprobs, prove
from rekatrain.trainer.export.publish import publish
from rekatrain.trainer.models import Source, find_source, load_model
from rekatrain.trainer.recipe.load import Recipe, load_recipe
from rekatrain.trainer.run_folder import RECIPE_FILE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Form = Literal["merged", "adapter", "gguf"]
# GGUF's names of the dtypes.
GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16"}
# Merging is W + B A in float32; anything beyond rounding is a wrong merge.
MERGE_TOLERANCE = 1e-3
PROBE_MESSAGES: list[Message] = [{"role": "user", "content": "What is 2+2? Explain in one sentence why 1,234 is even."}]


def export(
    run: Path,
    out: Path,
    *,
    form: Form = "merged",
    dtype: str | None = None,
    quantize: list[str] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write the newest checkpoint of a run, or the checkpoint folder given, in one form, and verify it.

    dtype:    of merged weights; None is the recipe's. A LoRA adapter is merged in float32 first.
    quantize: types of GGUF files; None is the dtype's own
    """
    recipe_file = next((path for path in (run / RECIPE_FILE, run.parent.parent / RECIPE_FILE) if path.exists()), None)
    if recipe_file is None:
        raise InputError(f"{str(run)!r} is neither a run folder nor a checkpoint in one: it has no {RECIPE_FILE}")
    if out.exists():
        raise InputError(f"{str(out)!r} exists already; choose a new folder")
    recipe = load_recipe(recipe_file)
    stored_dtype = dtype or recipe.model.get("dtype", "bfloat16")
    if recipe.stage == "reward":
        from rekatrain.trainer.reward_model.export_model import export_reward_model

        if form != "merged":
            raise InputError(f"--as {form}: a reward model is exported as merged only")
        if quantize is not None:
            raise InputError("--quantize makes GGUF files; a reward model has none")
        export_reward_model(
            find_source(str(run)),
            out,
            recipe,
            run=recipe_file.parent,
            stored_dtype=stored_dtype,
            max_shard_size=max_shard_size,
        )
        return
    source = find_source(str(run))
    _check(source, form, dtype, quantize)
    tokenizer = load_tokenizer(source.folder)
    tokenizer.chat_template = files("rekatrain.data").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write(partial, form, source, recipe, tokenizer, stored_dtype, quantize, max_shard_size)
    publish(partial, out, form, recipe, recipe_file.parent, source)


def _write(
    folder: Path,
    form: Form,
    source: Source,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    stored_dtype: str,
    quantize: list[str] | None,
    max_shard_size: str,
) -> None:
    """Write the weights and have another process load and compare them."""
    probe = torch.tensor([encode_text(render_prompt(PROBE_MESSAGES), tokenizer)])
    model = load_model(source.folder, dtype="float32").eval()
    if form == "adapter":
        write_adapter(folder, source, model, tokenizer)
        prove(folder, probe, probe_logprobs(model, probe))
        return
    merged = _merged(model, probe).to(getattr(torch, stored_dtype))
    logprobs = probe_logprobs(merged, probe)
    if form == "merged":
        write_merged(folder, merged, tokenizer, max_shard_size=max_shard_size)
        prove(folder, probe, logprobs)
    else:
        from rekatrain.trainer.export.gguf_files import write_gguf_files

        write_gguf_files(folder, merged, tokenizer, quantize or [GGUF_TYPES[stored_dtype]], probe, logprobs)


def _check(source: Source, form: Form, dtype: str | None, quantize: list[str] | None) -> None:
    """Refuse, before a weight is loaded, what the form cannot hold."""
    if form == "adapter" and source.adapter is None:
        raise InputError("--as adapter: the run trained all weights, so there is no adapter; export it as merged")
    if form == "adapter" and dtype is not None:
        raise InputError("--dtype is of merged weights; an adapter keeps the float32 that it was trained in")
    if form != "gguf" and quantize is not None:
        raise InputError(f"--quantize makes GGUF files; with --as {form} there are none, write --as gguf")
    if form == "gguf":
        from rekatrain.trainer.export.gguf_files import check_convertible

        check_convertible(source, quantize or [])


def _merged(model: PreTrainedModel | PeftModel, probe: Tensor) -> PreTrainedModel:
    """The model with its adapter merged in; asserts that merging moved no log-probability."""
    if not isinstance(model, PeftModel):
        return model
    apart = probe_logprobs(model, probe)
    merged = model.merge_and_unload(safe_merge=True)
    error = (probe_logprobs(merged, probe) - apart).abs().max().item()
    assert error < MERGE_TOLERANCE, f"merging the adapter moved a log-probability by {error}"
    return merged
