"""`rekatrain export RUN OUT`: write a run's weights as a folder that servers load, and verify it.

    --as merged    safetensors, the adapter merged in float32: for transformers and vLLM; --quantize fp8, gptq or awq
                   quantizes them by llmcompressor
    --as adapter   the LoRA adapter alone: for PEFT, and for a vLLM server of the base model
    --as gguf      one file per type: for llama.cpp

Every form also holds a model card (README.md) and serving/ with start scripts and plugins. The folder is written as
.OUT.rekatrain-partial, loaded and compared by a fresh process, and only then renamed to OUT. No process holds a whole
model: tensors are read, merged, written and run one layer at a time (lazy_weights.py).
"""

import logging
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import Message, encode_prompt, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.families import bos_ids
from rekatrain.data.tokenizer import load_tokenizer
from rekatrain.trainer.export.average import check_checkpoint, last_checkpoints
from rekatrain.trainer.export.folders import write_adapter, write_merged
from rekatrain.trainer.export.gguf_type_names import TYPE_OF_DTYPE
from rekatrain.trainer.export.lazy_weights import LazyWeights, streaming
from rekatrain.trainer.export.probe import probe_logprobs, verify_in_fresh_process, verify_logprobs
from rekatrain.trainer.export.publish import publish, written_aside
from rekatrain.trainer.models.probe import PROBE_FILE, find_difference, read_probe, run_probe
from rekatrain.trainer.models.source import Source, find_source
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.run.folder import RECIPE_FILE

logger = logging.getLogger(__name__)

Form = Literal["merged", "adapter", "gguf"]
PROBE_MESSAGES: list[Message] = [{"role": "user", "content": "What is 2+2? Explain in one sentence why 1,234 is even."}]


def export(
    run: Path,
    out: Path,
    *,
    form: Form = "merged",
    dtype: str | None = None,
    quantize: list[str] | None = None,
    max_kl: float | None = None,
    max_shard_size: str = "5GB",
    average: int = 1,
) -> None:
    """Export the newest checkpoint of a run folder, or one checkpoint folder, in one form, and verify it.

    average:  number of checkpoints up to that one whose mean is exported
    dtype:    of merged weights; None means the recipe's. A LoRA adapter is merged in float32 first.
    quantize: types of GGUF files, None means the type of the dtype; or one method of llmcompressor for merged weights
    max_kl:   largest mean KL of a quantized export from training, in nats per token; None means the limit of its type
    """
    if run.is_symlink():  # checkpoints/best
        run = run.resolve()
    recipe_file = next((path for path in (run / RECIPE_FILE, run.parent.parent / RECIPE_FILE) if path.exists()), None)
    if recipe_file is None:
        raise InputError(
            f"{str(run)!r} is neither a run folder nor a checkpoint in one: it has no {RECIPE_FILE}; "
            "pass the output_dir of a run"
        )
    if out.exists():
        raise InputError(f"{str(out)!r} exists already; choose a new folder")
    recipe = load_recipe(recipe_file)
    stored_dtype = dtype or recipe.model.get("dtype", "bfloat16")
    if recipe.stage == "reward":
        _check_reward_model(form, quantize, max_kl)
    source = find_source(str(run))
    if Path(source.folder) == run:  # the newest one of a run is verified already
        check_checkpoint(run)
    if recipe.stage != "reward":
        _check(source, form, dtype, quantize, max_kl)
    averaged = last_checkpoints(Path(source.folder), average) if average > 1 else []
    if recipe.stage == "reward":
        from rekatrain.trainer.export.reward_model_folder import export_reward_model

        export_reward_model(
            source,
            out,
            recipe,
            run=recipe_file.parent,
            averaged=averaged,
            stored_dtype=stored_dtype,
            max_shard_size=max_shard_size,
        )
        return
    if form == "adapter" and average > 1:
        raise InputError(
            f"--average {average}: the mean of adapters is no adapter of their rank: export it as merged or gguf"
        )
    described = f"the weights are the mean of {', '.join(path.name for path in averaged)}" if averaged else None
    tokenizer = load_tokenizer(source.folder)
    template = files("rekatrain.data").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    # Servers add no bos token to a conversation: the template has it, where the model's family was trained with one.
    tokenizer.chat_template = ("{{- bos_token -}}" if bos_ids(tokenizer) else "") + template
    with written_aside(out) as partial:
        with TemporaryDirectory() as folder:
            checkpoint = Path(source.folder)
            if average > 1:
                checkpoint = Path(folder)
                average_module = "rekatrain.trainer.export.average"
                verify_in_fresh_process(average_module, checkpoint, *map(str, averaged))
            weights = LazyWeights(source)
            if average > 1:
                weights = weights.averaged([LazyWeights(find_source(str(path))) for path in averaged[:-1]])
            if form == "merged" and quantize:
                from rekatrain.trainer.export.compressed import calibration_rows, group_size

                rows, group = [], 0
                if quantize != ["fp8"]:
                    group = group_size(weights.model)
                    rows = calibration_rows(recipe, recipe_file.parent, tokenizer)
            _check_training(weights, checkpoint)
            if form == "merged" and quantize:
                quantized = _write_compressed(
                    partial, weights, checkpoint, tokenizer, stored_dtype, quantize[0], rows, group, max_kl
                )
                described = "; ".join(filter(None, (described, quantized)))
            else:
                _write(
                    partial,
                    form,
                    source,
                    weights,
                    checkpoint,
                    tokenizer,
                    stored_dtype,
                    quantize,
                    max_kl,
                    max_shard_size,
                )
        publish(partial, out, form, recipe, recipe_file.parent, source, evaluation=described)


def _write(
    folder: Path,
    form: Form,
    source: Source,
    weights: LazyWeights,
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerBase,
    stored_dtype: str,
    quantize: list[str] | None,
    max_kl: float | None,
    max_shard_size: str,
) -> None:
    """Write the weights into `folder` and verify them in a fresh process.

    checkpoint: folder with the log-probabilities of training
    """
    probe = torch.tensor([encode_prompt(render_prompt(PROBE_MESSAGES), tokenizer)])
    stored = weights.rounded(torch.float32 if form == "adapter" else getattr(torch, stored_dtype))
    with streaming(stored) as model:
        logprobs = probe_logprobs(model, probe)
    if form == "adapter":
        write_adapter(folder, source, weights.model.config, tokenizer)
    elif form == "merged":
        write_merged(folder, stored, tokenizer, max_shard_size=max_shard_size)
    else:
        from rekatrain.trainer.export.gguf_files import write_gguf_files

        types = quantize or [TYPE_OF_DTYPE[stored_dtype]]
        write_gguf_files(folder, stored, tokenizer, types, probe, logprobs, checkpoint, max_kl)
        return
    verify_logprobs(folder, probe, logprobs, checkpoint=checkpoint)


def _write_compressed(
    folder: Path,
    weights: LazyWeights,
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerBase,
    stored_dtype: str,
    kind: str,
    rows: list[list[int]],
    group: int,
    max_kl: float | None,
) -> str:
    """Write and verify merged weights beside `folder`, quantize them into it, and return a phrase for the card."""
    from rekatrain.trainer.export.compressed import compress, verify_compressed

    probe = torch.tensor([encode_prompt(render_prompt(PROBE_MESSAGES), tokenizer)])
    stored = weights.rounded(getattr(torch, stored_dtype))
    training = read_probe(checkpoint)
    texts = [probe[0]] if training is None else training.ids
    with streaming(stored) as model:
        logprobs = probe_logprobs(model, probe)
        references = [probe_logprobs(model, text[None]) for text in texts]
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as work:
        whole = Path(work) / "whole"
        write_merged(whole, stored, tokenizer, max_shard_size="5GB")
        verify_logprobs(whole, probe, logprobs, checkpoint=checkpoint)
        compress(whole, folder, kind, rows, group)
    kl = verify_compressed(folder, kind, texts, references, max_kl)
    return f"quantized by llmcompressor ({kind}), a mean KL of {kl:.2g} nats per token from the training process"


def _check(source: Source, form: Form, dtype: str | None, quantize: list[str] | None, max_kl: float | None) -> None:
    """Raise InputError, before a weight is loaded, for options that the form does not have."""
    if form == "adapter" and source.adapter is None:
        raise InputError("--as adapter: the run trained all weights, so there is no adapter; export it as merged")
    if form == "adapter" and dtype is not None:
        raise InputError(f"--dtype {dtype} applies to merged weights; an adapter stays in float32, as it was trained")
    if form == "merged" and quantize is not None:
        from rekatrain.trainer.export.compressed import check_compressible

        check_compressible(quantize)
    if form == "adapter" and quantize is not None:
        raise InputError("--quantize applies to GGUF files and merged weights; --as adapter writes neither")
    if max_kl is not None and quantize is None:
        raise InputError(f"--max-kl {max_kl:g} is the limit of a quantized export: add --quantize, or leave it out")
    if form == "gguf":
        from rekatrain.trainer.export.gguf_files import check_convertible

        check_convertible(source, quantize or [])


def _check_reward_model(form: Form, quantize: list[str] | None, max_kl: float | None) -> None:
    """Raise InputError for options that the export of a reward model does not have."""
    if form != "merged":
        raise InputError(f"--as {form}: a reward model is exported as merged only")
    for name, value in (("--quantize", quantize), ("--max-kl", max_kl)):
        if value is not None:
            raise InputError(f"{name} applies to quantized language models, and this is a reward model: leave it out")


def _check_training(weights: LazyWeights, checkpoint: Path) -> None:
    """Raise InputError if the loaded model is another than the one in training: such as one on a changed base."""
    probe = read_probe(checkpoint)
    if probe is None:
        logger.warning(
            "%s has no %s: the export is compared with its own files, not with training", checkpoint, PROBE_FILE
        )
        return
    with streaming(weights) as model:
        difference = find_difference(probe, run_probe(model, [ids.tolist() for ids in probe.ids]))
    if difference:
        raise InputError(
            f"{str(checkpoint)!r}, as it is loaded here, is not the model that was trained: {difference}. Restore the "
            "files of its base model"
        )
