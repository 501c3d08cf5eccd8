"""Rollouts several updates ahead, `max_staleness` above 1, with a stand-in that draws token by token.

The real vLLM is not run here.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rekatrain.trainer.resume.states import RUN_ARRAYS_FILE, RUN_STATE_FILE, read_states
from rekatrain.trainer.run.checkpoints import read_manifest, seal
from rekatrain.trainer.run.records import read_records
from tests.helpers.forks import Launch, start_forked
from tests.vllm.conftest import LORA, HoldingStandIn, logprob_by_versions, per_version, read_waiting, sampled

AHEAD = {
    **{"max_staleness": 3, "importance_sampling_level": "token", "importance_sampling_correction": "token_truncate"},
    **{"max_steps": 7, "save_steps": 1, "prompts_per_step": 2},
    "per_device_generation_batch_size": 64,  # room for all groups of the queue: none waits for another to end
}


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "whole model"])
def test_each_token_has_the_version_of_the_weights_that_drew_it(
    run,
    serve,
    model_folder,
    tokenizer,
    lora,
) -> None:
    stand_in, other = (HoldingStandIn(model_folder, tokenizer, seed=3) for _ in range(2))
    urls = [serve(stand_in).url, serve(other).url]
    metrics, rollouts, _ = run("ahead", urls, lora=lora, learning_rate=3e-2, **AHEAD)
    assert len(rollouts) == 7 * 2 * 4
    assert any(len(record["weight_versions"]) > 1 for record in rollouts)
    policies = per_version("ahead", model_folder, lora)
    for record in rollouts:
        prompt = tokenizer.encode(record["prompt"], add_special_tokens=False)
        expected = logprob_by_versions(record, policies, tokenizer, prompt)
        assert record["sampler_logprob"] == pytest.approx(expected, abs=1e-3)

    # No token is older than max_staleness, and prompts come in the order in which they are scheduled.
    ages = [(r["step"] - 1 - version, num) for r in rollouts for version, num in r["weight_versions"]]
    assert 1 <= max(age for age, _ in ages) <= 3 and min(age for age, _ in ages) >= 0
    for step in metrics:
        of_step = [
            (record["step"] - 1 - version, num)
            for record in rollouts
            if record["step"] == step["step"]
            for version, num in record["weight_versions"]
        ]
        assert step["staleness"] == pytest.approx(sum(a * n for a, n in of_step) / sum(n for _, n in of_step))
        assert step["staleness/max"] == max(age for age, _ in of_step)
        assert 0 < step["importance/effective_sample_size"] <= 1 and step["importance/mean_weight"] > 0
    _, in_order, _ = run("here", None, lora=lora, learning_rate=0.0, max_steps=7, prompts_per_step=2)
    by_prompt = [[(record["step"], record["row"]) for record in records] for records in (rollouts, in_order)]
    assert by_prompt[0] == by_prompt[1]
    assert len(stand_in.finished) + len(other.finished) == 7 * 2  # nothing was sampled twice


def test_rollouts_ahead_at_learning_rate_0_equal_in_process(run, serve, stand_in) -> None:
    settings = {**AHEAD, "learning_rate": 0.0, "dynamic_sampling_rounds": 1}
    metrics, rollouts, _ = run("ahead", serve(stand_in).url, **settings)
    _, expected, _ = run("here", None, **{**settings, "max_staleness": 0})
    assert sampled(rollouts) == sampled(expected)
    assert max(step["mismatch_logprob"] for step in metrics) < 1e-4
    assert all(step["importance/mean_weight"] == pytest.approx(1, abs=1e-4) for step in metrics)
    assert all(step["importance/effective_sample_size"] == pytest.approx(1, abs=1e-6) for step in metrics)


def test_servers_sample_ahead_as_far_as_the_queue_allows(run, serve, stand_in) -> None:
    stand_in.pace = 0.03
    run("ahead", serve(stand_in).url, **AHEAD)
    first = {event: at for at, event in reversed(list(enumerate(stand_in.events)))}
    last = {event: at for at, event in enumerate(stand_in.events)}
    for step in range(7):
        # Batch b begins as soon as the weights after b - 3 updates are there: not before, and not after the next ones.
        assert first["begins", step] > first["loads", max(step - 3, 0)]
        assert last["begins", step] < first.get(("loads", max(step - 3, 0) + 1), len(stand_in.events))
    assert first["begins", 3] < last["ends", 0]  # while the first batch is sampled


def test_resumed_run_loses_no_finished_group(run, serve, stand_in) -> None:
    stand_in.pace = 0.03
    url = serve(stand_in).url
    _, rollouts, _ = run("ahead", url, **AHEAD)
    for step in range(4, 8):
        shutil.rmtree(f"ahead/checkpoints/checkpoint-{step}")
    kept = read_waiting(Path("ahead/checkpoints/checkpoint-3"))
    assert kept
    stand_in.restart()
    stand_in.finished.clear()
    metrics, resumed, _ = run("ahead", url, "--resume", **AHEAD)
    assert [step["step"] for step in metrics] == list(range(1, 8)) and len(resumed) == len(rollouts)
    again = {stand_in.keys[seed][2:] for _, seed in stand_in.finished}
    assert not again & kept.keys()  # none of them is sampled a second time
    assert again | kept.keys() == {(step, index) for step in range(3, 7) for index in range(2)}
    # They are trained with the ids that they had.
    for (step, index), ids in kept.items():
        trained = [r["completion_ids"] for r in resumed if (r["step"], r["prompt_index"]) == (step + 1, index)]
        assert trained == ids


@pytest.mark.parametrize("staleness", [1, 3])
def test_queue_of_an_earlier_version_is_resumed(run, serve, stand_in, staleness: int) -> None:
    settings = {**AHEAD, "max_staleness": staleness, "max_steps": 4}
    url = serve(stand_in).url
    run("ahead", url, **settings)
    shutil.rmtree("ahead/checkpoints/checkpoint-4")
    checkpoint = Path("ahead/checkpoints/checkpoint-3")
    kept = read_waiting(checkpoint)
    states = read_states(checkpoint)
    # Until arrays were in a separate file, lists were in their place.
    text = json.dumps(states, default=lambda array: array.tolist())
    (checkpoint / RUN_ARRAYS_FILE).unlink()
    (checkpoint / RUN_STATE_FILE).write_text(text)
    manifest = read_manifest(checkpoint)
    seal(checkpoint, **{key: manifest[key] for key in ("step", "stage", "launch", "records")})
    stand_in.restart()
    stand_in.finished.clear()
    _, resumed, _ = run("ahead", url, "--resume", **settings)
    assert kept and not {stand_in.keys[seed][2:] for _, seed in stand_in.finished} & kept.keys()
    for (step, index), ids in kept.items():
        trained = [r["completion_ids"] for r in resumed if (r["step"], r["prompt_index"]) == (step + 1, index)]
        assert trained == ids


def test_interrupted_run_keeps_the_groups_that_servers_have_finished(run, serve, stand_in) -> None:
    stand_in.pace = 0.03
    finished: list[tuple[int, ...]] = []

    def interrupt(number: int, body: dict) -> None:
        if number == 9:  # of the first batch that follows an update
            finished.extend(stand_in.keys[seed][2:] for _, seed in stand_in.finished)
            time.sleep(0.3)  # what was sent arrives
            os.kill(os.getpid(), signal.SIGTERM)

    stand_in.trouble = interrupt
    url = serve(stand_in).url
    with pytest.raises(SystemExit) as caught:
        run("ahead", url, **AHEAD)
    assert caught.value.code == 75
    newest = max(Path("ahead/checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    trained = int(newest.name[11:])
    kept = read_waiting(newest).keys()
    assert {key for key in finished if key[0] >= trained} <= kept and kept
    stand_in.finished.clear()
    _, resumed, _ = run("ahead", url, "--resume", **AHEAD)
    again = {stand_in.keys[seed][2:] for _, seed in stand_in.finished}
    assert not again & kept and len(resumed) == 7 * 2 * 4


def test_a_paused_or_restarted_server_goes_on(run, serve, stand_in) -> None:
    stand_in.pace, stand_in.is_paused = 0.02, True  # by a run that was killed within an update

    def restart(number: int, body: dict) -> tuple[int, Any] | None:
        if number not in (5, 9):
            return None
        stand_in.restart()
        return 500, {}

    stand_in.trouble = restart
    metrics, rollouts, _ = run("ahead", serve(stand_in).url, **{**AHEAD, "learning_rate": 0.0})
    assert max(step["mismatch_logprob"] for step in metrics) < 1e-4
    assert sum(step["rollout_retries"] for step in metrics) >= 2 and len(rollouts) == 7 * 2 * 4


@pytest.mark.parametrize("staleness", [1, 3])
def test_evaluation_while_rollouts_are_ahead(run, serve, stand_in, staleness: int) -> None:
    rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n} for n in range(20, 26)]
    Path("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"reward": "regex", "max_completion_length": 8, "temperature": 0.8, "num_generations": 4}
    options = ['rewards.regex={"pattern": "[a-m]"}', f"evaluate={json.dumps(settings)}"]
    options.append('eval_dataset={"path": "held_out.jsonl", "format": "prompt_answer"}')
    rloo = {**AHEAD, "max_staleness": staleness, "max_steps": 4}
    metrics, rollouts, _ = run("served", serve(stand_in).url, *options, **rloo, eval_steps=2, eval_on_start=True)
    evaluations = {step["step"]: step["eval/completions/mean_length"] for step in metrics if "eval/accuracy" in step}
    assert list(evaluations) == [0, 2, 4] and len(rollouts) == 4 * 2 * 4
    # The answers come from the weights of that step, although the next batches come from earlier ones.
    names = [name for name, _ in stand_in.finished]
    assert len(names) == 4 * 2 + 3 * 6
    if staleness == 1:  # and training is the same as without evaluation
        _, plain, _ = run("plain", serve(stand_in).url, options[0], **rloo)
        assert sampled(rollouts) == sampled(plain)
    else:
        _, still, _ = run("still", serve(stand_in).url, *options, **{**rloo, "learning_rate": 0.0}, eval_steps=2)
        _, here, _ = run("here", None, *options, **{**rloo, "max_staleness": 0, "learning_rate": 0.0}, eval_steps=2)
        assert sampled(still) == sampled(here)


def test_two_processes_update_servers_in_flight(run, serve, model_folder, tokenizer) -> None:
    urls = [serve(HoldingStandIn(model_folder, tokenizer, seed=3)).url for _ in range(2)]
    run("one", urls, **{**AHEAD, "max_steps": 1})
    tree = json.loads(Path("one.yaml").read_text()) | {"output_dir": str(Path("two").absolute())}
    tree["rloo"] |= {**AHEAD, "prompts_per_step": 4, "max_steps": 5}
    Path("two.yaml").write_text(json.dumps(tree))
    process = start_forked(
        Path.cwd(), "-m", "rekatrain", "train", "two.yaml", launch=Launch(num_processes=2, file="ddp.yaml")
    )
    assert process.wait(240) == 0, process.output()
    rollouts = read_records(Path("two/rollouts.jsonl"))
    assert len(rollouts) == 5 * 4 * 4 and any(len(record["weight_versions"]) > 1 for record in rollouts)
    policies = per_version("two", model_folder, LORA)
    for record in rollouts:
        prompt = tokenizer.encode(record["prompt"], add_special_tokens=False)
        expected = logprob_by_versions(record, policies, tokenizer, prompt)
        assert record["sampler_logprob"] == pytest.approx(expected, abs=1e-3)
        assert all(record["step"] - 1 - version <= 3 for version, _ in record["weight_versions"])
