"""Servers that share the trainer's GPUs: they sleep while it trains, in the order that vLLM's memory needs.

The stand-in rejects what a sleeping vLLM cannot do; what it cannot show is the memory itself.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.trainer.cli import main
from rekatrain.trainer.rloo.sampler.vllm.sleep import ASLEEP
from rekatrain.trainer.run.records import read_records
from tests.vllm.stand_in import StandIn, one_thread

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
REWARD = """
def letters(completions, **kwargs):
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]
"""
# What a request needs in memory.
NEEDS = {
    "load_lora_adapter": {"weights"},
    "collective_rpc": {"weights"},
    "completions": {"weights", "kv_cache"},
}


class SleepingStandIn(StandIn):
    """A stand-in with vLLM's sleep mode.

    resident: what is in memory; level 2 also loses the weights
    log:      sleeps, wake-ups and uses, in order; equal ones in a row once
    wrong:    requests that vLLM would hold back, or answer from lost weights
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.resident, self.has_weights = {"weights", "kv_cache"}, True
        self.log: list[str] = []
        self.wrong: list[str] = []

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        name, _, query = path.removeprefix("/v1").strip("/").partition("?")
        if name in ("sleep", "wake_up"):
            return self._change(name, query)
        if name == "update_weight_version" and body["new_version"] == ASLEEP:
            self.weight_version = ASLEEP
            return 200, {"success": True}
        if name == "is_sleeping":
            return 200, {"is_sleeping": len(self.resident) < 2}
        is_check = (body or {}).get("lora_path") == "" or (body or {}).get("method") == "list_loras"
        if name in NEEDS and not is_check:
            is_lost = name == "completions" and not self.has_weights
            if not NEEDS[name] <= self.resident or is_lost:
                self.wrong.append(f"{name} with {sorted(self.resident)}{', weights lost' if is_lost else ''}")
                return 500, {"error": {"message": f"Call to {name} method failed"}}
            self.has_weights |= name == "collective_rpc"
            self._note({"completions": "sample"}.get(name, "load"))
        return super().__call__(path, body)

    def _change(self, name: str, query: str) -> tuple[int, Any]:
        self._note(f"{name} {query}")
        if name == "sleep":
            if not self.resident:
                self.wrong.append("sleep of a sleeping server")
            self.resident.clear()
            self.has_weights &= query == "level=1"
        else:
            tag = query.removeprefix("tags=")
            if tag not in ("weights", "kv_cache") or tag in self.resident:
                self.wrong.append(f"wake_up {query} with {sorted(self.resident)}")
            self.resident.add(tag)
        return 200, b""

    def _note(self, what: str) -> None:
        if self.log[-1:] != [what]:
            self.log.append(what)


@pytest.fixture
def server(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> SleepingStandIn:
    return SleepingStandIn(model_folder, tokenizer, seed=3)


@pytest.fixture
def stand_in(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> StandIn:
    return StandIn(model_folder, tokenizer, seed=3)


@pytest.fixture
def run(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    """Run two steps of RLOO -> metrics."""
    for name, numbers in (("sums", range(1, 9)), ("held_out", range(20, 24))):
        rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)

    def start(name: str, urls: str | list[str] | None, *, lora: dict | None = LORA, **rloo: Any) -> list[dict]:
        settings = {"max_steps": 2, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 12}
        settings |= {"beta": 0.1, "learning_rate": 3e-3, "vllm_server_base_url": urls, **rloo}
        tree = {
            "stage": "rloo",
            "output_dir": name,
            "seed": 3,
            "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
            "lora": lora,
            "dataset": {"path": "sums.jsonl", "format": "prompt_answer"},
            "eval_dataset": {"path": "held_out.jsonl", "format": "prompt_answer"},
            "rewards": {"my_rewards:letters": {"weight": 1.0}, "regex": {"pattern": "[a-m]"}},
            "evaluate": {"reward": "regex", "max_completion_length": 8, "temperature": 0.8, "num_generations": 4},
            "rloo": settings,
        }
        Path(f"{name}.yaml").write_text(json.dumps(tree))
        with one_thread():
            main(["train", f"{name}.yaml"])
        return read_records(tmp_path / name / "metrics.jsonl")

    return start


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "whole model"])
def test_servers_sleep_while_the_policy_trains(run, serve, server, lora) -> None:
    metrics = run("shared", serve(server).url, lora=lora, vllm_enable_sleep_mode=True)
    level = 1 if lora else 2
    turn = ["wake_up tags=weights", "load", "wake_up tags=kv_cache", "sample", f"sleep level={level}"]
    assert server.log == ["sample", f"sleep level={level}", *turn, *turn]  # first the checks of the server
    assert server.wrong == []
    expected = run("here", None, lora=lora)
    assert [step["reward"] for step in metrics] == [step["reward"] for step in expected]
    assert max(step["mismatch_logprob"] for step in metrics) < 1e-4


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "whole model"])
def test_evaluations_wake_and_sleep_too(run, serve, server, lora) -> None:
    run("shared", serve(server).url, lora=lora, vllm_enable_sleep_mode=True, eval_steps=1, eval_on_start=True)
    assert server.wrong == []
    assert server.log.count("sample") == 1 + 3 + 2 and server.log[-1].startswith("sleep")
    # The evaluation after a step and the next step have equal weights; dropped ones are loaded again.
    assert lora or server.log.count("load") == 5


def test_all_servers_sleep_together(run, serve, server, model_folder, tokenizer) -> None:
    other = SleepingStandIn(model_folder, tokenizer, seed=3)
    run("shared", [serve(server).url, serve(other).url], vllm_enable_sleep_mode=True)
    assert server.wrong == other.wrong == []
    assert [line for line in server.log if "sample" not in line] == [line for line in other.log if "sample" not in line]


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("asleep", "the vLLM server .* sleeps since an earlier run: start it again"),
        ("no sleep mode", "needs vLLM's development routes: start it by rekatrain launch with placement: shared"),
    ],
)
def test_server_that_cannot_sleep_is_rejected(run, serve, server, stand_in, capsys, state, error) -> None:
    server.resident.clear()
    answer = server if state == "asleep" else stand_in
    with pytest.raises(SystemExit):
        run("shared", serve(answer).url, vllm_enable_sleep_mode=True)
    assert re.search(error, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("rloo", "error"),
    [
        ({"vllm_server_base_url": None}, "rloo.vllm_enable_sleep_mode needs vLLM servers"),
        ({"max_staleness": 1, "importance_sampling_correction": "sequence_truncate"}, "set max_staleness to 0"),
        ({"vllm_weight_transfer": "nccl"}, "vllm_weight_transfer to folder"),
    ],
)
def test_sleep_mode_needs_turns(run, capsys, rloo, error) -> None:
    with pytest.raises(SystemExit):
        run("wrong", "http://127.0.0.1:9", vllm_enable_sleep_mode=True, **rloo)
    assert error in capsys.readouterr().err
