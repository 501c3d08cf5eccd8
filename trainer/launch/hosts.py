"""The nodes of a launch: this machine, hosts that ssh reaches, or the nodes of a Slurm allocation.

Every node has the same placement, the same paths and the same environments. A process on another node runs under
keep.py there, whose standard input ssh or srun holds open: when this launch ends, so does everything that it started.
"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rekatrain.data.errors import InputError
from rekatrain.trainer.launch.processes import on_node
from rekatrain.trainer.launch.section import LaunchConfig

# Variables that a process on a host reached by ssh gets: those of the libraries of a run. srun hands all on.
SHARED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|HTTPS?_PROXY|NO_PROXY)$|"
    r"(HF_|TRANSFORMERS_|TOKENIZERS_|VLLM_|NCCL_|GLOO_|UCX_|CUDA_HOME|TORCH_|OMP_|MKL_|MALLOC_|WANDB_|REKATRAIN_|"
    r"ACCELERATE_|DS_|PYTORCH_|TRITON_|XDG_|TMPDIR)",
    re.IGNORECASE,
)
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
# A step beside the one that runs the launch; its output comes line by line.
SRUN = ("srun", "--overlap", "--nodes=1", "--ntasks=1", "--unbuffered", "--export=ALL")
REACH_SECONDS = 30.0
LOCAL = ("localhost", "127.0.0.1")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A node.

    address:     at which servers listen and the trainers meet
    name:        as the user or Slurm names it; empty for this machine where nobody does
    prefix:      words that start a program there; none for this machine
    environment: variables that a program there does not inherit
    """

    address: str
    name: str = ""
    prefix: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def find_hosts(config: LaunchConfig) -> list[Host]:
    """Return the nodes, this machine first; InputError for an allocation that cannot be read, or a launch per task."""
    if (task := os.environ.get("SLURM_PROCID", "0")) not in ("", "0"):
        raise InputError(
            f"this is task {task} of an srun, and the launch of task 0 starts the processes of all nodes: leave srun "
            "out, as recipes/slurm/launch.sbatch does, or give it --ntasks=1"
        )
    if config.hosts is not None:
        first, *others = config.hosts
        shared = {name: value for name, value in os.environ.items() if SHARED.match(name)}
        address = "127.0.0.1" if not others else _address(first)
        name = "" if not others and first in LOCAL else _address(first)
        remote = [Host(address=_address(host), prefix=[*SSH, host], environment=shared) for host in others]
        return [Host(address=address, name=name), *remote]
    # Within a step of srun, SLURM_NNODES is the number of its nodes.
    variable = "SLURM_JOB_NUM_NODES" if "SLURM_JOB_NUM_NODES" in os.environ else "SLURM_NNODES"
    number = os.environ.get(variable, "1")
    if not number.isdecimal() or int(number) == 0:
        raise InputError(f"{variable} is {number!r}, which is no number of nodes: correct it, or unset it")
    if int(number) == 1:
        return [Host(address="127.0.0.1")]
    names = _slurm_names(os.environ.get("SLURM_JOB_NODELIST", ""))
    here = os.environ.get("SLURMD_NODENAME", names[0])
    if here not in names:
        raise InputError(f"this node, {here}, is none of the Slurm allocation's: {', '.join(names)}")
    others = [name for name in names if name != here]
    num_gpus = os.environ.get("SLURM_GPUS_ON_NODE")
    gpus = [f"--gpus-per-node={num_gpus}"] if num_gpus else []
    return [
        Host(address=here, name=here),
        *(Host(address=name, prefix=[*SRUN, *gpus, f"--nodelist={name}"]) for name in others),
    ]


def check_hosts(hosts: Sequence[Host]) -> None:
    """Raise InputError unless the first node is this machine, and each other can be reached and sees this folder."""
    if hosts[0].name:
        _check_here(hosts[0].name)
    for host in hosts:
        if not host.prefix:
            continue
        probe = on_node(host.prefix, ["test", "-d", os.getcwd()])
        name = host.prefix[0]
        try:
            done = subprocess.run(
                probe, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=REACH_SECONDS
            )
        except FileNotFoundError:
            raise InputError(f"{name} is not installed here, but the launch has several nodes") from None
        except subprocess.TimeoutExpired:
            raise InputError(f"{host.address} does not respond to {name} within {REACH_SECONDS:g} s") from None
        lines = done.stderr.strip().splitlines()
        if done.returncode == 1 and not lines:
            raise InputError(f"{host.address} does not see the folder {os.getcwd()!r}: all nodes need the same paths")
        if done.returncode != 0:
            why = lines[-1] if lines else f"status {done.returncode}"
            raise InputError(f"{host.address} cannot be reached by {name}: {why}")


def check_meeting_port(hosts: Sequence[Host], port: int) -> None:
    """Raise InputError if something listens at the port of this node at which the trainers of several nodes meet."""
    if len(hosts) == 1:
        return
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise InputError(
                f"launch.main_process_port {port} cannot be used here ({error.strerror}): end what listens there, or "
                "choose another"
            ) from None


def _check_here(address: str) -> None:
    """Raise InputError unless a server of this machine can listen at the address."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
        family, kind, protocol, _, name = found[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.bind(name)
    except OSError as error:
        raise InputError(
            f"{address}, the first node, is not this machine ({error.strerror or error}): run the launch there, "
            "or name this machine first in launch.hosts"
        ) from None


def _address(host: str) -> str:
    """Return the name at which processes reach a host, without the user of ssh."""
    name = host.rpartition("@")[2]
    return socket.gethostname() if name in LOCAL else name


def _slurm_names(text: str) -> list[str]:
    """Return the names of a list of nodes, as `scontrol` expands it."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError(
            "SLURM_NNODES is set, but scontrol is not installed here: name the nodes in launch.hosts"
        ) from None
    names = done.stdout.split()
    if done.returncode != 0 or not names:
        raise InputError(f"scontrol cannot expand the nodes {text!r}: {done.stderr.strip() or 'it printed nothing'}")
    return names
