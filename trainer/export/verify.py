"""Verify a merged model or an adapter: `python -m rekatrain.trainer.export.verify FOLDER REFERENCE CHECKPOINT`.

REFERENCE is the file that `trainer.export.probe.verify_logprobs` writes. CHECKPOINT holds log-probabilities of the
training process.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rekatrain.data.chat import render_prompt
from rekatrain.data.tokenizer import check_tokenizer
from rekatrain.trainer.export.probe import CONVERSATIONS, probe_logprobs
from rekatrain.trainer.models.probe import compare, find_difference, read_probe, run_probe


def main() -> None:
    """Print the verified properties, or raise AssertionError at the first that does not hold."""
    folder, reference_file, checkpoint = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer)
    for messages in CONVERSATIONS:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert rendered == render_prompt(messages), f"the chat template renders {rendered!r}"
    generation = json.loads((Path(folder) / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id and "stop_strings" not in generation, generation

    reference = load_file(reference_file)
    model = _load(Path(folder))
    error = (probe_logprobs(model, reference["ids"]) - reference["logprobs"]).abs().max().item()
    # Same weights, same arithmetic: only the order of sums may differ.
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    assert error <= tolerance, f"a log-probability differs by {error} from the training model's"
    training = read_probe(Path(checkpoint))
    by = ""
    if training is not None:
        exported = run_probe(model, [ids.tolist() for ids in training.ids])
        difference = find_difference(training, exported)
        assert difference is None, difference
        by = f"; within {compare(training, exported.logprobs)[0]:.1e} of the training process"
    print(f"verified in a fresh process: tokenizer, template, stop, log-probabilities within {error:.1e}{by}")


def _load(folder: Path) -> PreTrainedModel | PeftModel:
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    # The reference of an adapter is the training model in float32. PEFT loads all kinds; transformers, given the
    # adapter's folder, ignores the base's revision and drops DoRA's magnitudes.
    config = PeftConfig.from_pretrained(str(folder))
    base = AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path, revision=config.revision, dtype=torch.float32
    )
    return PeftModel.from_pretrained(base, str(folder))


if __name__ == "__main__":
    main()
