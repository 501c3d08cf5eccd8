"""`rekatrain serve-rollouts`: a vLLM server with the options that a recipe's rollouts need.

rekatrain serve-rollouts RECIPE --port 8000        # becomes the server
rekatrain serve-rollouts RECIPE --print            # print the command, to add further vLLM options
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import torch

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.source import base_revision, find_source
from rekatrain.trainer.models.vllm_limits import MAX_RANKS, largest_rank
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.upstream import check_rollout_adapter
from rekatrain.trainer.rloo.sampler.vllm.responses import num_listed
from rekatrain.trainer.rloo.setup import RunSetup, prepare

# The environment variable with the Python of an environment that has vLLM, where that is not the trainer's.
VLLM_PYTHON = "VLLM_PYTHON"
# Without importing it, which takes seconds.
FIND_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The options of one server that the recipe does not decide.

    has_gpu:                False for a server on the CPU
    tensor_parallel_size:   number of its GPUs
    gpu_memory_utilization: fraction of their memory that it uses; None: vLLM's default
    enable_sleep_mode:      True if it gives its memory back while the policy trains
    others:                 further options of vLLM by name; a switch is True or False
    """

    host: str
    port: int
    has_gpu: bool
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    enable_sleep_mode: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)


def serve_rollouts(recipe: Recipe, *, host: str, port: int | None, tensor_parallel_size: int, print_only: bool) -> None:
    """Replace this process by the server, or print the command that starts it.

    port: None takes the port of the first server in the recipe
    """
    setup = prepare(recipe)
    if port is None:
        port = next((urlsplit(url).port for url in setup.config.vllm_server_urls), None) or 8000
    options = ServerOptions(
        host=host, port=port, has_gpu=torch.cuda.is_available(), tensor_parallel_size=tensor_parallel_size
    )
    arguments, environment = server_command(recipe, setup, options)
    python = os.environ.get(VLLM_PYTHON) or sys.executable
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    if print_only:
        print(" ".join([*(f"{key}={value}" for key, value in environment.items()), shlex.join(command)]))
        return
    check_vllm_python(python, VLLM_PYTHON)
    os.execve(python, command, {**_inherited(), **environment})


def _inherited() -> dict[str, str]:
    """Return the variables that vLLM's Python inherits; PYTHONPATH points into this environment, not into vLLM's."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def has_vllm(python: str) -> bool:
    """Return True if the environment of this Python has vLLM; OSError if the program cannot be started."""
    return subprocess.run([python, "-c", FIND_VLLM], env=_inherited(), capture_output=True).returncode == 0


def check_vllm_python(python: str, key: str) -> None:
    """Raise InputError unless the environment of this Python has vLLM; `key` is where the user names it."""
    try:
        is_there = has_vllm(python)
    except OSError as error:
        raise InputError(
            f"{key}: {python!r} cannot be started ({error.strerror}): write the path of the Python of an environment "
            "that has vllm>=0.30"
        ) from None
    if not is_there:
        raise InputError(
            f"{python} has no vLLM: install vllm>=0.30 in a separate environment and set the environment variable "
            f"{VLLM_PYTHON} to its Python"
        )


def server_command(recipe: Recipe, setup: RunSetup, server: ServerOptions) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the environment variables of a server that fits the recipe's run."""
    longest = max(len(prompt.ids) for prompt in setup.prompts) + setup.config.max_completion_length
    dtype = "bfloat16" if setup.config.bf16 else recipe.model.get("dtype", "bfloat16")
    source = find_source(recipe.model["pretrained_model_name_or_path"])
    options: dict[str, object] = {
        "model": source.base,
        "host": server.host,
        "port": server.port,
        "dtype": dtype,
        "max-model-len": longest,
        "tensor-parallel-size": server.tensor_parallel_size,
        # Log-probs of the distribution that tokens are drawn from, and no sampling defaults of the model's folder.
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
    }
    if setup.config.cast_lm_head_to_fp32:
        options["hf-overrides"] = json.dumps({"head_dtype": "float32"})
    if server.gpu_memory_utilization is not None:
        options["gpu-memory-utilization"] = server.gpu_memory_utilization
    if listed := num_listed(setup.config, setup.tokenizer):
        options["max-logprobs"] = listed
    if revision := base_revision(source, recipe.model.get("revision")):
        options |= {"revision": revision, "tokenizer-revision": revision}
    if setup.config.vllm_weight_transfer == "nccl":
        options["weight-transfer-config"] = json.dumps({"backend": "nccl"})
    flags = ["--enable-sleep-mode"] if server.enable_sleep_mode else []
    if not server.has_gpu:
        # On a CPU, vLLM 0.30 crashes when it prefills a prompt of a seeded request in chunks.
        flags.append("--no-enable-chunked-prefill")
    # Runtime adapters and weight versions need vLLM's development mode: do not expose the port to the network.
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if recipe.lora is not None:
        check_rollout_adapter(recipe.lora)
        rank = largest_rank(recipe.lora)
        flags.append("--enable-lora")
        options |= {"max-lora-rank": min(size for size in MAX_RANKS if size >= rank), "max-loras": 1}
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    arguments = [*flags, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    for name, value in server.others.items():
        arguments += _words(name.replace("_", "-"), value)
    return arguments, environment


def _words(name: str, value: object) -> list[str]:
    """Return the arguments of one option of vLLM."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
