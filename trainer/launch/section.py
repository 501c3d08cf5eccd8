"""Every key of a recipe's `launch:` section, which `rekatrain launch` reads. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import FiniteFloat

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keywords
from rekatrain.data.ranges import Count, CountOrZero, Seconds

Port = Annotated[int, Ge(1), Le(65535)]
# The environment variable of the trainers that a launch starts.
LAUNCHED = "REKATRAIN_LAUNCHED"
# Options of vLLM that the recipe or the launch decides.
DECIDED = {
    "model": "model.pretrained_model_name_or_path",
    "host": "the launch",
    "port": "launch.port",
    "dtype": "model.dtype and rloo.bf16",
    "revision": "model.revision",
    "tokenizer": "the model",
    "tokenizer_revision": "model.revision",
    "served_model_name": "the run",
    "tensor_parallel_size": "launch.tensor_parallel_size",
    "gpu_memory_utilization": "launch.gpu_memory_utilization",
    "enable_sleep_mode": "launch.placement",
    "logprobs_mode": "the run",
    "generation_config": "the run",
    "enable_lora": "the section lora",
    "max_lora_rank": "the section lora",
    "max_loras": "the section lora",
    "weight_transfer_config": "rloo.vllm_weight_transfer",
    "api_key": "nothing: rollouts send no key",
}


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Settings of `rekatrain launch`. What is left out is decided by the plan of the recipe and by this machine.

    gpus:                   GPUs of each node that the run uses; all that are visible by default; 0: the CPU
    placement:              split: some GPUs serve, the others train; shared: servers and training use the same GPUs by
                            turns, under ZeRO-3 and vLLM's sleep mode; in_process: no server, the trainers sample
    servers:                number of vLLM servers of each node
    tensor_parallel_size:   GPUs of one server
    gpu_memory_utilization: fraction of a GPU's memory that a server uses
    server_options:         further options of vLLM, such as {max_num_seqs: 256}
    server_environment:     environment variables of the servers, such as {VLLM_CPU_KVCACHE_SPACE: 4}
    vllm_python:            Python of the environment that has vLLM; by default that of the environment variable
                            VLLM_PYTHON, or this one
    port:                   port of the first server of a node, the next one has the next; by default any free ports
    server_start_timeout:   seconds until a started server must respond
    max_server_restarts:    number of times that each server is started again after it has died
    config_file:            launch file of Accelerate: a path, or the name of a shipped one, such as zero2.yaml
    num_processes:          training processes of each node
    hosts:                  names of the nodes, reached by ssh, the one that runs the launch first; by default those of
                            the Slurm allocation in which it runs, or this machine alone
    main_process_port:      port at which the training processes of several nodes meet
    """

    gpus: CountOrZero | None = None
    placement: Literal["split", "shared", "in_process"] | None = None
    servers: Count | None = None
    tensor_parallel_size: Count | None = None
    gpu_memory_utilization: Annotated[FiniteFloat, Gt(0), Lt(1)] | None = None
    server_options: dict[str, Any] = field(default_factory=dict)
    server_environment: dict[str, Any] = field(default_factory=dict)
    vllm_python: str | None = None
    port: Port | None = None
    server_start_timeout: Seconds = 1800.0
    max_server_restarts: CountOrZero = 3
    config_file: str | None = None
    num_processes: Count | None = None
    hosts: list[str] | None = None
    main_process_port: Port = 29500

    def __post_init__(self) -> None:
        for key in ("vllm_python", "config_file"):
            if getattr(self, key) is not None and not getattr(self, key).strip():
                raise InputError(f"launch.{key} is empty: write a path, or remove the key")
        if self.hosts is not None:
            self._check_hosts(self.hosts)
        for name, value in self.server_options.items():
            _check_option(name, value)
        for name, value in self.server_environment.items():
            if not name or "=" in name or "\0" in name or not isinstance(value, str | int | float):
                raise InputError(f"launch.server_environment.{name} is {value!r}; it should be NAME: text or a number")

    def _check_hosts(self, hosts: list[str]) -> None:
        if not hosts:
            raise InputError("launch.hosts names no host: list them, this machine first, or remove the key")
        for host in hosts:
            if not host or host.startswith("-") or not all(letter.isalnum() or letter in ".-_:@" for letter in host):
                raise InputError(f"launch.hosts has {host!r}, which is no name of a host")
        if len(set(hosts)) < len(hosts):
            raise InputError(f"launch.hosts names a host twice: {', '.join(hosts)}")


def _check_option(name: str, value: object) -> None:
    key = name.replace("-", "_").strip("_")
    if key in DECIDED:
        raise InputError(f"launch.server_options.{name} is decided by {DECIDED[key]}: remove it from server_options")
    if not name.replace("-", "").replace("_", "").isalnum() or name.startswith(("-", "_")):
        raise InputError(f"launch.server_options.{name} is no option of vLLM: write its name without dashes in front")
    if not isinstance(value, str | int | float | dict | list):
        raise InputError(f"launch.server_options.{name} is {value!r}: write a value, or true or false for a switch")


def check_no_servers(config: LaunchConfig) -> None:
    """Raise InputError if the section starts servers, for a run whose `rloo.vllm_server_base_url` names some."""
    if served := served_keys(config):
        raise InputError(
            f"launch.{served[0]} starts a server, but rloo.vllm_server_base_url names servers that run already: "
            "remove one of them"
        )


def served_keys(config: LaunchConfig) -> list[str]:
    """Return the keys that say something about servers."""
    keys = ("servers", "tensor_parallel_size", "gpu_memory_utilization", "server_options", "server_environment")
    served = [key for key in (*keys, "vllm_python", "port") if getattr(config, key)]
    return ([f"placement {config.placement}"] if config.placement in ("split", "shared") else []) + served


def check_launch(section: Mapping[str, Any], *, stage: str, rloo: Mapping[str, Any]) -> LaunchConfig:
    """Return the settings of a section `launch:`; InputError for what is wrong with it, whatever the machine is.

    rloo: the recipe's section `rloo`
    """
    check_keywords("launch", section, LaunchConfig)
    config = LaunchConfig(**section)
    served = served_keys(config)
    if stage != "rloo" and served:
        raise InputError(f"launch.{served[0]} is for rollouts, which stage {stage} does not have: remove it")
    if config.placement == "in_process" and served:
        raise InputError(f"launch.{served[0]} needs a server, and launch.placement is in_process: remove one of them")
    if config.placement == "shared":
        if rloo.get("max_staleness"):
            raise InputError(
                f"launch.placement shared samples and trains by turns, but rloo.max_staleness is "
                f"{rloo['max_staleness']}: set it to 0, or placement to split"
            )
        if rloo.get("vllm_weight_transfer") == "nccl":
            raise InputError(
                "rloo.vllm_weight_transfer nccl needs other GPUs than those that train: set it to folder, or "
                "launch.placement to split"
            )
        if config.servers is not None and config.servers > 1:
            raise InputError(
                f"launch.servers is {config.servers}, but with placement shared one server spans the GPUs of a node: "
                "remove the key"
            )
    return config
