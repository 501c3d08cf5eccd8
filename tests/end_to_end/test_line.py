"""Tests of the main job through the real command line: SFT, export, RLOO, export, an answer, and resumed runs."""

import json
import operator
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rekatrain.data.chat import STOP, encode_text, render_prompt
from rekatrain.trainer.cli import main
from rekatrain.trainer.recipe.load import dump_recipe, load_recipe
from tests.end_to_end.small_runs import LORA, OPTIONS, records, rloo_recipe, start, weights, write_data, write_recipe
from tests.helpers.forks import Process, start_forked


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with rows and a user's reward."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.slow
def test_sft_rloo_and_export_give_a_model_that_answers(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = write_recipe(
        folder,
        "sft",
        model_folder,
        stage="sft",
        lora=LORA,
        dataset={"path": str(folder / "sums.jsonl"), "format": "prompt_answer"},
        sft={"max_steps": 60, "per_device_train_batch_size": 6, "learning_rate": 3e-2, "logging_steps": 10},
    )
    main(["train", str(sft)])
    losses = [record["loss"] for record in records(folder / "sft", "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]
    main(["export", str(folder / "sft"), str(folder / "sft-export")])

    rloo = rloo_recipe(folder, "rloo", folder / "sft-export", lora=LORA)
    main(["train", str(rloo), "--dry-run"])
    shown = capsys.readouterr().out
    assert "[[ ...a completion, sampled by the policy]]" in shown and "math_answer 1.0" in shown
    main(["sample", str(rloo), "--num-prompts", "1", "rloo.truncated_completions=penalize"])
    shown = capsys.readouterr().out
    assert shown.count("advantage") == shown.count("truncation_penalty") == 4
    assert not (folder / "rloo").exists()

    main(["train", str(rloo)])
    metrics = records(folder / "rloo", "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5) and metrics[2]["kl"] != 0
    assert max(record["mismatch_logprob"] for record in metrics) < 1e-3
    rollouts = records(folder / "rloo", "rollouts.jsonl")
    assert len(rollouts) == 3 * 2 * 4
    for index in (0, 1):
        group = [record["advantage"] for record in rollouts if record["step"] == 1 and record["prompt_index"] == index]
        assert sum(group) == pytest.approx(0, abs=1e-5) and any(group)
    assert load_recipe(folder / "rloo" / "recipe.yaml") == load_recipe(rloo)
    assert dump_recipe(load_recipe(rloo)) == (folder / "rloo" / "recipe.yaml").read_text()

    export = folder / "rloo-export"
    main(["export", str(folder / "rloo"), str(export), "--max-shard-size", "20KB"])
    assert len(list(export.glob("*.safetensors"))) > 1
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in export.rglob("*") if path.is_file())

    # As a user of the folder, without this project.
    tokenizer = AutoTokenizer.from_pretrained(export)
    served = AutoModelForCausalLM.from_pretrained(export)
    messages = [{"role": "human", "content": "3 + 3 ="}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == encode_text(render_prompt(messages), tokenizer)
    output = served.generate(**prompt, stop_strings=[STOP], tokenizer=tokenizer, max_new_tokens=60, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer.startswith(" <reasoning>\n") and answer.rstrip().endswith(STOP)

    # The run folder (base and adapter) and the export (merged) give equal answers.
    results = []
    for model in (folder / "rloo", export):
        out = folder / "result.json"
        override = f"model.pretrained_model_name_or_path={model}"
        main(["evaluate", str(rloo), override, "evaluate.max_completion_length=40", "--out", str(out)])
        results.append(json.loads(out.read_text()))
    assert results[0]["answers"] == results[1]["answers"] and results[0]["num_graded"] == 6
    assert 0 <= results[0]["low"] <= results[0]["accuracy"] <= results[0]["high"] <= 1


@pytest.mark.slow
@pytest.mark.launched
@pytest.mark.parametrize(
    ("lora", "options"), [(None, {}), (LORA, {}), (LORA, OPTIONS)], ids=["full", "lora", "options"]
)
def test_resume_after_a_kill_is_bitwise_equal(
    folder: Path, model_folder: Path, lora: dict[str, Any] | None, options: dict[str, Any]
) -> None:
    rloo = {"max_steps": 4, **options}
    whole = rloo_recipe(folder, "whole", model_folder, lora=lora, rloo=rloo)
    main(["train", str(whole)])

    killed = rloo_recipe(folder, "killed", model_folder, lora=lora, rloo=rloo)
    checkpoint = folder / "killed" / "checkpoints" / "checkpoint-2"
    (folder / "hold").symlink_to(checkpoint)
    process = start_forked(folder, "-m", "rekatrain", "train", str(killed))
    wait_for(checkpoint.exists, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (folder / "hold").unlink()
    main(["train", str(killed), "--resume"])

    for step in (2, 4):
        expected, actual = weights(folder / "whole", step), weights(folder / "killed", step)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert records(folder / "whole", "rollouts.jsonl") == records(folder / "killed", "rollouts.jsonl")
    ours, theirs = records(folder / "whole", "metrics.jsonl"), records(folder / "killed", "metrics.jsonl")
    assert [record["step"] for record in theirs] == [1, 2, 3, 4]
    assert [record["grad_norm_limit"] for record in theirs] == [record["grad_norm_limit"] for record in ours]
    assert all(record["kl"] != 0 for record in theirs[1:])  # every step changed the weights
    if options:  # the limits after the kill include norms from before it
        assert all(record["grad_norm_limit"] < 1e3 for record in theirs[2:])


def test_resume_of_a_stopped_sft_run_is_bitwise_equal(folder: Path, model_folder: Path) -> None:
    def recipe(name: str) -> str:
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_steps": 2}
        settings |= {"lr_scheduler_type": "constant", "logging_steps": 1}
        dataset = {"path": str(folder / "sums.jsonl"), "format": "prompt_answer"}
        return str(write_recipe(folder, name, model_folder, stage="sft", lora=LORA, dataset=dataset, sft=settings))

    main(["train", recipe("whole")])
    main(["train", recipe("stopped"), "sft.max_steps=2"])
    main(["train", recipe("stopped"), "--resume"])
    main(["train", recipe("stopped"), "--resume"])  # finished: takes no further step
    expected, actual = weights(folder / "whole", 4), weights(folder / "stopped", 4)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert [r["loss"] for r in records(folder / "whole", "metrics.jsonl")] == [
        r["loss"] for r in records(folder / "stopped", "metrics.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.launched
def test_torchrun_with_two_processes_equals_one(folder: Path, model_folder: Path) -> None:
    one = rloo_recipe(folder, "one", model_folder, lora=LORA, rloo=OPTIONS)
    two = rloo_recipe(folder, "two", model_folder, lora=LORA, rloo=OPTIONS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rekatrain"]
    process = start(folder, *launch, "train", str(two))
    main(["train", str(one)])
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()
    ours, theirs = records(folder / "one", "rollouts.jsonl"), records(folder / "two", "rollouts.jsonl")
    by_index = operator.itemgetter("step", "prompt_index")  # the sort is stable: a group keeps its order
    for mine, other in zip(sorted(ours, key=by_index), sorted(theirs, key=by_index), strict=True):
        assert mine["completion_ids"] == other["completion_ids"]
        assert mine["advantage"] == pytest.approx(other["advantage"], abs=1e-5)
    expected, actual = weights(folder / "one", 3), weights(folder / "two", 3)
    assert all(torch.allclose(expected[name], actual[name], atol=1e-5) for name in expected)


def wait_for(condition: Callable[[], bool], process: Process, seconds: float = 120) -> None:
    """Wait until the condition holds; fail when the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.output()
        assert time.monotonic() < deadline, f"the condition does not hold after {seconds} s"
        time.sleep(0.02)
