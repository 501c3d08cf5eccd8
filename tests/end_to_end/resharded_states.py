"""Write a checkpoint's state into each stage of ZeRO and save it again: `python resharded_states.py FOLDER`.

Launched on several processes. FOLDER holds the checkpoint `plain`; each stage restores the one before it. Every process
compares all that DeepSpeed says of its optimizer with the numbers of `plain`, bit for bit.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import AdamW

from rekatrain.data.errors import InputError, TrainingStopped
from rekatrain.trainer.models.weights import check_finite
from rekatrain.trainer.resume.resharding import restore_converted
from rekatrain.trainer.resume.saved_optimizer import MOMENTS, read_optimizer, saved_layout
from rekatrain.trainer.run.guards import check_finite_weights

STEP = 7


class Model(nn.Module):
    """Parameters of sizes that do not divide evenly, some of them frozen; their order is not that of the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(requires_grad=False)
        self.second = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the three layers."""
        outputs: torch.Tensor = self.second(self.frozen(self.first(inputs))) * self.scale
        return outputs


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices, then vectors."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in trained]
    matrices, vectors = (
        [parameter for parameter, size in zip(trained, sizes, strict=True) if (len(size) > 1) is is_matrix]
        for is_matrix in (True, False)
    )
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


NAMES = ["first.weight", "second.weight", "scale", "first.bias", "second.bias"]


def write_plain(folder: Path) -> None:
    """Write a checkpoint in one piece, with random weights and moments."""
    torch.manual_seed(0)
    model = Model()
    optimizer = AdamW(groups(model))
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.tensor(float(STEP)),
            **{key: torch.rand_like(parameter) for key in MOMENTS},
        }
    folder.mkdir()
    save_file({name: parameter.detach() for name, parameter in model.named_parameters()}, folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")


def restore_and_save(source: Path, target: Path, plain: Path, zero: int, *, bf16: bool, accumulation: str) -> None:
    """Restore `source` into a fresh optimizer of a stage of ZeRO, compare it with `plain`, and save it.

    accumulation: dtype of accumulated gradients; at stage 1, DeepSpeed has another optimizer for bf16 weights with fp32
    """
    from accelerate.state import AcceleratorState
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from rekatrain.trainer.rloo.distributed import make_accelerator

    AcceleratorState._reset_state()
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(zero)
    accelerator = make_accelerator(bf16=bf16, ddp_timeout=600)
    accelerator.state.deepspeed_plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": accumulation}
    torch.manual_seed(1)
    module = Model()
    model, optimizer = accelerator.prepare(module, AdamW(groups(module), lr=1e-3))
    accumulates_apart = hasattr(optimizer.optimizer, "fp32_groups_flat_partition")
    assert accumulates_apart is (bf16 and zero == 1 and accumulation == "fp32")
    restore_converted(source, accelerator.unwrap_model(model), optimizer, NAMES)
    expected = read_optimizer(plain, dict(zip(NAMES, NAMES, strict=True)))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            weight = expected.read("fp32", name)
            assert torch.equal(safe_get_full_fp32_param(parameter).flatten(), weight), name
            for key in MOMENTS:
                assert torch.equal(safe_get_full_optimizer_state(parameter, key).flatten(), expected.read(key, name)), (
                    key
                )
            with GatheredParameters([parameter]):
                assert torch.equal(parameter.detach().flatten(), weight.to(parameter.dtype)), name
    assert {float(state["step"]) for state in optimizer.optimizer.optimizer.state.values()} == {STEP}
    if zero == 3:
        check_finite_checks(module)
    accelerator.save_state(str(target), exclude_frozen_parameters=True)
    layout = saved_layout(target)
    assert (layout.zero_stage, layout.num_shards) == (zero, accelerator.num_processes)


def check_finite_checks(module: Model) -> None:
    """Assert that the checks for finite weights see each element of a shard, and none of its padding."""
    name, parameter = "first.weight", module.first.weight
    shard, rank = parameter.ds_tensor.view(-1), torch.distributed.get_rank()
    num_real = min(shard.numel(), parameter.ds_numel - rank * shard.numel())
    before = shard.clone()
    shard[num_real:] = math.nan
    assert (num_real < shard.numel()) is (rank == 2)
    check_finite(module, "the model")
    check_finite_weights(module, STEP)
    shard[num_real - 1] = math.nan
    for check in (lambda: check_finite(module, "the model"), lambda: check_finite_weights(module, STEP)):
        try:
            check()
        except (InputError, TrainingStopped) as error:
            assert name in str(error)
        else:
            raise AssertionError(f"rank {rank}: a weight that is nan is not seen")
    shard.copy_(before)


if __name__ == "__main__":
    base = Path(sys.argv[1])
    for precision in ("fp32", "bf16"):
        stages = [(1, precision), (3, precision), (2, precision), (1, "fp32"), (1, precision)]
        before = base / "plain"
        for number, (stage, accumulation) in enumerate(stages):
            after = base / f"{precision}-{number}"
            is_bf16 = precision == "bf16"
            restore_and_save(before, after, base / "plain", stage, bf16=is_bf16, accumulation=accumulation)
            before = after
