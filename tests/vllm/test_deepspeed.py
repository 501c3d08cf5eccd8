"""Rollouts ahead of two processes under DeepSpeed's ZeRO, with stand-ins for the servers; killed and resumed."""

import json
import time
from pathlib import Path

import pytest

from rekatrain.trainer.run.records import read_records
from tests.helpers.forks import Launch, Process, kill_tree, start_forked
from tests.vllm.conftest import LORA, HoldingStandIn, logprob_by_versions, per_version, read_waiting
from tests.vllm.test_staleness import AHEAD

STEPS, PROMPTS, KILLED_AFTER = 7, 4, 2


def start(file: str, *arguments: str) -> Process:
    launch = Launch(num_processes=2, file=file)
    return start_forked(Path.cwd(), "-m", "rekatrain", "train", "two.yaml", *arguments, launch=launch)


def newest_checkpoint() -> Path | None:
    checkpoints = Path("two/checkpoints").glob("checkpoint-*[0-9]")
    return max(checkpoints, key=lambda path: int(path.name[11:]), default=None)


@pytest.mark.launched
@pytest.mark.parametrize(("file", "staleness"), [("zero2.yaml", 2), ("zero3.yaml", 2), ("zero3.yaml", 1)])
def test_zero_processes_sample_ahead_and_resume(run, serve, model_folder, tokenizer, file: str, staleness: int) -> None:
    urls = [serve(HoldingStandIn(model_folder, tokenizer, seed=3)).url for _ in range(2)]
    run("one", urls, **{**AHEAD, "max_steps": 1})
    tree = json.loads(Path("one.yaml").read_text()) | {"output_dir": str(Path("two").absolute())}
    settings = {"max_staleness": staleness, "prompts_per_step": PROMPTS, "max_steps": STEPS, "learning_rate": 3e-2}
    tree["rloo"] |= AHEAD | settings
    Path("two.yaml").write_text(json.dumps(tree))

    # 1. Kill both processes when a checkpoint has groups that are not trained, and look into the newest one.
    process = start(file)
    while (newest := newest_checkpoint()) is None or int(newest.name[11:]) < KILLED_AFTER or not read_waiting(newest):
        assert process.poll() is None, process.output()
        time.sleep(0.01)
    kill_tree(process.pid)
    newest = newest_checkpoint()
    assert newest is not None
    trained, waiting = int(newest.name[11:]), read_waiting(newest)
    assert trained < STEPS and waiting
    if staleness == 1:  # the whole next batch: a checkpoint waits for it
        assert waiting.keys() == {(trained, index) for index in range(PROMPTS)}

    # 2. The resumed run trains the groups of the queue with the tokens that they had.
    process = start(file, "--resume")
    assert process.wait(240) == 0, process.output()
    rollouts = read_records(Path("two/rollouts.jsonl"))
    assert [step["step"] for step in read_records(Path("two/metrics.jsonl"))] == list(range(1, STEPS + 1))
    assert len(rollouts) == STEPS * PROMPTS * 4
    for (step, index), ids in waiting.items():
        of_group = [r["completion_ids"] for r in rollouts if (r["step"], r["prompt_index"]) == (step + 1, index)]
        assert of_group == ids

    # 3. Each token has the log-probability under the checkpoint that its version names.
    policies = per_version("two", model_folder, LORA)
    for record in rollouts:
        prompt = tokenizer.encode(record["prompt"], add_special_tokens=False)
        expected = logprob_by_versions(record, policies, tokenizer, prompt)
        assert record["sampler_logprob"] == pytest.approx(expected, abs=1e-3)

    # 4. A batch waits for the weights that max_staleness allows, and for no newer ones.
    ages = {(r["step"], r["step"] - 1 - version) for r in rollouts for version, _ in r["weight_versions"]}
    if staleness == 1:
        assert ages == {(1, 0), *((step, 1) for step in range(2, STEPS + 1))}
    else:
        assert max(age for _, age in ages) == staleness and min(age for _, age in ages) == 0
        assert any(len(record["weight_versions"]) > 1 for record in rollouts)
