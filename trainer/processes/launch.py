"""Read the distributed launch settings, and verify that Accelerate honored them.

Accelerate falls back in silence: a launch that it cannot serve becomes one process, or data parallelism, and trains on.
So the settings are read from the environment that the launcher makes, and compared with the engine that runs.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from transformers import PretrainedConfig

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.shipped import shipped_file

logger = logging.getLogger(__name__)

# Seconds that processes may wait for one that loads, compiles, evaluates or saves: 300 GB at 80 MB/s, an hour.
USUAL_DDP_TIMEOUT = 3600


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The settings of a launch.

    engine:        one process, a copy of the model in each process, or DeepSpeed ZeRO
    zero_stage:    1 to 3; None without DeepSpeed, or if a DeepSpeed JSON file sets it
    num_processes: number of processes on all nodes together
    """

    engine: Literal["single", "ddp", "deepspeed"]
    zero_stage: int | None
    num_processes: int

    def __str__(self) -> str:
        stage = "" if self.zero_stage is None else f" ZeRO-{self.zero_stage}"
        return f"{self.engine}{stage} in {self.num_processes} process{'es' if self.num_processes > 1 else ''}"


def read_launch() -> Launch:
    """Return the settings of this launch, read from the launcher's environment variables.

    Raises InputError for settings that Accelerate would replace in silence: FSDP, `--cpu`, several processes of which
    one was started, and ZeRO stage 0; and for an optimizer or a schedule that would replace the recipe's.
    """
    if _is_set("ACCELERATE_USE_FSDP"):
        raise InputError(
            "the launch sets FSDP, which rekatrain does not support; DeepSpeed ZeRO-3 shards the same tensors: launch "
            f"with {shipped_file('accelerate/zero3.yaml')}"
        )
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Accelerate's launcher of single processes names a master if more than one was requested.
    lost_processes = (
        "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    )
    if _is_set("ACCELERATE_USE_CPU") or lost_processes:
        raise InputError(
            "accelerate started one process, whatever the launch file says: remove --cpu, use_cpu and "
            "distributed_type NO or MULTI_CPU, or launch with one of the files in "
            f"{shipped_file('accelerate')}; without a GPU they all run on the CPU"
        )
    if not _is_set("ACCELERATE_USE_DEEPSPEED"):
        return Launch(engine="ddp" if num_processes > 1 else "single", zero_stage=None, num_processes=num_processes)
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if stage == "0":
        raise InputError(f"zero_stage 0 shards nothing: launch with {shipped_file('accelerate/ddp.yaml')}")
    file, config = _read_deepspeed_file()
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise InputError(f"{file} has a section {key}, and the recipe decides it: remove it from that file")
    return Launch(engine="deepspeed", zero_stage=int(stage) if stage else None, num_processes=num_processes)


def read_sequence_parallel() -> int:
    """Return the number of processes that split each sequence, read from the variables of `parallelism_config`.

    Raises InputError for the other kinds of parallelism that Accelerate has, which need FSDP, and for numbers of
    data-parallel processes that are not those of this launch.
    """
    if not _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    names = ("sp", "tp", "cp", "dp_replicate", "dp_shard")
    sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")) for name in names}
    for name in ("tp", "cp"):
        if sizes[name] > 1:
            raise InputError(
                f"parallelism_config_{name}_size is {sizes[name]}, but needs FSDP, which rekatrain does not support: "
                "split sequences with parallelism_config_sp_size"
            )
    num_copies = int(os.environ.get("WORLD_SIZE", "1")) // sizes["sp"]
    given = sizes["dp_replicate"] * sizes["dp_shard"]
    if given not in (1, num_copies):
        raise InputError(
            f"parallelism_config has {given} data-parallel processes (dp_replicate_size x dp_shard_size), but the "
            f"launch has {num_copies} of them: remove both keys, or make them so many"
        )
    return sizes["sp"]


def check_mixed_precision(stage: str, *, bf16: bool, fp16: bool = False) -> None:
    """Raise InputError if the launch sets another arithmetic than the recipe's section `stage`.

    `mixed_precision: "no"`, Accelerate's default, leaves it to the recipe.
    """
    recipes = "bf16" if bf16 else "fp16" if fp16 else "no"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", recipes):
        raise InputError(
            f"the launch has mixed_precision {launched}, but the recipe has {_arithmetic_keys(stage, recipes)}: set "
            'mixed_precision: "no" in the launch file, and let the recipe decide'
        )
    file, config = _read_deepspeed_file()
    for key in ("bf16", "fp16"):
        enabled = config.get(key, {}).get("enabled", "auto")
        if enabled not in ("auto", key == recipes):
            raise InputError(
                f"{file} has {key}.enabled {str(enabled).lower()}, but the recipe has "
                f"{_arithmetic_keys(stage, recipes)}: remove {key} from that file, or set it to auto"
            )


def _read_deepspeed_file() -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the launch's JSON file for DeepSpeed; an empty content without one."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not _is_set("ACCELERATE_USE_DEEPSPEED") or not file or not Path(file).is_file():
        return "", {}
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds a {type(config).__name__}, and settings of DeepSpeed are an object: fix it")
    return file, config


def _arithmetic_keys(stage: str, arithmetic: str) -> str:
    return f"{stage}.bf16 false" if arithmetic == "no" else f"{stage}.{arithmetic} true"


def prepare_deepspeed(launch: Launch) -> None:
    """Turn off DeepSpeed's compiled collectives if there is no GPU; call it before the processes are connected.

    They would be compiled at the first start, which takes minutes, and gloo does the same without them.
    """
    if launch.engine == "deepspeed" and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def adapt_to_device(plugin: DeepSpeedPlugin) -> None:
    """Have an offloaded optimizer be torch's if there is no GPU: DeepSpeed's takes minutes to compile."""
    if not torch.cuda.is_available():
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False


def keep_gradients_in_float32(plugin: DeepSpeedPlugin) -> None:
    """Have DeepSpeed add micro-batches up, and processes' gradients, in float32; a file of its settings may differ.

    Its default is the dtype of the weights: in bfloat16 a micro-batch of 1/512 of the sum so far adds nothing.
    """
    data_types = plugin.deepspeed_config.setdefault("data_types", {})
    data_types.setdefault("grad_accum_dtype", "fp32")
    plugin.deepspeed_config.setdefault("communication_data_type", "fp32")


def check_engine(launch: Launch, accelerator: Accelerator) -> None:
    """Raise InputError unless `accelerator` runs the engine of the launch settings."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    is_distributed = accelerator.distributed_type != DistributedType.NO
    actual = Launch(
        engine="deepspeed" if plugin else "ddp" if is_distributed and accelerator.num_processes > 1 else "single",
        zero_stage=plugin.zero_stage if plugin and launch.zero_stage else None,
        num_processes=accelerator.num_processes,
    )
    if actual != launch:
        raise InputError(
            f"the launch settings are {launch}, but accelerate runs {actual}: see the launch files in "
            f"{shipped_file('accelerate')}"
        )


def announce(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Log the engine, ZeRO stage, world size, data types and attention that the run has in fact."""
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
