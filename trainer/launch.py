"""What a launcher started, and that it is really there."""

import logging
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from data.errors import InputError

logger = logging.getLogger(__name__)


def make_accelerator(*, bf16: bool) -> Accelerator:
    """Accelerate as the launcher configured it; what it really is gets logged, and must be what was launched.

    Without a GPU, `Accelerator()` would leave launched processes unconnected and train each alone, and
    `Accelerator(cpu=True)` would turn a DeepSpeed launch into plain data parallelism, both without a word.
    """
    is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    has_gpu = torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=not has_gpu and not is_deepspeed,
        mixed_precision="bf16" if bf16 else None,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if is_deepspeed and not has_gpu else [],
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
