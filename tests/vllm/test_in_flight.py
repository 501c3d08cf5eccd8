"""Weights updated in flight, `max_staleness` above 1, on the real vLLM that VLLM_PYTHON names.

The trainer is killed by SIGKILL and resumed; the server stays up. Whether an update comes in the middle of a
completion, and whether groups wait at the kill, depends on the machine: test_staleness.py makes both happen, with
stand-ins.
"""

import os
import signal
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.vllm.conftest import logprob_by_versions, per_version, read_waiting
from tests.vllm.test_server import LiveServer, folder, run, server, start_run, wait_for_step, write_recipe  # noqa: F401

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python with vLLM"),
]

# Below the last layer nothing is trained, so the KV cache, which an update leaves as it is, does not depend on it, and
# one checkpoint gives the exact log-probability of a token that follows tokens of other versions.
LAST = {"r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], "layers_to_transform": [1]}
SETTINGS = {
    **{"max_staleness": 3, "importance_sampling_level": "token", "importance_sampling_correction": "token_truncate"},
    **{"learning_rate": 3e-2, "max_completion_length": 100, "max_steps": 10, "save_steps": 1, "prompts_per_step": 2},
    "per_device_generation_batch_size": 8,  # two groups in flight: others wait, and begin with other weights
}
STEPS, KILLED_AFTER = 10, 2


def test_tokens_have_their_versions_on_vllm_after_a_kill(
    folder: Path,  # noqa: F811
    server: LiveServer,  # noqa: F811
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    recipe = write_recipe(folder, "flight", server.url, LAST, **SETTINGS)
    process = start_run(folder, recipe)
    # Kill the trainer at the first checkpoint with sampled groups that are not trained.
    for step in range(KILLED_AFTER, STEPS - 1):
        wait_for_step(folder / "flight/metrics.jsonl", step, process)
        process.send_signal(signal.SIGSTOP)
        newest = max((folder / "flight/checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        if waiting := read_waiting(newest):
            break
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()

    metrics, rollouts = run(folder, recipe, "--resume")

    # Nothing is lost: all steps are there, and groups that were sampled before the kill are trained with their tokens.
    assert [step["step"] for step in metrics] == list(range(1, STEPS + 1)) and len(rollouts) == STEPS * 2 * 4
    for (step, index), ids in waiting.items():
        trained = [r["completion_ids"] for r in rollouts if (r["step"], r["prompt_index"]) == (step + 1, index)]
        assert trained == ids

    # Each token has the log-probability under the checkpoint that its version names.
    policies = per_version(str(folder / "flight"), folder / "model", LAST)
    for record in rollouts:
        prompt = tokenizer.encode(record["prompt"], add_special_tokens=False)
        expected = logprob_by_versions(record, policies, tokenizer, prompt)
        assert record["sampler_logprob"] == pytest.approx(expected, abs=2e-3)
    ages = [record["step"] - 1 - version for record in rollouts for version, _ in record["weight_versions"]]
    assert 1 <= max(ages) <= 3 and min(ages) >= 0
    assert max(step["staleness/max"] for step in metrics) == max(ages)
    assert sum(name.endswith("-live") for name in server.models()) == 1  # one adapter for all versions
