"""Peak memory and time of an export of a random model with an adapter, and of its verification in another process.

    python -m tests.benchmarks.export_memory --work /tmp/export-memory            # 1.2B parameters, two minutes
    python -m tests.benchmarks.export_memory --work /tmp/small --hidden 256 --layers 4

The limit is two decoder layers in float32 and one shard, over the memory of a process that has imported the program:
anonymous memory, without the pages of files, which the kernel drops as it likes. The embeddings count as a layer.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rekatrain.trainer.export.export import export
from rekatrain.trainer.models.probe import choose_texts, run_probe
from tests.conftest import tiny_tokenizer

SHARD_MB = 200


def anonymous_mb() -> float:
    """Return the anonymous memory of this process and of its children, the largest of them, in MB."""
    pids = ["self", *Path("/proc/thread-self/children").read_text().split()]
    found = []
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:  # a child that has ended
            continue
        found += [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")]
    return max(found, default=0.0)


class Peak(threading.Thread):
    """Samples the anonymous memory of this process and its children every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_mb, self.peak_mb, self.is_over = anonymous_mb(), 0.0, False

    def run(self) -> None:
        """Sample until `is_over`."""
        while not self.is_over:
            self.peak_mb = max(self.peak_mb, anonymous_mb())
            time.sleep(0.005)


def make_run(folder: Path, *, hidden: int, layers: int, vocabulary: int) -> int:
    """Write a bfloat16 model, a run folder with an adapter on it, and its probe; return a layer's float32 bytes."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2048,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    checkpoint = folder / "run" / "checkpoints" / "checkpoint-1"
    adapted.save_pretrained(str(checkpoint))
    tokenizer.save_pretrained(checkpoint)
    run_probe(adapted, choose_texts(tokenizer, [])).save(checkpoint)
    recipe = {
        "stage": "sft",
        "output_dir": str(folder / "run"),
        "model": {"pretrained_model_name_or_path": str(folder / "model")},
        "lora": {"r": 16, "target_modules": "all-linear"},
        "dataset": {"path": "rows.jsonl"},
    }
    (folder / "run" / "recipe.yaml").write_text(json.dumps(recipe))
    return max(layer, vocabulary * hidden * 4)


def main() -> None:
    """Print the peak and the limit; exit with 1 if the peak is above it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--form", choices=["merged", "gguf"], default="merged")
    parser.add_argument("--layer-bytes", type=int, help=argparse.SUPPRESS)  # set by the first process
    options = parser.parse_args()
    if options.layer_bytes is None:
        # A separate process measures: this one holds the memory in which the model was made.
        sizes = {"hidden": options.hidden, "layers": options.layers, "vocabulary": options.vocabulary}
        layer = make_run(options.work, **sizes)
        arguments = [*sys.argv[1:], "--layer-bytes", str(layer)]
        sys.exit(subprocess.run([sys.executable, "-m", "tests.benchmarks.export_memory", *arguments]).returncode)
    size = sum(path.stat().st_size for path in (options.work / "model").glob("*.safetensors")) / 2**20
    peak = Peak()
    peak.start()
    start = time.monotonic()
    shard = f"{SHARD_MB}MB"
    checkpoint = options.work / "run" / "checkpoints" / "checkpoint-1"
    export(checkpoint, options.work / options.form, form=options.form, max_shard_size=shard)
    seconds = time.monotonic() - start
    peak.is_over = True
    used = peak.peak_mb - peak.start_mb
    limit = 2 * options.layer_bytes / 2**20 + SHARD_MB
    print(
        f"{options.form}: bfloat16 model of {size:,.0f} MB exported in {seconds:.0f} s; peak {peak.peak_mb:,.0f} MB, "
        f"{used:,.0f} MB over the imported program; limit (two layers in float32 and a shard) {limit:,.0f} MB"
    )
    sys.exit(0 if used <= limit else 1)


if __name__ == "__main__":
    main()
