"""`rekatrain serve-rollouts`: a vLLM server with the options that a recipe's rollouts need.

rekatrain serve-rollouts RECIPE --port 8000        # becomes the server
rekatrain serve-rollouts RECIPE --print            # the line to start it with, to add options of vLLM's own
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from urllib.parse import urlsplit

import torch

from rekatrain.data.errors import InputError
from rekatrain.trainer.model_source import find_source
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.sampler.vllm.responses import num_listed
from rekatrain.trainer.rloo.setup import RunSetup, prepare

# Names the python of an environment with vLLM, whose requirements need not be those of training.
VLLM_PYTHON = "VLLM_PYTHON"
# Those that vLLM can be started with.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
UNSERVED_LORA = ("use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens")


def serve_rollouts(recipe: Recipe, *, host: str, port: int | None, tensor_parallel_size: int, print_only: bool) -> None:
    """Become the server, or print the line that starts it; without a port, that of the recipe's first server."""
    task = prepare(recipe)
    if port is None:
        port = next((urlsplit(url).port for url in task.config.vllm_server_urls), None) or 8000
    arguments, environment = server_command(
        recipe, task, host=host, port=port, tensor_parallel_size=tensor_parallel_size
    )
    python = os.environ.get(VLLM_PYTHON) or sys.executable
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    if print_only:
        print(" ".join([*(f"{key}={value}" for key, value in environment.items()), shlex.join(command)]))
        return
    # The path of modules is this environment's, not that one's.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if subprocess.run([python, "-c", "import vllm"], env=inherited, capture_output=True).returncode != 0:
        raise InputError(
            f"{python} has no vLLM: install vllm>=0.30 in an environment of its own, and name its python in "
            f"the variable {VLLM_PYTHON}"
        )
    os.execve(python, command, {**inherited, **environment})


def server_command(
    recipe: Recipe, task: RunSetup, *, host: str, port: int, tensor_parallel_size: int
) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a server that the recipe's run accepts."""
    longest = max(len(prompt.ids) for prompt in task.prompts) + task.config.max_completion_length
    dtype = "bfloat16" if task.config.bf16 else recipe.model.get("dtype", "bfloat16")
    options: dict[str, object] = {
        "model": find_source(recipe.model["pretrained_model_name_or_path"]).base,
        "host": host,
        "port": port,
        "dtype": dtype,
        "max-model-len": longest,
        "tensor-parallel-size": tensor_parallel_size,
        # What is drawn from, after temperature; and no defaults that the recipe does not know of.
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
    }
    if listed := num_listed(task.config, task.tokenizer):
        options["max-logprobs"] = listed
    if recipe.model.get("revision"):
        options["revision"] = recipe.model["revision"]
    if task.config.vllm_weight_transfer == "nccl":
        options["weight-transfer-config"] = json.dumps({"backend": "nccl"})
    flags = []
    if not torch.cuda.is_available():
        # On a CPU vLLM 0.30's engine dies on a seeded prompt that it prefills in parts: it sets the generator's offset.
        flags.append("--no-enable-chunked-prefill")
    # Adapters at runtime, and the versions of weights, are vLLM's development mode: keep the port off the network.
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if recipe.lora is not None:
        check_adapter(recipe.lora)
        rank = int(recipe.lora.get("r", 8))
        flags.append("--enable-lora")
        options |= {"max-lora-rank": min(size for size in LORA_RANKS if size >= rank), "max-loras": 1}
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    return [*flags, *(text for name, value in options.items() for text in (f"--{name}", str(value)))], environment


def check_adapter(lora: Mapping[str, object]) -> None:
    """Raise InputError for an adapter that vLLM does not load."""
    for key in UNSERVED_LORA:
        if lora.get(key):
            raise InputError(f"lora.{key} is not for rollouts by vLLM, which loads plain LoRA: take it out")
    if lora.get("bias", "none") != "none":
        raise InputError(f"lora.bias {lora['bias']} is not for rollouts by vLLM: set it to none")
    if int(str(lora.get("r", 8))) > max(LORA_RANKS):
        raise InputError(f"lora.r {lora['r']} is more than vLLM serves ({max(LORA_RANKS)})")
