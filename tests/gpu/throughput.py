"""Speed and memory of SFT and RLOO with random weights, against the plan: seconds, tokens/s, memory, MFU.

    python tests/gpu/throughput.py                                   # on a GPU: 1B-shaped, on 75 GB or more 21B-shaped
    python tests/gpu/throughput.py --device cpu --shapes tiny --tokens 64 --methods full lora

A step is a forward and backward pass over one micro-batch, and an update by AdamW. MFU counts the FLOPs that are needed
(those of `rekatrain plan`, nothing for recomputed activations) against a large matrix product on the same device. The
memory planned is that of the phase train without the context and the margin for fragmentation, which PyTorch's count of
allocated bytes does not have either. On a CPU the memory is that of the process, whose largest case so far counts.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from common import memory_mb, print_table, write_report  # noqa: E402  # the folder just added
from transformers import LlamaConfig  # noqa: E402

from rekatrain.trainer.plan.calibrate import product_rate, training_pass  # noqa: E402
from rekatrain.trainer.plan.cost import Rates, estimate  # noqa: E402
from rekatrain.trainer.plan.machine import PlannedLaunch  # noqa: E402
from rekatrain.trainer.plan.memory import Plan, make_plan  # noqa: E402
from rekatrain.trainer.recipe.load import Recipe  # noqa: E402

REKA = Path(__file__).parents[2] / "recipes/reka-flash-3/configs/reka-flash-3.json"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 300,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
LORA = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
PROMPT, GROUP = 256, 4
# Bytes of a GPU from which on the 21B-shaped model runs, with an adapter.
LARGE_GPU = 75e9


def write_config(shape: str, folder: Path) -> str:
    """Write the config of a model shape into a folder; return the folder."""
    if shape == "21B":
        shutil.copy(REKA, folder / "config.json")
    else:
        LlamaConfig(**SHAPES[shape], max_position_embeddings=32768, tie_word_embeddings=False).save_pretrained(folder)
    return str(folder)


def make_case(stage: str, method: str, tokens: int, model: str, device: str) -> Plan:
    """Return the plan of a step with one micro-batch of about `tokens` tokens."""
    prompt = min(PROMPT, tokens // 4)
    completion = (tokens - prompt) // GROUP
    settings: dict[str, Any] = {"sft": {"max_length": tokens, "per_device_train_batch_size": 1}}
    rloo = {"max_steps": 1, "prompts_per_step": 1, "num_generations": GROUP, "max_completion_length": completion}
    rloo |= {"per_device_generation_batch_size": GROUP, "micro_batch_tokens": tokens, "beta": 0.0}
    settings["rloo"] = {
        **rloo,
        "gradient_checkpointing": device == "cuda",
        "bf16": device == "cuda" and method == "full",
    }
    dtype = "bfloat16" if device == "cuda" and method != "full" else "float32"
    recipe = Recipe(
        stage=stage,  # type: ignore[arg-type]  # sft or rloo
        output_dir="",
        model={"pretrained_model_name_or_path": model, "dtype": dtype},
        lora=LORA if method == "lora" else None,
        dataset={},
        **{stage: settings[stage]},
    )
    return make_plan(recipe, PlannedLaunch(is_cpu=device == "cpu"), prompt_tokens=prompt)


def measure(plan: Plan, device: str, rounds: int, peak_flops: float) -> dict[str, float]:
    """Run a first step and then `rounds` steps; return their figures."""
    model, train = training_pass(plan, plan.shape.num_layers, torch.device(device))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        train()
        optimizer.step()
        optimizer.zero_grad()

    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    wait()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        wait()
        spent.append(time.perf_counter() - began)
    tokens = plan.workload.micro_batch_tokens
    cost = estimate(plan, Rates())
    recomputed = 1 if plan.checkpoints_activations else 0
    passes = 2 + (plan.recipe.lora is None)
    needed = cost.flops["train"] * tokens / cost.train_tokens * passes / (passes + recomputed)
    (planned,) = [phase for phase in plan.phases if phase.name == "train"]
    margin = planned.gpu["context, fragmentation"]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory_mb("VmHWM") * 2**20
    return {
        "tokens": tokens,
        "s": median(spent),
        "tokens/s": tokens / median(spent),
        "GB": peak / 1e9,
        "planned GB": (planned.gpu_bytes - margin) / 1e9,
        "MFU": needed / median(spent) / peak_flops,
    }


def main() -> None:
    """Print a table and write it as JSON."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    is_large = has_gpu and torch.cuda.get_device_properties(0).total_memory > LARGE_GPU
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "21B"], default=["1B"] + ["21B"] * is_large)
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/throughput.json"))
    arguments = parser.parse_args()

    device = arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peak_flops = product_rate(torch.device(device), dtype)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shapes:
            model = Path(folder, shape)
            model.mkdir()
            write_config(shape, model)
            for stage in ("sft", "rloo"):
                for method in arguments.methods:
                    for tokens in arguments.tokens:
                        if shape == "21B" and method == "full":
                            continue  # its optimizer alone takes 250 GB
                        case = {"model": shape, "stage": stage, "method": method}
                        lines.append(
                            case
                            | measure_or_fail(stage, method, tokens, str(model), device, arguments.rounds, peak_flops)
                        )
                        print(json.dumps(lines[-1]), flush=True)
    print_table(lines, f"{name}: {peak_flops / 1e12:.3g} TFLOP/s in a product of {str(dtype).removeprefix('torch.')}")
    write_report(arguments.out, arguments, {"device": name, "product FLOP/s": peak_flops, "lines": lines})


def measure_or_fail(
    stage: str, method: str, tokens: int, model: str, device: str, rounds: int, peak: float
) -> dict[str, Any]:
    """Return the figures of a case; out of memory is a result, too."""
    try:
        return measure(make_case(stage, method, tokens, model, device), device, rounds, peak)
    except torch.OutOfMemoryError:
        return {"tokens": tokens, "GB": float("inf")}
    finally:
        gc.collect()  # TRL's fused head makes a reference cycle of the model
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
