"""Verify a merged model or an adapter: `python -m rekatrain.trainer.export.verify FOLDER REFERENCE CHECKPOINT`.

REFERENCE is the file that `trainer.export.probe.verify_logprobs` writes. CHECKPOINT holds log-probabilities of the
training process.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rekatrain.data.chat import render_prompt
from rekatrain.data.families import bos_ids
from rekatrain.data.tokenizer import check_tokenizer
from rekatrain.trainer.export.lazy_weights import LazyWeights, streaming
from rekatrain.trainer.export.probe import CONVERSATIONS, probe_logprobs
from rekatrain.trainer.models.config import build_skeleton
from rekatrain.trainer.models.probe import compare, find_difference, read_probe, run_probe
from rekatrain.trainer.models.source import find_source
from rekatrain.trainer.models.weights import check_tensors

TOLERANCE = 1e-4


def main() -> None:
    """Print the verified properties, or raise AssertionError at the first that does not hold."""
    folder, reference_file, checkpoint = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer)
    bos = tokenizer.bos_token if bos_ids(tokenizer) else ""
    for messages in CONVERSATIONS:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert rendered == bos + render_prompt(messages), f"the chat template renders {rendered!r}"
    generation = json.loads((Path(folder) / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id and "stop_strings" not in generation, generation

    reference = load_file(reference_file)
    source = find_source(folder)
    weights = LazyWeights(source)
    assert weights.model.config.eos_token_id == tokenizer.eos_token_id or source.adapter, weights.model.config
    # transformers and PEFT find each tensor in the files. The head of weights.model may be untied by the adapter.
    base = AutoConfig.from_pretrained(source.base, revision=source.revision)
    check_tensors(source, source.revision, build_skeleton(source.base, base, AutoModelForCausalLM))
    training, by = read_probe(Path(checkpoint)), ""
    with streaming(weights) as model:
        error = (probe_logprobs(model, reference["ids"]) - reference["logprobs"]).abs().max().item()
        # The same weights in the same arithmetic, and only the order of sums may differ.
        assert error <= TOLERANCE, f"a log-probability differs by {error} from that of the exporting process"
        if training is not None:
            exported = run_probe(model, [ids.tolist() for ids in training.ids])
            stored = "float32" if source.adapter else str(AutoConfig.from_pretrained(folder).dtype)
            difference = find_difference(training, replace(exported, dtype=stored.removeprefix("torch.")))
            assert difference is None, difference
            by = f"; within {compare(training, exported.logprobs)[0]:.1e} of the training process"
    print(f"verified in a fresh process: tokenizer, template, stop, log-probabilities within {error:.1e}{by}")


if __name__ == "__main__":
    main()
