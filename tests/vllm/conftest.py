"""Fixtures of runs with rollout servers: a run of RLOO, and a stand-in for vLLM."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.cli import main
from rekatrain.trainer.resume.states import read_states
from rekatrain.trainer.rloo.sampler.vllm import server_pool
from rekatrain.trainer.run.records import read_records
from tests.vllm.stand_in import StandIn, one_thread

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
REWARD = """
def letters(completions, **kwargs):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]
"""


@pytest.fixture
def run(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[dict], list[dict], dict]]:
    """Run RLOO for some steps -> metrics, rollouts, last weights."""
    rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n} for n in range(1, 9)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server_pool, "_BACK_OFF", lambda state: 0.02)

    def start(
        name: str,
        urls: list[str] | str | None,
        *arguments: str,
        lora: dict | None = LORA,
        model: Path = model_folder,
        **rloo: Any,
    ) -> tuple[list[dict], list[dict], dict]:
        tree = {
            "stage": "rloo",
            "output_dir": str(tmp_path / name),
            "seed": 3,
            "model": {"pretrained_model_name_or_path": str(model), "dtype": "float32"},
            "lora": lora,
            "dataset": {"path": "sums.jsonl", "format": "prompt_answer"},
            "rewards": {"my_rewards:letters": {"weight": 1.0}},
            "rloo": {
                **{"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 12},
                **{"beta": 0.1, "learning_rate": 3e-3, "vllm_server_base_url": urls},
                **rloo,
            },
        }
        Path(f"{name}.yaml").write_text(json.dumps(tree))
        with one_thread():
            main(["train", f"{name}.yaml", *arguments])
        last = max((tmp_path / name / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
        (weights,) = last.glob("*model.safetensors")
        folder = tmp_path / name
        return read_records(folder / "metrics.jsonl"), read_records(folder / "rollouts.jsonl"), load_file(weights)

    return start


class HoldingStandIn(StandIn):
    """Holds each group that is sampled ahead after its first token until an update comes in its middle."""

    def _stream(self, name: str, body: Any) -> Iterator[bytes]:
        begun_with, step = self._num_updates(), self.keys[body["seed"]][2]
        tokens = super()._stream(name, body)
        yield next(tokens)
        while step > begun_with == self._num_updates():
            time.sleep(0.01)
        yield from tokens

    def _num_updates(self) -> int:
        return 0 if self.weight_version == "default" else int(self.weight_version.split("-")[-2])


@pytest.fixture
def stand_in(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> StandIn:
    return StandIn(model_folder, tokenizer, seed=3)


def sampled(rollouts: list[dict]) -> list[tuple]:
    """Return ids, finish reason and reward of each completion, ordered by step and prompt."""
    ordered = sorted(rollouts, key=lambda record: (record["step"], record["prompt_index"]))
    return [(r["step"], r["prompt_index"], r["completion_ids"], r["finish_reason"], r["reward"]) for r in ordered]


def read_waiting(checkpoint: Path) -> dict[tuple[int, int], list[list[int]]]:
    """Return the ids of the groups that a checkpoint's queue holds, by (step, index of the prompt)."""
    queue = read_states(checkpoint)["server_rollouts"]
    keyed = [((group["step"], group["prompt_index"]), group) for group in queue["groups"]]
    keyed += [((group["key"][2], group["key"][3]), group) for group in queue["sampled"]]
    return {key: [completion["ids"].tolist() for completion in group["completions"]] for key, group in keyed}


def error_line(run: Callable, *arguments: Any, capsys: pytest.CaptureFixture[str], **rloo: Any) -> str:
    """Return the one line of error that a run exits with."""
    with pytest.raises(SystemExit) as caught:
        run("rejected", *arguments, **rloo)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0].split("error: ", 1)[1]


def per_version(name: str, base: Path, lora: dict | None) -> list[Any]:
    """Return the policies after 0, 1, ... updates of a run that has saved each."""
    checkpoints = sorted(Path(name, "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    first = LlamaForCausalLM.from_pretrained(base)
    if lora is None:
        return [first, *(LlamaForCausalLM.from_pretrained(path) for path in checkpoints)]
    return [first, *(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path) for path in checkpoints)]


def logprob_by_versions(record: dict, policies: list[Any], tokenizer: Any, prompt: list[int]) -> float:
    """Return the log-prob of a completion, each token by the weights that its record names."""
    versions = [version for version, num in record["weight_versions"] for _ in range(num)]
    ids = record["completion_ids"]
    total = 0.0
    for version in set(versions):
        with torch.no_grad():
            logits = policies[version](torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        logprobs = logits.log_softmax(dim=1)
        total += sum(logprobs[at, token].item() for at, token in enumerate(ids) if versions[at] == version)
    return total
