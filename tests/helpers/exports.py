"""A tiny model in the Reka format, trained by the real command line, and the servers of its exports."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import accelerate
import httpx2
from openai import OpenAI
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.cli import main
from tests.conftest import tiny_llama

QUESTION = [{"role": "human", "content": "3 + 3 ="}]
# The answer that the model learns by heart.
ANSWER = " <reasoning>\nTwice 3.\n</reasoning>\n\n6 <sep>"
# Stands in for the command `vllm`, which looks up a distribution's name that vLLM's builds for CPUs do not have.
VLLM = """#!/bin/sh
[ "$1" = serve ] || exit 1
model=$2
shift 2
exec "$VLLM_PYTHON" -m vllm.entrypoints.openai.api_server --model "$model" "$@"
"""
TRANSFORMERS = """#!/bin/sh
exec "$(dirname "$VLLM_PYTHON")/transformers" "$@"
"""
CPU = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--host", "127.0.0.1"]
READY_SECONDS = 600


def servable_llama(tokenizer: PreTrainedTokenizerFast, **changes: object) -> LlamaForCausalLM:
    """Return a random Llama with heads of 64, for which vLLM has kernels, and sizes that 256 does not divide."""
    sizes: dict[str, object] = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
    }
    return tiny_llama(tokenizer, **(sizes | changes))


def write_sft_recipe(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a model, rows with a reasoning and a recipe of 60 steps of LoRA into `folder`; return the recipe's path."""
    servable_llama(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n, "reasoning": f"Twice {n}."} for n in range(1, 7)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "stage": "sft",
        "output_dir": str(folder / "run"),
        "model": {"pretrained_model_name_or_path": str(folder / "model"), "dtype": "float32"},
        # Scales that differ between modules: vLLM has one for all.
        "lora": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {"v_proj": 32},
        },
        "dataset": {"path": str(folder / "sums.jsonl"), "format": "prompt_answer"},
        "sft": {"max_steps": 60, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "logging_steps": 5},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder / "recipe.yaml"


def train_run(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Train the recipe of `write_sft_recipe`; return the run's folder."""
    main(["train", str(write_sft_recipe(folder, tokenizer))])
    return folder / "run"


def ask(client: OpenAI, messages: list[dict[str, str]], *, model: str = "any", **options: Any) -> Any:
    """Request a greedy answer, or with `stream=True` its chunks. Any: the client's own types."""
    settings = {"max_tokens": 60, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=messages, **settings)  # type: ignore[arg-type]


@contextmanager
def serve_by_vllm(export: Path, work: Path, *options: str) -> Iterator[str]:
    """Serve the export with a real vLLM on a CPU, by its own start script; yield the url.

    work: a folder for the server's log; options: of `vllm serve`
    """
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with _served(["bash", f"{export}/serving/vllm.sh", *CPU, *options], work, "vllm", VLLM, settings) as url:
        yield url


@contextmanager
def serve_by_transformers(export: Path, work: Path, *options: str) -> Iterator[str]:
    """Serve the export with `transformers serve`, by its own start script; yield the url.

    The environment of VLLM_PYTHON has the packages of transformers[serving], too, but for accelerate, which is lent.
    """
    (work / "packages").mkdir()
    for path in Path(accelerate.__file__).parents[1].glob("accelerate*"):
        (work / "packages" / path.name).symlink_to(path)
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(work / "packages")}
    command = ["bash", f"{export}/serving/transformers_serve.sh", "--host", "127.0.0.1", *options]
    with _served(command, work, "transformers", TRANSFORMERS, settings) as url:
        yield url


@contextmanager
def serve_by_llama_cpp(export: Path, work: Path, file: str) -> Iterator[str]:
    """Serve a file of the export with llama.cpp's server, by its own start script; yield the url.

    llama_server.py stands in for the program's options.
    """
    stand_in = f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("llama_server.py")}" "$@"\n'
    command = ["bash", f"{export}/serving/llama_server.sh", file, "--host", "127.0.0.1"]
    with _served(command, work, "llama-server", stand_in, {}) as url:
        yield url


@contextmanager
def _served(command: list[str], work: Path, program: str, script: str, settings: dict[str, str]) -> Iterator[str]:
    """Run a start script with a free port, in which `program` is `script`; yield the server's url once it is ready."""
    (work / "bin").mkdir()
    (work / "bin" / program).write_text(script)
    (work / "bin" / program).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = kept | settings | {"PATH": f"{work / 'bin'}:{os.environ['PATH']}"}
    log = work / f"{program}.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", port],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + READY_SECONDS
    try:
        while not _is_ready(url):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        with suppress(ProcessLookupError):  # it has ended on its own
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False
