"""Runs in the environment of llmcompressor, which has an older transformers; it imports no rekatrain.

python compress.py quantize KIND MODEL OUT CALIBRATION.json GROUP_SIZE
python compress.py logprobs MODEL IDS.safetensors OUT.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def quantize(kind: str, model_folder: str, out: str, calibration: str, group_size: str) -> None:
    """Quantize all linear layers but the head, with the token ids of CALIBRATION where the method needs data.

    FP8 has a scale per output channel, and per token for activations; four bits have one for GROUP_SIZE weights.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    if not torch.accelerator.is_available():  # llmcompressor 0.14 pins memory for AWQ where nothing could be copied to
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
    modifier = {"fp8": QuantizationModifier, "gptq": GPTQModifier, "awq": AWQModifier}[kind]
    rows = json.loads(Path(calibration).read_text())
    if kind == "fp8":
        options, layers = {}, {"scheme": "FP8_DYNAMIC", "targets": "Linear"}
    else:
        weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=int(group_size), symmetric=True)
        layers = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
        data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        longest = max(map(len, rows))
        options = {
            "dataset": Dataset.from_dict(data),
            "num_calibration_samples": len(rows),
            "max_seq_length": longest,
        }
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    oneshot(model=model, recipe=modifier(**layers, ignore=["lm_head"]), **options)
    model.save_pretrained(out, save_compressed=True)


def logprobs(model_folder: str, ids: str, out: str) -> None:
    """Write the log-probabilities of every next token after each id of each text: [L] -> [L, V] float32."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = {name: model(text[None]).logits[0].float() for name, text in load_file(ids).items()}
    save_file({name: each.log_softmax(-1).contiguous() for name, each in logits.items()}, out)


if __name__ == "__main__":
    {"quantize": quantize, "logprobs": logprobs}[sys.argv[1]](*sys.argv[2:])
