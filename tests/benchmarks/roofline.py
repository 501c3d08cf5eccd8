"""Compare the training pass, on useful tokens, with the machine's rate for the matrix products of the model.

    python tests/benchmarks/roofline.py --model runs/smollm2-135m --prompts gsm8k.jsonl

The pass is the train phase of `take_step`: forward, loss and backward on fixed groups, so that no time goes to
sampling. The optimizer is not part of it. FLOPs are those that the step needs, whatever the engine computes: for each
token (a prompt once, a completion without its last token)

    6 * weights of the linear layers        2 forward, 2 for the gradient of the inputs, 2 for that of the weights
    6 * weights of the LM head              completion tokens only
    12 * heads * head size * keys seen      2 products forward, 4 backward, in each layer; no key that is masked

The machine's rate is that of the same products alone: the three products of each linear layer on the tokens of the
pass, and those of the head, into memory that is already allocated. Passes and products alternate. Attention is charged
at that rate too. The profile shows where the time of a pass goes, as self time of torch's operators.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from common import (
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
from work import by_ids

from rekatrain.data.chat import FinishReason
from rekatrain.rewards.compose import RewardFunction
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs
from rekatrain.trainer.rloo.metrics import Clock
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.setup import RunSetup
from rekatrain.trainer.rloo.step import Run, take_step

GROUPS = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::linear",
        "aten::matmul",
        "aten::baddbmm",
        "mkl::",
        "mkldnn::",
        "nvjet_",
        "cutlass",
        "sm80_xmma_gemm",
        "sm90_xmma_gemm",
        "void cutlass",
    ),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product", "triton_tem_fused"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::_to_copy", "aten::contiguous", "aten::split"),
    "gather and scatter": ("aten::index", "aten::gather", "aten::scatter", "aten::embedding"),
    "filling": ("aten::zero_", "aten::fill_", "aten::new_", "aten::zeros", "aten::empty", "aten::triu"),
}


class GivenCompletions:
    """A sampler with fixed groups."""

    def __init__(self, lengths: Sequence[int], vocabulary: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]

    def sample(
        self, prompts: Sequence[list[int]], keys: object, num_generations: int, *_: object
    ) -> list[list[Completion]]:
        """Return equal completions for every prompt."""
        return [
            [Completion(ids=ids, logprobs=[0.0] * len(ids), finish_reason=FinishReason.LENGTH) for ids in self.ids]
            for _ in prompts
        ]


def needed_flops(model: PreTrainedModel, prompts: Sequence[int], lengths: Sequence[int]) -> dict[str, float]:
    """Return the FLOPs of a forward and backward over groups; lengths of completions include the last token."""
    config, decoder = model.config, model.get_decoder()
    run = [length - 1 for length in lengths]
    tokens = sum(prompts) + len(prompts) * sum(run)
    pairs = sum(p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in run) for p in prompts)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear))
    return {
        "linear layers": 6.0 * linear * tokens,
        "LM head": 6.0 * model.get_output_embeddings().weight.numel() * len(prompts) * sum(lengths),
        "attention": 12.0 * config.num_hidden_layers * config.num_attention_heads * head_dim * pairs,
    }


def make_products(model: PreTrainedModel, tokens: int, head_tokens: int) -> tuple[Callable[[], None], float]:
    """Return a function that runs the matrix products of the model alone, and their FLOPs."""
    shapes = Counter(
        (tokens, *module.weight.shape) for module in model.get_decoder().modules() if isinstance(module, nn.Linear)
    )
    # The logits of a chunk of tokens exist at one time: the weights of the head are read again for each chunk.
    num_chunks = -(-head_tokens // 2048)
    shapes[(head_tokens // num_chunks, *model.get_output_embeddings().weight.shape)] += num_chunks
    tensors = {
        (tokens, outs, ins): tuple(
            torch.randn(shape, device=model.device, dtype=model.dtype)
            for shape in ((tokens, ins), (outs, ins), (tokens, outs))
        )
        for tokens, outs, ins in shapes
    }
    results = {shape: tuple(torch.empty_like(tensor) for tensor in given) for shape, given in tensors.items()}

    def run() -> None:
        for shape, count in shapes.items():
            inputs, weight, outputs = tensors[shape]
            inputs_out, weight_out, outputs_out = results[shape]
            for _ in range(count):
                torch.mm(inputs, weight.t(), out=outputs_out)
                torch.mm(outputs, weight, out=inputs_out)
                torch.mm(outputs.t(), inputs, out=weight_out)
        wait_for(model.device)

    return run, sum(6.0 * tokens * outs * ins * count for (tokens, outs, ins), count in shapes.items())


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def where_time_goes(action: Callable[[], Any]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return fractions of self time by kind of operator, and the operators with the most self time."""
    times = self_times(action)
    total = sum(spent for _, _, spent in times)
    fractions: Counter[str] = Counter()
    for name, _, spent in times:
        kinds = (kind for kind, names in GROUPS.items() if name.startswith(names))
        default = "elementwise and sums" if name.startswith(("aten::", "void at::")) else "Python, autograd, others"
        fractions[next(kinds, default)] += spent / total
    top = [{"operator": name[:60], "calls": count, "fraction": spent / total} for name, count, spent in times[:12]]
    return dict(fractions.most_common()), top


def main() -> None:
    """Print the rate, its parts and the profile; write the report."""
    parser = make_parser(__doc__, "roofline.json")
    add_model_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--num-prompts", type=int, default=2)
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[64] * 8, help="lengths of the completions of a prompt"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=RLOOConfig.micro_batch_tokens)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()

    tokenizer = load_folder_tokenizer(arguments.model)
    model = load_model(arguments.model, arguments.device, arguments.dtype)
    prompts: list[Prompt] = load_prompts(tokenizer, arguments.prompts, arguments.num_prompts)
    config = RLOOConfig(
        max_steps=1,
        prompts_per_step=len(prompts),
        num_generations=len(arguments.lengths),
        max_completion_length=max(arguments.lengths),
        beta=0.0,
        per_device_generation_batch_size=len(arguments.lengths) * len(prompts),
        micro_batch_tokens=arguments.micro_batch_tokens,
    )
    reward = RewardFunction(name="by_ids", weight=1.0, function=by_ids, columns=())
    task = RunSetup(config=config, tokenizer=tokenizer, prompts=prompts, rewards=[reward])
    logprobs = CompletionLogprobs(model, temperature=1.0, num_tokens=len(tokenizer)).train()
    sampler: Any = GivenCompletions(arguments.lengths, len(tokenizer), arguments.seed)  # stands in for a Sampler
    accelerator = Accelerator(cpu=arguments.device == "cpu")

    step = Run.in_process(accelerator, logprobs, task, sampler, lambda: wait_for(model.device))

    def train_seconds() -> float:
        clock = Clock()
        # The gradients are added to existing ones, as in a step of several micro-batches.
        take_step(step, 0, clock)
        return clock.metrics(1)["time/train"]

    prompt_lengths = [len(prompt.ids) for prompt in prompts]
    flops = needed_flops(model, prompt_lengths, arguments.lengths)
    tokens = sum(prompt_lengths) + len(prompts) * sum(length - 1 for length in arguments.lengths)
    products, product_flops = make_products(
        model, min(tokens, arguments.micro_batch_tokens), len(prompts) * sum(arguments.lengths)
    )
    train_seconds(), products()
    passes, rates = [], []
    for _ in range(arguments.rounds):
        rates.append(product_flops / seconds(products) / 1e9)
        passes.append(train_seconds())
    machine_rate, pass_rate = median(rates), median(sum(flops.values()) / spent / 1e9 for spent in passes)
    fractions, operators = where_time_goes(train_seconds)

    summary = {
        "useful tokens": tokens,
        "pass s": median(passes),
        "needed GFLOP": sum(flops.values()) / 1e9,
        "GFLOP/s": pass_rate,
        "machine GFLOP/s": machine_rate,
        "fraction of machine": pass_rate / machine_rate,
    }
    print_table([summary])
    print_table([{"needed": name, "fraction": part / sum(flops.values())} for name, part in flops.items()])
    print_table([{"time of a pass": name, "fraction": fraction} for name, fraction in fractions.items()])
    print_table(operators)
    results = {"summary": summary, "flops": flops, "passes": passes, "rates": rates, "fractions": fractions}
    write_report(arguments.out, arguments, {**results, "operators": operators})


if __name__ == "__main__":
    main()
