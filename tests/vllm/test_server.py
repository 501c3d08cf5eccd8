"""Rollouts by the real vLLM, started by `rekatrain serve-rollouts` with the Python that VLLM_PYTHON names.

The server runs a tiny random model on a CPU. The tests check that its weights are the trainer's at every step.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.run.records import read_records
from tests.helpers.forks import Launch, start_forked
from tests.helpers.rloo import open_reasoning

PROJECT = Path(__file__).parents[2]
READY_SECONDS = 240
RUN_SECONDS = 600
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
# Modules with other ranks and scales: vLLM has one scale for all.
PATTERNS = {**LORA, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32}}
REWARD = """
def letters(completions, **kwargs):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]
"""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python with vLLM"),
]


class LiveServer:
    """`rekatrain serve-rollouts` in a separate process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ,
            **{"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
            **{"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
        }
        recipe = write_recipe(self.folder, "serve", self.url, max_completion_length=100, top_k=40)
        command = [sys.executable, "-m", "rekatrain", "serve-rollouts", recipe]
        self.log = (self.folder / "server.log").open("a")
        self._process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        end = time.monotonic() + READY_SECONDS
        while not self._is_ready():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < end, "the server is not ready in time"
            time.sleep(0.5)

    def kill(self) -> None:
        """Kill the server and its engine at once, as a machine failure does."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.log.close()

    def models(self) -> list[str]:
        return [model["id"] for model in httpx2.get(f"{self.url}/v1/models").json()["data"]]

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health").status_code == 200
        except httpx2.TransportError:
            return False


def write_recipe(folder: Path, name: str, url: str, lora: dict | None = LORA, **rloo: object) -> str:
    settings = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 24}
    settings |= {"beta": 0.1, "learning_rate": 3e-3, "vllm_server_base_url": url}
    tree = {
        "stage": "rloo",
        "output_dir": str(folder / name),
        "seed": 3,
        "model": {"pretrained_model_name_or_path": str(folder / "model"), "dtype": "float32"},
        "lora": lora,
        "dataset": {"path": str(folder / "sums.jsonl"), "format": "prompt_answer"},
        "rewards": {"my_rewards:letters": {"weight": 1.0}},
        "rloo": settings | rloo,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(tree))
    return f"{name}.yaml"


def start_run(folder: Path, recipe: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rekatrain", "train", recipe, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def run(folder: Path, recipe: str, *arguments: str) -> tuple[list[dict], list[dict]]:
    """Run a recipe to its end -> metrics, rollouts."""
    process = start_run(folder, recipe, *arguments)
    _, output = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, output
    name = folder / recipe.removesuffix(".yaml")
    return read_records(name / "metrics.jsonl"), read_records(name / "rollouts.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with data, a reward and a model for vLLM's CPU kernels that sometimes reasons and sometimes ends."""
    folder = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer) + 20, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256},
        **{"initializer_range": 0.2, "tie_word_embeddings": False, "bos_token_id": eos, "eos_token_id": eos},
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[eos] = 0.0
        model.lm_head.weight[eos, 0] = 2.5
    open_reasoning(model, tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n} for n in range(1, 9)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    server = LiveServer(folder)
    yield server
    server.kill()


def assert_sampled_from_the_trainers_weights(metrics: list[dict]) -> None:
    assert all(step["staleness"] == 0 for step in metrics)
    assert max(step["mismatch_logprob"] for step in metrics) < 1e-4
    assert max(step["mismatch_kl"] for step in metrics) < 1e-6


NCCL = """
import torch
from vllm.distributed.weight_transfer.base import layerwise_groups
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from rekatrain.trainer.rloo.sampler.vllm.transfer import init_info, policy_source

module = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(2, 4)])})
source = policy_source(module)
metas = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
assert metas == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
assert [name for names, _ in source.iter_groups() for name in names] == [name for name, *_ in metas] and len(metas) == 4
info = init_info(rank=1, master_address="127.0.0.1", master_port=9, num_workers=4)
engine = WeightTransferTrainerFactory.trainer_init(info, client=None, source=source)  # 1: does not meet the servers
engine._broadcast(source, source.metadata())
print(info.world_size)
"""


def test_nccl_transfer_arguments_fit_vllms_classes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([os.environ["VLLM_PYTHON"], "-c", NCCL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "5"


def test_adapters_reach_the_server_at_every_step(folder: Path, server: LiveServer) -> None:
    metrics, rollouts = run(folder, write_recipe(folder, "adapter", server.url, PATTERNS))
    assert_sampled_from_the_trainers_weights(metrics)
    assert abs(metrics[2]["kl"]) > 1e-3  # an estimate, of either sign
    assert len(rollouts) == 3 * 16 and {record["finish_reason"] for record in rollouts} == {"eos", "length"}
    assert max(max(record["completion_ids"]) for record in rollouts) < 300  # none of the ids beyond the tokenizer
    assert len(server.models()) == 2  # the base model and the last adapter


def test_server_rollouts_off_policy_at_learning_rate_0_match(folder: Path, server: LiveServer) -> None:
    settings = {"max_staleness": 1, "importance_sampling_correction": "sequence_truncate", "learning_rate": 0.0}
    metrics, _ = run(folder, write_recipe(folder, "rest", server.url, **settings, temperature=0.7))
    assert [step["staleness"] for step in metrics] == [0, 1, 1]
    assert max(step["mismatch_logprob"] for step in metrics) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 40, "top_p": 0.9, "temperature": 1.5}, {"top_k": 30, "reasoning_budget": 9}],
    ids=["filters", "budget"],
)
def test_server_filters_and_budget_are_scored_as_sampled(folder: Path, server: LiveServer, settings: dict) -> None:
    name = "-".join(settings)
    metrics, rollouts = run(folder, write_recipe(folder, name, server.url, **settings, max_steps=2))
    assert_sampled_from_the_trainers_weights(metrics)
    # The reference is over all tokens, so kept tokens are less likely under it.
    assert metrics[0]["kl"] > 1
    forced = [record["num_forced"] for record in rollouts]
    if "reasoning_budget" not in settings:
        assert set(forced) == {0}
        return
    assert {0} < set(forced)
    for record in rollouts:
        opened, closed, _ = record["completion"].partition("\n</reasoning>\n\n")
        assert record["num_forced"] == 0 or ("<reasoning>" in opened and closed)
        assert len(record["completion_ids"]) <= 24


def wait_for_step(path: Path, step: int, process: subprocess.Popen[str]) -> None:
    while not path.exists() or len(read_records(path)) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def test_server_restart_does_not_stop_the_run(folder: Path, server: LiveServer) -> None:
    steps = 30
    recipe = write_recipe(folder, "killed", server.url, max_steps=steps, max_completion_length=100, save_steps=50)
    process = start_run(folder, recipe)
    wait_for_step(folder / "killed" / "metrics.jsonl", 2, process)
    server.kill()
    server.start()
    _, output = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, output
    assert "waiting for it" in output and "is up again" in output
    metrics = read_records(folder / "killed" / "metrics.jsonl")
    assert [step["step"] for step in metrics] == list(range(1, steps + 1))
    assert_sampled_from_the_trainers_weights(metrics)
    assert len(read_records(folder / "killed" / "rollouts.jsonl")) == steps * 16


@pytest.mark.launched
def test_processes_that_split_sequences_train_from_a_server(
    folder: Path, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(folder, "split", server.url)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    launch = Launch(num_processes=2, file="zero3.yaml")
    process = start_forked(folder, "-m", "rekatrain", "train", recipe, launch=launch)
    assert process.wait(RUN_SECONDS) == 0, process.output()
    assert "sequences: each 2 processes split the tokens" in process.output()
    metrics, rollouts = (read_records(folder / "split" / name) for name in ("metrics.jsonl", "rollouts.jsonl"))
    assert_sampled_from_the_trainers_weights(metrics)
    assert abs(metrics[2]["kl"]) > 1e-3 and len(rollouts) == 3 * 16


def test_whole_models_reach_the_server_at_every_step(folder: Path, server: LiveServer) -> None:
    # This must be the last test of this server: it replaces the server's base model.
    metrics, rollouts = run(folder, write_recipe(folder, "whole", server.url, None, learning_rate=1e-3))
    assert_sampled_from_the_trainers_weights(metrics)
    assert abs(metrics[2]["kl"]) > 1e-2 and len(rollouts) == 3 * 16
