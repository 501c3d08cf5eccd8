"""The commands of a launch: a vLLM server for each group of GPUs, and `accelerate launch` on each node."""

import json
import os
import sys
from collections.abc import Mapping, Sequence

from rekatrain.trainer.launch.hosts import Host
from rekatrain.trainer.launch.nodes import Placement
from rekatrain.trainer.launch.processes import Command
from rekatrain.trainer.launch.section import LAUNCHED, LaunchConfig
from rekatrain.trainer.launch.servers import Server
from rekatrain.trainer.processes.launched import LAUNCHER_VARIABLES
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.sampler.vllm.serve import ServerOptions, server_command
from rekatrain.trainer.rloo.setup import RunSetup

# GiB that vLLM uses for its cache without a GPU.
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"


def server_commands(
    recipe: Recipe,
    setup: RunSetup,
    config: LaunchConfig,
    placement: Placement,
    hosts: Sequence[Host],
    ports: Sequence[int],
    vllm_python: str,
) -> list[Server]:
    """Return the servers of all nodes.

    ports: one per server of a node, the same on all nodes
    """
    servers: list[Server] = []
    for host in hosts:
        for gpus, port in zip(placement.server_gpus, ports, strict=True):
            options = ServerOptions(
                host=host.address,
                port=port,
                has_gpu=bool(gpus),
                tensor_parallel_size=max(len(gpus), 1),
                gpu_memory_utilization=placement.gpu_memory_utilization,
                enable_sleep_mode=placement.kind == "shared",
                others=_usual_options(gpus) | config.server_options,
            )
            arguments, environment = server_command(recipe, setup, options)
            if placement.cpu_cache is not None and CPU_CACHE not in os.environ:
                environment[CPU_CACHE] = str(placement.cpu_cache)
            environment |= {name: str(value) for name, value in config.server_environment.items()}
            name = "server" if len(hosts) * len(ports) == 1 else f"server {len(servers)}"
            command = Command(
                name=name,
                argv=[vllm_python, "-m", "vllm.entrypoints.openai.api_server", *arguments],
                environment={**host.environment, **_visible(gpus), **environment},
                unset=["PYTHONPATH", *LAUNCHER_VARIABLES],  # PYTHONPATH points into this environment, not into vLLM's
                prefix=host.prefix,
            )
            servers.append(Server(command=command, url=f"http://{host.address}:{port}"))
    return servers


def trainer_commands(
    arguments: Sequence[str], config: LaunchConfig, placement: Placement, hosts: Sequence[Host]
) -> list[Command]:
    """Return `accelerate launch` of each node.

    arguments: those of `rekatrain train`
    """
    commands = []
    for index, host in enumerate(hosts):
        options = ["--config_file", str(placement.launch_file)]
        options += ["--num_processes", str(placement.num_processes * len(hosts)), "--num_machines", str(len(hosts))]
        if len(hosts) > 1:
            options += ["--machine_rank", str(index)]
            options += ["--main_process_ip", hosts[0].address, "--main_process_port", str(config.main_process_port)]
        launcher = [sys.executable, "-m", "rekatrain.trainer.accelerate_launch", *options]
        command = Command(
            name="trainer" if len(hosts) == 1 else f"trainer {index}",
            argv=[*launcher, "-m", "rekatrain", "train", *arguments],
            environment={**host.environment, **_past_proxies(hosts), **_visible(placement.trainer_gpus), LAUNCHED: "1"},
            unset=LAUNCHER_VARIABLES,
            prefix=host.prefix,
        )
        commands.append(command)
    return commands


def train_arguments(
    recipe_path: str, overrides: Sequence[str], servers: Sequence[Server], placement: Placement, flags: Sequence[str]
) -> list[str]:
    """Return the arguments of `rekatrain train` for a launch with these servers."""
    added = []
    if servers:
        added.append(f"rloo.vllm_server_base_url={json.dumps([server.url for server in servers])}")
    if placement.kind == "shared":
        added.append("rloo.vllm_enable_sleep_mode=true")
    return [recipe_path, *overrides, *added, *flags]


def _past_proxies(hosts: Sequence[Host]) -> Mapping[str, str]:
    """Return the variables with which requests to these nodes go past the proxies of the environment."""
    proxies = {name.lower(): value for name, value in os.environ.items() if name.lower().endswith("_proxy") and value}
    excepted = proxies.pop("no_proxy", "")
    if not proxies:
        return {}
    names = ",".join([*filter(None, excepted.split(",")), *(host.address for host in hosts)])
    return {"no_proxy": names, "NO_PROXY": names}


def _usual_options(gpus: Sequence[int]) -> dict[str, bool]:
    """Return options of vLLM that the section may change: without a GPU, compiling takes longer than small runs."""
    return {"disable_uvicorn_access_log": True} | ({} if gpus else {"enforce_eager": True})


def _visible(gpus: Sequence[int]) -> Mapping[str, str]:
    """Return the variable that shows a process some GPUs of those that this process sees; {} on a CPU."""
    if not gpus:
        return {}
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = [seen[gpu] if gpu < len(seen) else str(gpu) for gpu in gpus]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}
