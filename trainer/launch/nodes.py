"""A placement of processes on the GPUs of a node, and the node itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rekatrain import RECIPES
from rekatrain.data.errors import InputError

LAUNCH_FILES = RECIPES / "accelerate"
# Fraction of a GPU that a server uses where it has the GPU alone: vLLM's default.
ALONE = 0.9


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The processes of each node.

    server_gpus:            for each server the indices of its GPUs among those of the node; no GPU: on the CPU
    trainer_gpus:           indices of the GPUs that train; none: on the CPU
    num_processes:          training processes of a node
    launch_file:            Accelerate's
    gpu_memory_utilization: fraction of a GPU for a server; None: vLLM's default
    cpu_cache:              GiB of KV cache of a server on the CPU; None on GPUs
    reason:                 one line for the user
    """

    kind: Literal["split", "shared", "in_process"]
    server_gpus: Sequence[Sequence[int]] = ()
    trainer_gpus: Sequence[int] = ()
    num_processes: int = 1
    launch_file: Path = LAUNCH_FILES / "single.yaml"
    gpu_memory_utilization: float | None = None
    cpu_cache: int | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Node:
    """The hardware of a node: number of GPUs, bytes of one, bytes of the host, and number of such nodes."""

    num_gpus: int
    gpu_memory: float
    host_memory: float | None = None
    num_nodes: int = 1


def find_launch_file(name: str) -> Path:
    """Return the path of a launch file, which may be the name of a shipped one."""
    for path in (Path(name).expanduser(), LAUNCH_FILES / name):
        if path.is_file():
            return path
    shipped = ", ".join(path.name for path in sorted(LAUNCH_FILES.glob("*.yaml")))
    raise InputError(f"launch.config_file is {name!r}: there is no such file; the shipped ones are {shipped}")
