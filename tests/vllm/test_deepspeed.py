"""Rollouts ahead of two processes under DeepSpeed's ZeRO-2, with stand-ins for the servers; killed and resumed."""

import json
import time
from pathlib import Path

import pytest

from rekatrain.trainer.run.records import read_records
from tests.helpers.forks import Launch, Process, kill_tree, start_forked
from tests.vllm.conftest import LORA, logprob_by_versions, per_version, read_waiting
from tests.vllm.stand_in import StandIn
from tests.vllm.test_staleness import AHEAD

STEPS, PROMPTS, KILLED_AFTER = 5, 4, 2


def start(file: str, *arguments: str) -> Process:
    launch = Launch(num_processes=2, file=file)
    return start_forked(Path.cwd(), "-m", "rekatrain", "train", "two.yaml", *arguments, launch=launch)


@pytest.mark.launched
@pytest.mark.parametrize(("file", "staleness"), [("zero2.yaml", 2)])
def test_zero_processes_sample_ahead_and_resume(
    run, serve, stand_in, model_folder, tokenizer, file: str, staleness: int
) -> None:
    other = StandIn(model_folder, tokenizer, seed=3)
    stand_in.pace = other.pace = 0.05  # a batch takes longer than a step, so updates come in the middle of completions
    urls = [serve(stand_in).url, serve(other).url]
    run("one", urls, **{**AHEAD, "max_steps": 1})
    tree = json.loads(Path("one.yaml").read_text()) | {"output_dir": str(Path("two").absolute())}
    settings = {"max_staleness": staleness, "prompts_per_step": PROMPTS, "max_steps": STEPS, "learning_rate": 3e-2}
    tree["rloo"] |= AHEAD | settings
    Path("two.yaml").write_text(json.dumps(tree))

    # 1. Kill both processes in the middle, and look into the newest checkpoint.
    process, records = start(file), Path("two/metrics.jsonl")
    while not records.exists() or len(read_records(records)) < KILLED_AFTER:
        assert process.poll() is None, process.output()
        time.sleep(0.05)
    kill_tree(process.pid)
    newest = max(Path("two/checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    waiting = read_waiting(newest)

    # 2. The resumed run trains the groups of the queue with the tokens that they had.
    process = start(file, "--resume")
    assert process.wait(240) == 0, process.output()
    rollouts = read_records(Path("two/rollouts.jsonl"))
    assert len(rollouts) == STEPS * PROMPTS * 4 and waiting
    for (step, index), ids in waiting.items():
        trained = [r["completion_ids"] for r in rollouts if (r["step"], r["prompt_index"]) == (step + 1, index)]
        assert trained == ids

    # 3. Each token has the log-probability under the checkpoint that its version names.
    policies = per_version("two", model_folder, LORA)
    for record in rollouts:
        prompt = tokenizer.encode(record["prompt"], add_special_tokens=False)
        expected = logprob_by_versions(record, policies, tokenizer, prompt)
        assert record["sampler_logprob"] == pytest.approx(expected, abs=1e-3)
    ages = {record["step"] - 1 - version for record in rollouts for version, _ in record["weight_versions"]}
    assert 1 <= max(ages) <= staleness and min(ages) >= 0
    assert any(len(record["weight_versions"]) > 1 for record in rollouts) == (staleness > 1)
