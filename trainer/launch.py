"""What a launcher started, and that it is really there."""

import logging
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from data.errors import InputError

logger = logging.getLogger(__name__)


def make_accelerator(*, bf16: bool) -> Accelerator:
    """Accelerate for one process or for data parallelism; what it really is gets logged, and must be what was launched.

    Raises InputError under DeepSpeed and FSDP, which shard what the in-process sampler needs whole.
    """
    for engine in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true":
            raise InputError(
                f"stage rloo samples in its own processes and cannot run under {engine}; "
                "launch it with recipes/accelerate/ddp.yaml and a lora: section"
            )
    accelerator = Accelerator(
        # Without a GPU, `Accelerator()` would leave launched processes unconnected and train each alone, silently.
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if bf16 else None,
        step_scheduler_with_optimizer=False,
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
