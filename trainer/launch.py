"""What a launcher asked for, and that it is really there.

Accelerate falls back in silence: a launch that it cannot serve becomes one process, or data parallelism, and trains on.
So what was asked is read from the environment that the launcher sets, and compared with what there is.
"""

import logging
import os
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from rekatrain.data.errors import InputError
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher asked for.

    engine:        one process, a copy of the model in each process, or DeepSpeed ZeRO
    zero_stage:    1 to 3; None without DeepSpeed, or where a DeepSpeed JSON file says it
    num_processes: over all machines
    """

    engine: Literal["single", "ddp", "deepspeed"]
    zero_stage: int | None
    num_processes: int

    def __str__(self) -> str:
        stage = "" if self.zero_stage is None else f" ZeRO-{self.zero_stage}"
        return f"{self.engine}{stage} in {self.num_processes} process{'es' if self.num_processes > 1 else ''}"


def read_launch() -> Launch:
    """What the launcher asked for, by its environment variables; before anything is initialized.

    Raises InputError for what would silently become something else: FSDP, `--cpu`, several processes of which one was
    started, and stage 0. Without a GPU, DeepSpeed's compiled operators are turned off here.
    """
    if _is_set("ACCELERATE_USE_FSDP"):
        raise InputError(
            "FSDP is asked for, which this program does not run; recipes/accelerate/zero3.yaml shards the same"
        )
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Accelerate's launcher of single processes names a master where it was asked for more than one.
    lost_processes = (
        "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    )
    if _is_set("ACCELERATE_USE_CPU") or lost_processes:
        raise InputError(
            "accelerate started one process, whatever was asked: take out --cpu, use_cpu and distributed_type NO or "
            "MULTI_CPU, or launch with a file of recipes/accelerate/; without a GPU they all run on the CPU"
        )
    if not _is_set("ACCELERATE_USE_DEEPSPEED"):
        return Launch(engine="ddp" if num_processes > 1 else "single", zero_stage=None, num_processes=num_processes)
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if stage == "0":
        raise InputError("zero_stage 0 shards nothing; launch with recipes/accelerate/ddp.yaml")
    if not torch.cuda.is_available():
        import deepspeed

        # It would be compiled at the first start, in minutes, and gloo does the same without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return Launch(engine="deepspeed", zero_stage=int(stage) if stage else None, num_processes=num_processes)


def adapt_to_device(plugin: DeepSpeedPlugin) -> None:
    """Let an optimizer that is offloaded be torch's where there is no GPU: DeepSpeed's takes minutes to compile."""
    if not torch.cuda.is_available():
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False


def check_engine(launch: Launch, accelerator: Accelerator) -> None:
    """Raise InputError unless `accelerator` runs what was launched."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    is_distributed = accelerator.distributed_type != DistributedType.NO
    found = Launch(
        engine="deepspeed" if plugin else "ddp" if is_distributed and accelerator.num_processes > 1 else "single",
        zero_stage=plugin.zero_stage if plugin and launch.zero_stage else None,
        num_processes=accelerator.num_processes,
    )
    if found != launch:
        raise InputError(f"the launcher asked for {launch}, but there is {found}: see recipes/accelerate/")


def announce(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Log the engine, its ZeRO stage, the world, the data types and the attention that a run really has."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        engine = f"DeepSpeed ZeRO-{accelerator.deepspeed_engine_wrapped.engine.zero_optimization_stage()}"
        for part in ("optimizer", "param"):
            device = zero.get(f"offload_{part}", {}).get("device", "none")
            engine += f", {part} offloaded to {device}" if device != "none" else ""
    else:
        engine = "one process" if accelerator.num_processes == 1 else "data parallel"
    config: PretrainedConfig = model.config  # type: ignore[assignment]  # as every model of transformers and peft has
    weights = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    arithmetic = {"no": "the weights'", "bf16": "bfloat16", "fp16": "float16"}[accelerator.mixed_precision]
    logger.info(
        "engine: %s; world size %d, %s; weights %s, arithmetic %s; attention %s",
        engine,
        accelerator.num_processes,
        accelerator.device.type,
        " and ".join(sorted(weights)),
        arithmetic,
        config._attn_implementation,
    )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
