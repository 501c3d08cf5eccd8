"""Compare processes that split sequences with one process: `python split_sequences.py OUT`, in a launch of 4 processes.

Each process writes OUT-RANK.json: for each size of the sequence groups and each way of packing, the largest differences
of log-probabilities and of gradients (added up over the group), the tokens that it scored, and the bytes that autograd
kept for the backward pass.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM

from tests.conftest import tiny_llama, tiny_tokenizer

# Lengths of prompts and of their completions, and whether each prompt is run once. With the second, the completions lie
# in the last slice alone; the third is one token, as a process without work has it.
WAYS: dict[str, tuple[list[int], list[list[int]], list[bool]]] = {
    "groups": ([5, 3, 4], [[7, 1, 4], [2, 9], [6, 6, 3]], [True, False, True]),
    "late": ([90], [[5, 8]], [True]),
    "filler": ([1], [[1]], [True]),
    "long": ([64], [[160, 200, 150]], [True]),
}
SIZES = (1, 2, 4)


def draw_ids(lengths: Sequence[int], generator: torch.Generator) -> list[list[int]]:
    """Draw ids of texts of these lengths."""
    return [torch.randint(2, 60, (length,), generator=generator).tolist() for length in lengths]


def measure(
    policy: LlamaForCausalLM, way: str, sequence: Any, num_chunks: int
) -> tuple[Tensor, list[Tensor], int, int]:
    """Return log-probabilities, gradients of a weighted sum of them, tokens scored here and bytes kept."""
    from dataclasses import replace

    from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions
    from rekatrain.trainer.rloo.sequence_parallel import pack_own_tokens

    generator = torch.Generator().manual_seed(3)
    prompts, completions, is_shared = WAYS[way]
    ids = draw_ids(prompts, generator), [draw_ids(lengths, generator) for lengths in completions]
    num_tokens = sum(map(sum, completions))
    cutoffs = (-4 - 4 * torch.rand(num_tokens, generator=generator)).tolist() if way == "groups" else None
    packer = partial(pack_own_tokens, sequence) if sequence else pack_completions
    packed = packer(*ids, torch.device("cpu"), is_shared=is_shared, cutoffs=cutoffs)
    packed = replace(packed, num_chunks=num_chunks)
    model = CompletionLogprobs(policy, temperature=0.7, num_tokens=60)
    policy.zero_grad()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs_T = model(packed)
    weights_T = torch.rand(num_tokens, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (weights_T * logprobs_T.double()).sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept_bytes = sum(size for pointer, size in kept.items() if pointer not in weights)
    return logprobs_T.detach(), gradients, len(packed.targets), kept_bytes


def main() -> None:
    from rekatrain.trainer.rloo.distributed import make_accelerator
    from rekatrain.trainer.rloo.sequence_parallel import connect_sequence_group, sequence_group

    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    policy = tiny_llama(tiny_tokenizer(), max_position_embeddings=1024).double()
    results: dict[str, Any] = {}
    whole = {way: measure(policy, way, None, 1) for way in WAYS}
    for size in SIZES[1:]:
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        os.environ["PARALLELISM_CONFIG_SP_SIZE"] = str(size)
        accelerator = make_accelerator(bf16=False, ddp_timeout=100)
        connect_sequence_group(accelerator, ddp_timeout=100)
        sequence = sequence_group()
        assert sequence is not None
        for way in WAYS:
            for num_chunks in (1, 3):
                logprobs_T, gradients, num_scored, kept_bytes = measure(policy, way, sequence, num_chunks)
                for gradient in gradients:
                    torch.distributed.all_reduce(gradient, group=sequence.group)
                pairs = zip(gradients, whole[way][1], strict=True)
                results[f"{way}/{size}/{num_chunks}"] = {
                    "logprobs": (logprobs_T - whole[way][0]).abs().max().item(),
                    "gradients": max((mine - its).abs().max().item() for mine, its in pairs),
                    "largest": max(gradient.abs().max().item() for gradient in whole[way][1]),
                    "scored": num_scored,
                    "kept": kept_bytes / whole[way][3],
                }
    Path(f"{out}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
