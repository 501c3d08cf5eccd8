"""Time of the attention over packed groups, with this project's tiles and with PyTorch's own.

    python tests/gpu/attention.py                      # heads of a 1B-shaped model and of Reka Flash 3
    python tests/gpu/attention.py --device cpu --prompt 16 --completion 32    # shows that it runs; forward pass only

One prompt with four completions; FLOPs are those of the pairs of tokens that see each other.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from throughput import print_table, write_report  # the folder of this file is on the path

from rekatrain.trainer.rloo.kernels import block_mask

# Query heads, key-value heads and size of a head.
SHAPES = {"1B": (32, 8, 64), "Reka Flash 3": (64, 8, 96)}
ROUNDS = 5


def milliseconds(action: Callable[[], object], device: str) -> float:
    """Return the median time of an action after two first ones, which compile."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    spent = []
    for _ in range(2 + ROUNDS):
        wait()
        began = time.perf_counter()
        action()
        wait()
        spent.append(1e3 * (time.perf_counter() - began))
    return median(spent[2:])


def measure(groups: list[tuple[int, list[int]]], shape: str, tiles: dict[str, int], device: str) -> dict[str, Any]:
    """Return the times of a forward pass, and of forward and backward."""
    num_heads, num_key_heads, size = SHAPES[shape]
    num_tokens = sum(prompt + sum(completions) for prompt, completions in groups)
    mask = block_mask.make_block_mask(groups, torch.device(device))
    states = [
        torch.randn(1, heads, num_tokens, size, device=device, dtype=torch.bfloat16)
        for heads in (num_heads, num_key_heads, num_key_heads)
    ]
    flops = 4 * num_heads * size * int(block_mask.count_pairs(groups).sum())

    def forward() -> torch.Tensor:
        return block_mask.attend_blocks(*states, mask, size**-0.5)

    with patch.object(block_mask, "TILES", tiles):
        with torch.no_grad():
            once = milliseconds(forward, device)
        line = {"heads": shape, "tiles": "own" if tiles else "PyTorch's", "forward ms": once}
        line["forward TFLOP/s"] = flops / once / 1e9
        if device == "cuda":  # on a CPU FlexAttention has no backward pass
            for each in states:
                each.requires_grad_()
            both = milliseconds(lambda: forward().sum().backward(), device)
            line |= {"both ms": both, "both TFLOP/s": 3.5 * flops / both / 1e9}
    return line


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=4032)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/attention.json"))
    arguments = parser.parse_args()
    groups = [(arguments.prompt, [arguments.completion] * 4)]
    lines = [
        measure(groups, shape, tiles, arguments.device) for shape in SHAPES for tiles in ({}, dict(block_mask.TILES))
    ]
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print_table(lines, f"{name}: a prompt of {arguments.prompt} tokens, four completions of {arguments.completion}")
    write_report(arguments.out, arguments, {"device": name, "lines": lines})


if __name__ == "__main__":
    main()
