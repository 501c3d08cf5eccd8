"""What a launcher started, and that it is really there."""

import logging
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from data.errors import InputError

logger = logging.getLogger(__name__)


def make_accelerator(*, bf16: bool) -> Accelerator:
    """Accelerate for one process, data parallelism or ZeRO; logs what it really is, which must be what was launched.

    Raises InputError under FSDP, for which there is no code here, and under stage 0 of ZeRO, which is data parallelism.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise InputError("stage rloo does not run under FSDP: launch it with recipes/accelerate/zero3.yaml")
    has_gpu, is_deepspeed = torch.cuda.is_available(), os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if is_deepspeed and not has_gpu:
        without_compiled_operators()
    accelerator = Accelerator(
        # Without a GPU, `Accelerator()` would leave launched processes unconnected and train each alone, silently;
        # under DeepSpeed `cpu=True` would turn it off as silently.
        cpu=not has_gpu and not is_deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if is_deepspeed and not has_gpu else [],
        mixed_precision="bf16" if bf16 else None,
        step_scheduler_with_optimizer=False,
    )
    if is_deepspeed:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 0:
            raise InputError("zero_stage 0 is plain data parallelism: launch with recipes/accelerate/ddp.yaml")
        # DeepSpeed wants sizes; micro-batches are laid out by tokens, their denominators are the step's, and
        # trainer/rloo/engine.py says where an update ends and how far its gradient is clipped.
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            train_batch_size=accelerator.num_processes,
            gradient_clipping=0.0,
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    is_connected = launched == 1 or accelerator.distributed_type != DistributedType.NO
    if accelerator.num_processes != launched or not is_connected:
        raise InputError(f"{launched} processes were launched but Accelerate runs {accelerator.distributed_type}")
    logger.info(
        "engine: %s, %d processes, %s, %s arithmetic",
        accelerator.distributed_type.value,
        accelerator.num_processes,
        accelerator.device.type,
        "bfloat16" if bf16 else "the weights'",
    )
    return accelerator


def without_compiled_operators() -> None:
    """Keep DeepSpeed from compiling its shared-memory exchange at the first start on a CPU, which takes minutes."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
