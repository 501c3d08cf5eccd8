"""One rank of a launch: add gradients up that bfloat16 would lose, and write the norm of their sum to a file.

    accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 float32_gradients.py OUT

Rank 0 has a micro-batch with the gradient 1 and then 64 with 2^-10; rank 1 has 65 with 2^-10. In bfloat16, whose
neighbours of 1 are 2^-8 and 2^-7 away, 1 + 2^-10 is 1.
"""

import json
import sys
from pathlib import Path

import torch

from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.distributed import GradientClipper, backward, make_accelerator, update_weights

NUM_BATCHES, SMALL = 65, 2.0**-10


class Dot(torch.nn.Module):
    """A model whose gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.weight * inputs.to(self.weight.dtype)).sum()


def main() -> None:
    accelerator = make_accelerator(bf16=True, ddp_timeout=60)
    model = Dot()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.0, 0.999), weight_decay=0.0)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert next(prepared.parameters()).dtype == torch.bfloat16
    clipper = GradientClipper(RLOOConfig(max_steps=1, max_grad_norm=1e9))
    for number in range(NUM_BATCHES):
        size = 1.0 if number == 0 and accelerator.process_index == 0 else SMALL
        loss = prepared(torch.full((8,), size)) * accelerator.num_processes
        backward(accelerator, prepared, loss, is_last=number == NUM_BATCHES - 1)
    update_weights(accelerator, prepared, optimizer, clipper)
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(clipper.metrics()["grad_norm"]))
    accelerator.end_training()


if __name__ == "__main__":
    main()
