"""The launch that a plan is made for, from an Accelerate launch file or from the running process."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_type
from rekatrain.data.ranges import Count
from rekatrain.trainer.processes.launch import read_launch, read_sequence_parallel
from rekatrain.trainer.recipe.yaml_text import parse_yaml

GB = 1e9
ENGINES: dict[str, Literal["single", "ddp", "deepspeed"]] = {
    "NO": "single",
    "MULTI_GPU": "ddp",
    "MULTI_CPU": "ddp",
    "DEEPSPEED": "deepspeed",
}


@dataclass(frozen=True, kw_only=True)
class PlannedLaunch:
    """The processes of a run and the memory that each of them has.

    `trainer.processes.launch.Launch` is the engine that the launcher of this process requested. `PlannedLaunch` is any
    launch, running or not, and also has the memory, the nodes, the offload and the sequence parallelism.

    engine:             single (one process), ddp (a whole model in each process), deepspeed
    zero_stage:         DeepSpeed's ZeRO stage: 0 shards nothing, 1 the optimizer, 2 also gradients, 3 also parameters
    num_gpus:           processes on all nodes; on a CPU, each process has an equal part of its host instead of a GPU
    num_nodes:          number of hosts
    gpu_memory:         bytes of one GPU, or of one process's part of a host
    host_memory:        bytes of one host; None if it is not known, then it is not checked
    offload_optimizer:  True if optimizer states and float32 weights are on the host
    offload_parameters: True if parameters are on the host (ZeRO-3)
    sequence_parallel:  number of processes that split each sequence (Ulysses)
    is_cpu:             True without a GPU: everything is on the host
    """

    engine: Literal["single", "ddp", "deepspeed"] = "single"
    zero_stage: int = 0
    num_gpus: int = 1
    num_nodes: int = 1
    gpu_memory: float = 80 * GB
    host_memory: float | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    sequence_parallel: int = 1
    is_cpu: bool = False

    def __post_init__(self) -> None:
        if self.num_gpus % self.num_nodes:
            raise InputError(
                f"{self.num_gpus} processes cannot be divided evenly among {self.num_nodes} nodes: choose a multiple"
            )
        if self.engine == "single" and self.num_gpus > 1:
            raise InputError(
                f"distributed_type NO with {self.num_gpus} processes would train the same model {self.num_gpus} times: "
                "use MULTI_GPU or DEEPSPEED"
            )
        if self.num_gpus % self.sequence_parallel:
            raise InputError(
                f"parallelism_config_sp_size {self.sequence_parallel} does not divide {self.num_gpus} processes: "
                "choose a divisor of them"
            )

    @property
    def gpus_per_node(self) -> int:
        """Number of processes on one host."""
        return self.num_gpus // self.num_nodes

    @property
    def num_copies(self) -> int:
        """Number of data-parallel groups of processes: each group trains on different sequences."""
        return self.num_gpus // self.sequence_parallel

    def shards(self, stage: int) -> int:
        """Return the number of shards of a tensor that ZeRO shards from `stage` on; 1 if it is not sharded."""
        return self.num_gpus if self.engine == "deepspeed" and self.zero_stage >= stage else 1

    def describe(self) -> str:
        """Describe the launch in one line.

        >>> PlannedLaunch(engine="deepspeed", zero_stage=3, num_gpus=8, offload_optimizer=True).describe()
        'DeepSpeed ZeRO-3 with optimizer on the host, 8 x 80 GB GPU, 1 node'
        """
        engine = f"DeepSpeed ZeRO-{self.zero_stage}" if self.engine == "deepspeed" else self.engine
        offload = [
            name
            for name, is_on in (("optimizer", self.offload_optimizer), ("parameters", self.offload_parameters))
            if is_on
        ]
        words = [
            engine + (f" with {' and '.join(offload)} on the host" if offload else ""),
            f"{self.num_gpus} x {self.gpu_memory / GB:.4g} GB {'of host memory, no GPU' if self.is_cpu else 'GPU'}",
            f"{self.num_nodes} node{'s' * (self.num_nodes > 1)}",
        ]
        if self.sequence_parallel > 1:
            words.append(f"{self.sequence_parallel} GPUs per sequence")
        return ", ".join(words)


def read_launch_file(
    path: Path, *, gpu_memory: float, host_memory: float | None = None, num_gpus: int | None = None
) -> PlannedLaunch:
    """Read an Accelerate launch file; raise InputError for an engine that the stages do not support.

    gpu_memory:  bytes of one GPU
    host_memory: bytes of one host; None if it is not known
    num_gpus:    processes in place of those of the file, as by `accelerate launch --num_processes`
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), f"the launch file {str(path)!r}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the launch file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a launch file is a mapping, not {type(tree).__name__}")
    if not tree.keys() & {"distributed_type", "num_processes", "compute_environment"}:
        raise InputError(f"{path} is no launch file: it has no distributed_type and no num_processes")
    for key in ("num_processes", "num_machines"):
        check_type(f"{path}: {key}", tree.get(key, 1), Count)
    for key in ("deepspeed_config", "parallelism_config"):
        check_type(f"{path}: {key}", tree.get(key), dict | None)
    kind = str(tree.get("distributed_type", "NO"))
    if kind not in ENGINES:
        raise InputError(f"{path}: distributed_type {kind} is not one of {', '.join(ENGINES)}")
    settings = tree.get("deepspeed_config") or {}
    parallelism = tree.get("parallelism_config") or {}
    is_cpu = kind == "MULTI_CPU" or tree.get("use_cpu") is True
    num_gpus, num_nodes = num_gpus or int(tree.get("num_processes", 1)), int(tree.get("num_machines", 1))
    launch = PlannedLaunch(
        engine="single" if num_gpus == 1 and kind != "DEEPSPEED" else ENGINES[kind],
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        sequence_parallel=int(parallelism.get("parallelism_config_sp_size", 1)),
        is_cpu=is_cpu,
        **(_zero(settings, path.parent) if kind == "DEEPSPEED" else {}),
    )
    return _on_host(launch) if is_cpu else launch


def current_launch() -> PlannedLaunch:
    """Return the launch of this process, with the memory of this machine."""
    requested = read_launch()
    settings: dict[str, Any] = {}
    if requested.engine == "deepspeed":
        names = ("ZERO_STAGE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE")
        variables = {name.lower(): os.environ.get(f"ACCELERATE_DEEPSPEED_{name}") for name in names}
        settings = _zero(
            {"deepspeed_" * (key == "config_file") + key: value for key, value in variables.items() if value}, Path()
        )
    launch = PlannedLaunch(
        engine=requested.engine,
        num_gpus=requested.num_processes,
        num_nodes=requested.num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", requested.num_processes)),
        host_memory=psutil.virtual_memory().total,
        sequence_parallel=read_sequence_parallel(),
        **settings,
    )
    if not torch.cuda.is_available():
        return _on_host(launch)
    device = int(os.environ.get("LOCAL_RANK", "0"))
    return replace(launch, gpu_memory=torch.cuda.get_device_properties(device).total_memory)


def _on_host(launch: PlannedLaunch) -> PlannedLaunch:
    total = psutil.virtual_memory().total
    return replace(launch, gpu_memory=total / launch.gpus_per_node, host_memory=None, is_cpu=True)


def _zero(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Read the ZeRO stage and the offload from a launch file's `deepspeed_config`, or the JSON file that it names."""
    name = settings.get("deepspeed_config_file")
    if name is None:
        return {
            "zero_stage": int(settings.get("zero_stage", 2)),  # Accelerate's default
            "offload_optimizer": settings.get("offload_optimizer_device", "none") != "none",
            "offload_parameters": settings.get("offload_param_device", "none") != "none",
        }
    paths = [path for path in (Path(name), folder / name) if path.exists()]
    if not paths:
        raise InputError(f"there is no DeepSpeed configuration at {name!r}")
    try:
        zero = json.loads(paths[0].read_text(encoding="utf-8")).get("zero_optimization", {})
    except ValueError as error:
        raise InputError(f"{paths[0]} is not valid JSON: {error}") from error
    devices = [zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")]
    return {
        "zero_stage": int(zero.get("stage", 0)),
        "offload_optimizer": devices[0] != "none",
        "offload_parameters": devices[1] != "none",
    }
