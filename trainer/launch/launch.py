"""`rekatrain launch RECIPE`: place, start and watch the vLLM servers and the trainers of a run.

rekatrain launch recipes/smollm2/rloo-vllm.yaml            # to the end of the run
rekatrain launch recipes/smollm2/rloo-vllm.yaml --resume   # go on after any end
rekatrain launch RECIPE --dry-run                          # print what would be started
"""

import logging
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch

from rekatrain.data.errors import InputError
from rekatrain.trainer.launch.commands import server_commands, train_arguments, trainer_commands
from rekatrain.trainer.launch.hosts import Host, check_hosts, check_meeting_port, find_hosts
from rekatrain.trainer.launch.nodes import Node, Placement
from rekatrain.trainer.launch.output import Output
from rekatrain.trainer.launch.placement import place
from rekatrain.trainer.launch.processes import Command
from rekatrain.trainer.launch.section import LaunchConfig, check_no_servers, served_keys
from rekatrain.trainer.launch.servers import Server, Servers
from rekatrain.trainer.launch.supervise import Supervisor
from rekatrain.trainer.models.continued import continue_adapter
from rekatrain.trainer.plan.machine import GB
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.sampler.vllm.serve import VLLM_PYTHON, check_vllm_python, has_vllm
from rekatrain.trainer.rloo.setup import prepare
from rekatrain.trainer.run.folder import RunFolder
from rekatrain.trainer.run.places import check_parent

logger = logging.getLogger(__name__)

# Bytes of a GPU that is assumed where this machine has none, as in `rekatrain plan`.
ASSUMED_GPU = 80 * GB


def launch(
    recipe: Recipe,
    recipe_path: Path,
    overrides: Sequence[str],
    *,
    resume: bool,
    dry_run: bool,
    skip_memory_check: bool,
) -> Supervisor | None:
    """Prepare the run of a recipe with the processes that its section `launch:` or the plan names; None if `dry_run`.

    Raises InputError for whatever is wrong and can be known before a process is started.

    recipe:                the checked recipe, with the overrides
    recipe_path, overrides: as the user wrote them, for the trainers
    """
    config = LaunchConfig(**(recipe.launch or {}))
    if recipe.rloo.get("vllm_server_base_url"):
        check_no_servers(config)
    recipe = continue_adapter(recipe)
    check_parent(Path(recipe.output_dir), "output_dir")
    folder = RunFolder(recipe.output_dir)
    folder.check(recipe, resume=resume)
    hosts = find_hosts(config)
    if not dry_run:
        folder.check_unlocked()
        check_hosts(hosts)
        check_meeting_port(hosts, config.main_process_port)
    node, missing = _find_node(config, hosts)
    if missing and not dry_run:
        raise InputError(missing)
    python = os.path.expanduser(config.vllm_python or os.environ.get(VLLM_PYTHON) or sys.executable)
    placement = place(recipe, config, node, has_vllm=_knows_vllm(config), ignores_memory=skip_memory_check)
    servers: list[Server] = []
    if placement.server_gpus:
        if not dry_run:
            check_vllm_python(python, "launch.vllm_python" if config.vllm_python else VLLM_PYTHON)
        ports = _choose_ports(config, len(placement.server_gpus))
        servers = server_commands(recipe, prepare(recipe), config, placement, hosts, ports, python)
    flags = [flag for flag, is_on in (("--resume", resume), ("--skip-memory-check", skip_memory_check)) if is_on]
    arguments = train_arguments(str(recipe_path), overrides, servers, placement, flags)
    trainers = trainer_commands(arguments, config, placement, hosts)
    if dry_run:
        print(_describe(recipe, config, placement, node, hosts))
        for command in (*(server.command for server in servers), *trainers):
            print(f"\n# {command.name}\n{_shell(command)}")
        sys.stdout.flush()
    if missing:
        raise InputError(missing)
    if dry_run:
        return None
    output = Output([command.name for command in (*(server.command for server in servers), *trainers)])
    output.say(_describe(recipe, config, placement, node, hosts))
    return Supervisor(
        Servers(servers, output, start_timeout=config.server_start_timeout, max_restarts=config.max_server_restarts),
        trainers,
        output,
        restarts_trainers=placement.kind == "shared",
    )


def _knows_vllm(config: LaunchConfig) -> bool:
    """Return True if vLLM is named somewhere, or the section says something about servers, or it is installed here."""
    return bool(os.environ.get(VLLM_PYTHON) or served_keys(config) or has_vllm(sys.executable))


def _find_node(config: LaunchConfig, hosts: Sequence[Host]) -> tuple[Node, str | None]:
    """Return the hardware of a node, and what this machine lacks, if the section wants more than it has."""
    found = torch.cuda.device_count()
    memory = torch.cuda.get_device_properties(0).total_memory if found else ASSUMED_GPU
    wanted = found if config.gpus is None else config.gpus
    missing = None
    if wanted > found and not hosts[0].prefix:
        has = f"has {found}" if found else "has none"
        missing = f"launch.gpus is {wanted}, but this machine {has} (visible): lower it, or remove the key"
    node = Node(
        num_gpus=wanted,
        gpu_memory=memory,
        host_memory=psutil.virtual_memory().total if found else None,
        num_nodes=len(hosts),
    )
    return node, missing


def _choose_ports(config: LaunchConfig, number: int) -> list[int]:
    """Return a free port for each server of a node; InputError if the section names one that is in use."""
    ports = []
    with ExitStack() as bound:  # until all are chosen
        for index in range(number):
            wanted = 0 if config.port is None else config.port + index
            free = bound.enter_context(socket.socket())
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                free.bind(("127.0.0.1", wanted))
            except (OSError, OverflowError) as error:
                raise InputError(
                    f"port {wanted} for server {index} cannot be used ({error}): end what listens there, or change "
                    "launch.port; without the key a free port is chosen"
                ) from None
            ports.append(free.getsockname()[1])
    return ports


def _describe(recipe: Recipe, config: LaunchConfig, placement: Placement, node: Node, hosts: Sequence[Host]) -> str:
    where = f"{len(hosts)} nodes, each with " if len(hosts) > 1 else ""
    num_servers, processes = len(placement.server_gpus), placement.num_processes
    each = len(placement.server_gpus[0]) if placement.server_gpus else 0
    parts = []
    if num_servers:
        size = f" of {each} GPU{'s' * (each > 1)}" if each else ""
        parts.append(f"{num_servers} vLLM server{'s' * (num_servers > 1)}{size}")
    on = f" on {len(placement.trainer_gpus)} GPU{'s' * (len(placement.trainer_gpus) > 1)}" if node.num_gpus else ""
    parts.append(f"{processes} training process{'es' * (processes > 1)}{on} ({placement.launch_file.name})")
    text = f"launch: {where}{placement.kind}: {', '.join(parts)}; {placement.reason}"
    if recipe.stage == "rloo" and not num_servers and not recipe.rloo.get("vllm_server_base_url"):
        text += "; no server" if config.placement else f"; no server, because no vLLM is known: set {VLLM_PYTHON}"
    return text


def _shell(command: Command) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    return " ".join([*map(shlex.quote, command.prefix), *variables, shlex.join(command.argv)])
