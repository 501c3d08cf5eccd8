"""Tokens per second of the in-process sampler, transformers' generate and continuous batching, and a vLLM server.

    python tests/benchmarks/sampler.py --model runs/smollm2-135m --prompts gsm8k.jsonl
    python tests/benchmarks/sampler.py --model runs/smollm2-135m --vllm-url http://127.0.0.1:8103 --vllm-model policy

Every engine samples groups of k completions at temperature 1 in one dtype, all of the same length: no engine can draw
an eos, or stops at one. Engines alternate. The server must serve the same folder on the same cores; it is idle while
other engines run. Give it a --max-num-seqs of at least the largest batch size.

For our sampler the rate of its matrix products is printed too: FLOPs of all linear layers (2 * weights * tokens, the LM
head on sampled tokens) over the whole time, and over the time that a profile gives to matrix products. Beside it is the
rate of the same products alone at that batch size, with plain weights and with weights packed as in the sampler. On a
GPU our sampler runs also without CUDA graphs.
"""

import argparse
import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from common import (
    NEVER,
    add_device_argument,
    add_model_arguments,
    load_folder_tokenizer,
    load_model,
    load_prompts,
    make_parser,
    print_table,
    self_times,
    wait_for,
    write_report,
)
from torch import nn
from transformers import PreTrainedModel

from rekatrain.trainer.rloo.kernels.cpu import decoding_weights
from rekatrain.trainer.rloo.sampler.decode_step import EagerCalls
from rekatrain.trainer.rloo.sampler.in_process import Sampler

# bmm belongs to attention and does not count.
PRODUCTS = (
    *("aten::mm", "aten::addmm", "mkl::_mkl_linear", "mkldnn::_linear_pointwise", "aten::mkldnn_linear"),
    *("nvjet_", "cutlass", "sm80_xmma_gemm", "sm90_xmma_gemm", "void cutlass"),  # kernels of a GPU
)
Prompts = list[list[int]]
Engine = Callable[[Prompts], int]  # -> number of tokens sampled


def make_engines(arguments: argparse.Namespace, model: PreTrainedModel) -> dict[str, Engine]:
    """Return the engines to compare; each samples k completions per prompt, to the cap."""
    k, cap = arguments.num_generations, arguments.length
    tokenizer = load_folder_tokenizer(arguments.model, never_ends=True)
    never_id = tokenizer.convert_tokens_to_ids(NEVER)
    # Both generate and our sampler set the attention that they need.
    kept = model.config._attn_implementation
    others = {"max_new_tokens": cap, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    others |= {"eos_token_id": never_id, "pad_token_id": 0}

    def rekatrain(prompts: Prompts, *, graphs: bool = True) -> int:
        sampler = Sampler(model, tokenizer, max_completion_length=cap, temperature=1.0, batch_size=len(prompts) * k)
        if not graphs:
            sampler.make_calls = EagerCalls
        keys = [(arguments.seed, prompt_index) for prompt_index in range(len(prompts))]
        return sum(len(one.ids) for group in sampler.sample(prompts, keys, k) for one in group)

    def generate(prompts: Prompts) -> int:
        model.set_attn_implementation(kept)
        longest = max(map(len, prompts))
        device = model.device
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        with torch.no_grad():
            output = model.generate(ids, attention_mask=mask, num_return_sequences=k, **others)
        return (output.shape[1] - longest) * len(output)

    def continuous(prompts: Prompts) -> int:
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        model.set_attn_implementation(kept)
        blocks = len(prompts) * k * -(-(max(map(len, prompts)) + cap) // 256) + 8
        with torch.no_grad():
            outputs = model.generate_batch(
                [prompt for prompt in prompts for _ in range(k)],
                generation_config=GenerationConfig(**others, disable_compile=True),
                continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=2048),
            )
        return sum(len(output.generated_tokens) for output in outputs.values())

    def vllm(prompts: Prompts) -> int:
        body = {"model": arguments.vllm_model, "prompt": prompts, "n": k, "max_tokens": cap, "temperature": 1.0}
        body |= {"ignore_eos": True, "logprobs": 0}
        request = urllib.request.Request(
            f"{arguments.vllm_url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    engines = {"rekatrain": rekatrain, "generate": generate, "continuous batching": continuous}
    engines |= {"vLLM server": vllm} if arguments.vllm_url else {}
    engines |= {"without graphs": partial(rekatrain, graphs=False)} if model.device.type == "cuda" else {}
    return {name: engine for name, engine in engines.items() if name not in arguments.without}


def run_flops(model: PreTrainedModel, prompts: Prompts, k: int, cap: int) -> float:
    """Return FLOPs of the linear layers: prompts once, completions without last token, the head on sampled tokens."""
    linear = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, nn.Linear))
    tokens = sum(map(len, prompts)) + len(prompts) * k * (cap - 1)
    return 2.0 * linear * tokens + 2.0 * model.get_output_embeddings().weight.numel() * len(prompts) * k * cap


def product_rate(model: PreTrainedModel, batch_size: int) -> float:
    """Return GFLOP/s of the matrix products of one decoding step alone: every linear layer at that batch size."""
    layers = [*(m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)), model.get_output_embeddings()]
    inputs = {
        width: torch.randn(batch_size, width, device=model.device, dtype=model.dtype)
        for width in {layer.in_features for layer in layers}
    }
    spent = []
    with torch.no_grad():
        for _ in range(4):
            began = time.perf_counter()
            for layer in layers:
                layer(inputs[layer.in_features])
            wait_for(model.device)
            spent.append(time.perf_counter() - began)
    return 2.0 * sum(layer.weight.numel() for layer in layers) * batch_size / min(spent) / 1e9


def decoding_profile(action: Callable[[], Any]) -> tuple[float, list[dict[str, Any]]]:
    """Return the fraction of matrix products in the time of a sampling call, and the operators with the most time."""
    times = self_times(action)
    total = sum(spent for _, _, spent in times)
    products = sum(spent for name, _, spent in times if name.startswith(PRODUCTS))
    top = [{"operator": name[:60], "calls": count, "fraction": spent / total} for name, count, spent in times[:12]]
    return products / total, top


def main() -> None:
    """Print tokens per second by batch size, and where the time of our sampler goes; write the report."""
    parser = make_parser(__doc__, "sampler.json")
    add_model_arguments(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[8, 16, 32, 64], help="numbers of completions at one time"
    )
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="number of new tokens of every completion")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], help="engines to leave out, such as 'continuous batching'")
    parser.add_argument("--vllm-url", help="URL of a server of the same folder, such as http://127.0.0.1:8103")
    parser.add_argument("--vllm-model", default="policy", help="name under which the server serves the folder")
    arguments = parser.parse_args()
    if any(size % arguments.num_generations for size in arguments.batch_sizes):
        parser.error("--batch-sizes must be multiples of --num-generations")

    model = load_model(arguments.model, arguments.device, arguments.dtype).eval()
    k, cap = arguments.num_generations, arguments.length
    tokenizer = load_folder_tokenizer(arguments.model)
    prompts = [p.ids for p in load_prompts(tokenizer, arguments.prompts, max(arguments.batch_sizes) // k)]
    engines = make_engines(arguments, model)
    for engine in engines.values():
        engine(prompts[:1])
    table, rates, speeds = [], [], {}
    for batch_size in arguments.batch_sizes:
        chosen = prompts[: batch_size // k]
        spent: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(arguments.rounds):
            for name, engine in engines.items():
                began = time.perf_counter()
                num_tokens = engine(chosen)
                spent[name].append((time.perf_counter() - began) / num_tokens)
                if num_tokens != batch_size * cap:
                    raise RuntimeError(f"{name} sampled {num_tokens} tokens, not {batch_size} x {cap}")
        table.append({"batch size": batch_size, **{f"{name} tok/s": 1 / median(each) for name, each in spent.items()}})
        speeds[batch_size] = spent
        gflop = run_flops(model, chosen, k, cap) / 1e9
        whole = median(spent["rekatrain"]) * batch_size * cap
        fraction, operators = decoding_profile(lambda chosen=chosen: engines["rekatrain"](chosen))
        with decoding_weights(model, batch_size):
            packed_rate = product_rate(model, batch_size)
        rates.append(
            {
                "batch size": batch_size,
                "GFLOP/s over all": gflop / whole,
                "fraction in products": fraction,
                "GFLOP/s in products": gflop / (whole * fraction),
                "plain alone": product_rate(model, batch_size),
                "packed alone": packed_rate,
            }
        )
    print_table(table, f"tokens per second, with prompts; {k} completions per prompt of {cap} tokens each")
    print_table(rates, "our sampler's matrix products")
    print_table(operators, f"time of our sampler at batch size {batch_size}")
    results = {"tokens_per_second": table, "rates": rates, "operators": operators, "seconds_per_token": speeds}
    counts = Counter(len(prompt) for prompt in prompts)
    write_report(arguments.out, arguments, {**results, "prompt_lengths": sorted(counts.elements())})


if __name__ == "__main__":
    main()
