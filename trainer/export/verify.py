"""Verify a merged model or an adapter: `python -m rekatrain.trainer.export.verify FOLDER REFERENCE`.

REFERENCE is the file that `trainer.export.probe.verify_logprobs` writes.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rekatrain.data.chat import render_prompt
from rekatrain.data.tokenizer import check_tokenizer
from rekatrain.trainer.export.probe import CONVERSATIONS, probe_logprobs


def main() -> None:
    """Print the verified properties, or raise AssertionError at the first that does not hold."""
    folder, reference_file = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer)
    for messages in CONVERSATIONS:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert rendered == render_prompt(messages), f"the chat template renders {rendered!r}"
    generation = json.loads((Path(folder) / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id and "stop_strings" not in generation, generation

    reference = load_file(reference_file)
    # The reference of an adapter is the training model in float32; transformers puts the adapter on its base.
    is_adapter = (Path(folder) / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if is_adapter else "auto")
    error = (probe_logprobs(model, reference["ids"]) - reference["logprobs"]).abs().max().item()
    # Same weights, same arithmetic: only the order of sums may differ.
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    assert error <= tolerance, f"a log-probability differs by {error} from the training model's"
    print(f"verified in a fresh process: tokenizer, template, stop, log-probabilities within {error:.1e}")


if __name__ == "__main__":
    main()
