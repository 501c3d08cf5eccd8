"""`rekatrain export RUN OUT`: a run's weights as a folder that transformers and vLLM serve, and proof that it loads.

OUT holds sharded safetensors, the tokenizer with our chat template, and a generation config that stops at `<sep>`.
"""

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.chat import STOP, Message, encode_text, render_prompt
from data.errors import InputError
from data.tokenizer import load_tokenizer
from trainer.models import find_source, load_model
from trainer.recipe import load_recipe
from trainer.run_folder import RECIPE_FILE
from trainer.verify_export import probe_logprobs

logger = logging.getLogger(__name__)

# Merging is W + B A in float32; anything beyond rounding is a wrong merge.
MERGE_TOLERANCE = 1e-3
PROBE_MESSAGES: list[Message] = [{"role": "user", "content": "What is 2+2? Explain in one sentence why 1,234 is even."}]


def export(run: Path, out: Path, *, dtype: str | None = None, max_shard_size: str = "5GB") -> None:
    """Write the newest checkpoint of a run, or the checkpoint folder given, as a model folder, and verify it.

    dtype: of the stored weights; None is the recipe's. A LoRA adapter is merged in float32 first.
    """
    recipe_file = next((path for path in (run / RECIPE_FILE, run.parent.parent / RECIPE_FILE) if path.exists()), None)
    if recipe_file is None:
        raise InputError(f"{str(run)!r} is neither a run folder nor a checkpoint in one: it has no {RECIPE_FILE}")
    if out.exists():
        raise InputError(f"{str(out)!r} exists already; choose a new folder")
    recipe = load_recipe(recipe_file)
    stored_dtype = dtype or recipe.model.get("dtype", "bfloat16")
    if recipe.stage == "reward":
        from trainer.reward_model.export import export_reward_model

        export_reward_model(run, out, recipe, stored_dtype=stored_dtype, max_shard_size=max_shard_size)
        return
    source = find_source(str(run))
    tokenizer = load_tokenizer(source.folder)
    tokenizer.chat_template = files("data").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    probe = torch.tensor([encode_text(render_prompt(PROBE_MESSAGES), tokenizer)])

    model = _merged(load_model(str(run), dtype="float32"), probe).to(getattr(torch, stored_dtype))
    model.config.pad_token_id = tokenizer.pad_token_id  # TRL's trainer notes one in the config where there is none
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=tokenizer.eos_token_id, stop_strings=[STOP]
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    _save_tokenizer(tokenizer, partial)
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which a server under another user cannot read
    _verify(partial, model, probe)
    partial.rename(out)
    logger.info("exported %s to %s (%s)", source.folder, out, stored_dtype)


def _merged(model: PreTrainedModel | PeftModel, probe: Tensor) -> PreTrainedModel:
    """The model with its adapter merged in; asserts that merging moved no log-probability."""
    if not isinstance(model, PeftModel):
        return model.eval()
    apart = probe_logprobs(model.eval(), probe)
    merged = model.merge_and_unload(safe_merge=True)
    error = (probe_logprobs(merged, probe) - apart).abs().max().item()
    assert error < MERGE_TOLERANCE, f"merging the adapter moved a log-probability by {error}"
    return merged


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # The class name under which transformers 4 and 5, and the servers built on either, load tokenizer.json as it is.
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def _verify(folder: Path, model: PreTrainedModel, probe: Tensor) -> None:
    """Have another process load the folder and compare; what is in memory here proves nothing about the files."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as reference:
        save_file({"ids": probe, "logprobs": probe_logprobs(model, probe)}, reference.name)
        command = [sys.executable, "-m", "trainer.verify_export", str(folder), reference.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the export in {folder} failed its verification:\n{done.stderr.strip()}")
    logger.info(done.stdout.strip())
