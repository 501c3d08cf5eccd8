"""Rollouts by servers, with a stand-in that speaks vLLM's API: a run with servers equals the in-process run.

test_server.py runs the real vLLM.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from rekatrain.data.chat import FinishReason, encode_text
from rekatrain.trainer.cli import main
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.draw import TIE
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.sampler.vllm.responses import ResponseReader
from rekatrain.trainer.run.records import read_records
from tests.helpers.forks import Launch, start_forked
from tests.helpers.rloo import open_reasoning
from tests.vllm.conftest import LORA, error_line, sampled
from tests.vllm.stand_in import StandIn

ONE_OFF = {"max_staleness": 1, "importance_sampling_correction": "sequence_truncate", "save_steps": 1}


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "whole model"])
def test_server_rollouts_equal_in_process_rollouts(run, serve, stand_in, model_folder, tokenizer, lora) -> None:
    other = StandIn(model_folder, tokenizer, seed=3)
    metrics, rollouts, weights = run("served", [serve(stand_in).url, serve(other).url + "/"], lora=lora)
    expected, expected_rollouts, expected_weights = run("here", None, lora=lora)
    assert sampled(rollouts) == sampled(expected_rollouts)
    assert [step["reward"] for step in metrics] == [step["reward"] for step in expected]
    for name, tensor in expected_weights.items():
        assert_close(weights[name], tensor, rtol=0, atol=1e-6)
    # The trainer computes the log-probs that the server drew with, at every version of the weights.
    assert max(step["mismatch_logprob"] for step in metrics) < 1e-4 and metrics[2]["kl"] > 1e-3
    assert [step["staleness"] for step in metrics] == [0, 0, 0]

    # Each server loaded each version once, under separate names, and has the last one only.
    assert len(stand_in.finished) > 0 < len(other.finished)
    assert len(stand_in.finished) + len(other.finished) == 3 * 4
    assert stand_in.loaded == other.loaded and len(set(stand_in.loaded)) == 3
    assert [path.name for path in Path("served/served").iterdir() if path.is_dir()] == stand_in.loaded[2:]
    if lora:
        assert list(stand_in.adapters) == stand_in.loaded[2:]
        assert sum(f.stat().st_size for f in Path("served/served").rglob("*.safetensors")) < 40_000  # no base


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "whole model"])
def test_evaluation_by_servers_equals_that_in_process(run, serve, stand_in, lora) -> None:
    rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n} for n in range(20, 26)]
    Path("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"reward": "regex", "max_completion_length": 8, "temperature": 0.8, "num_generations": 4}
    options = ['rewards.regex={"pattern": "[a-m]"}', f"evaluate={json.dumps(settings)}"]
    options.append('eval_dataset={"path": "held_out.jsonl", "format": "prompt_answer"}')
    rloo = {"eval_steps": 2, "eval_on_start": True}
    metrics, rollouts, _ = run("served", serve(stand_in).url, *options, lora=lora, **rloo)
    expected, expected_rollouts, _ = run("here", None, *options, lora=lora, **rloo)
    evaluations = [[r for r in records if "eval/accuracy" in r] for records in (metrics, expected)]
    assert [record["step"] for record in evaluations[0]] == [0, 2, 3]
    for served, here in zip(*evaluations, strict=True):
        assert {key: served[key] for key in here if key.startswith("eval/")} == {
            key: value for key, value in here.items() if key.startswith("eval/")
        }
    assert sampled(rollouts) == sampled(expected_rollouts)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "whole model"])
def test_server_with_other_weights_is_found_in_the_step(run, serve, stand_in, capsys, lora) -> None:
    load = stand_in._load_lora_adapter if lora else stand_in._collective_rpc
    num_loads = 0

    def load_and_break(body: dict) -> tuple[int, object]:
        nonlocal num_loads
        status, result = load(body)
        if status != 200:  # the check whether adapters can be loaded names a missing folder
            return status, result
        num_loads += 1
        model = stand_in.adapters[body["lora_name"]] if lora else stand_in.model
        if num_loads == 2:  # the update before step 2
            with torch.no_grad():
                model.get_decoder().layers[0].mlp.down_proj.weight.mul_(1.5)
        return status, result

    setattr(stand_in, "_load_lora_adapter" if lora else "_collective_rpc", load_and_break)
    line = error_line(run, serve(stand_in).url, lora=lora, capsys=capsys)
    assert "does not hold the weights that were published to it: log-probabilities differ" in line
    assert num_loads == 2


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_k": 20, "top_p": 0.8}])
def test_server_rollouts_with_filters_equal_in_process_rollouts(run, serve, stand_in, filters: dict) -> None:
    filters |= {"temperature": 1.3, "max_steps": 2}
    metrics, rollouts, weights = run("served", serve(stand_in).url, **filters)
    _, expected_rollouts, expected_weights = run("here", None, **filters)
    assert sampled(rollouts) == sampled(expected_rollouts)
    assert max(step["mismatch_logprob"] for step in metrics) < 1e-4
    for name, tensor in expected_weights.items():
        assert_close(weights[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("cap", "filters"),
    [(10, {}), (24, {"top_k": 20, "top_p": 0.95, "temperature": 1.5})],
    ids=["truncated in the closing", "filtered, up to the answer"],
)
def test_server_rollouts_with_a_reasoning_budget_equal_in_process(
    run, serve, stand_in, ending_model, tokenizer, tmp_path, cap: int, filters: dict
) -> None:
    open_reasoning(ending_model, tokenizer)
    for made in (ending_model, tokenizer):
        made.save_pretrained(tmp_path / "model")
    stand_in.folder = tmp_path / "model"
    stand_in.restart()
    settings = {"model": tmp_path / "model", "reasoning_budget": 7, "max_completion_length": cap, "max_steps": 2}

    def die(number: int, body: dict) -> tuple[int, Any] | None:
        if number not in (2, 7):  # a group and, where there is room for an answer, the rest of a completion
            return None
        stand_in.restart()
        return 500, {}

    complete = stand_in._completions

    def stop_at_once(body: dict) -> tuple[int, Any]:
        """Stop falsely, as vLLM does where it decodes a prompt that ends within a character again and finds `<sep>`."""
        status, response = complete(body)
        if status == 200 and stand_in.keys.get(body.get("seed"), ())[5:] == (1,):
            [choice] = response["choices"]
            choice |= {"token_ids": choice["token_ids"][:1], "stop_reason": "<sep>"}
            choice["logprobs"] = {name: values[:1] for name, values in choice["logprobs"].items()}
        return status, response

    stand_in.trouble, stand_in._completions = die, stop_at_once
    metrics, rollouts, weights = run("served", serve(stand_in).url, **settings, **filters)
    _, expected_rollouts, expected_weights = run("here", None, **settings, **filters)
    assert sampled(rollouts) == sampled(expected_rollouts)
    assert [record["num_forced"] for record in rollouts] == [record["num_forced"] for record in expected_rollouts]
    closing = len(encode_text("\n</reasoning>\n\n", tokenizer))
    assert {record["num_forced"] for record in rollouts} == {0, min(closing, cap - 7)}
    assert max(step["mismatch_logprob"] for step in metrics) < 1e-4
    assert sum(step["rollout_retries"] for step in metrics) >= 2
    for name, tensor in expected_weights.items():
        assert_close(weights[name], tensor, rtol=0, atol=1e-6)


def test_response_reader_finds_a_stop_across_two_responses(tokenizer) -> None:
    reader = ResponseReader(tokenizer, RLOOConfig(max_steps=1, top_k=2, reasoning_budget=3))

    def part(ids: list[int], **request: int) -> Completion:
        listed = [{"token_id:0": -0.5, f"token_id:{token}": -1.0, "token_id:9": -9999.0} for token in ids]
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * len(ids), "top_logprobs": listed}}
        [completion] = reader.read({"choices": [choice]}, "http://server", num_completions=1, max_tokens=len(ids))
        return completion

    first, second = encode_text("4 <s", tokenizer), encode_text("ep> and so on", tokenizer)
    partial = reader.close_reasoning(part(first))
    assert (partial.ids, partial.forced, partial.finish_reason) == (first, range(0), FinishReason.LENGTH)
    whole = reader.join(partial, part(second))
    end = len(first) + len(encode_text("ep>", tokenizer))
    assert (whole.ids, whole.finish_reason) == ((first + second)[:end], FinishReason.STOP)
    assert whole.logprobs == [-1.0] * end and whole.cutoffs == [-TIE] * end


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "whole model"])
@pytest.mark.parametrize("num_servers", [1, 2])
def test_server_pool_loses_nothing_when_a_server_dies(
    run, serve, stand_in, model_folder, tokenizer, lora, num_servers
) -> None:
    def die(number: int, body: dict) -> tuple[int, Any] | None:
        if number in (2, 5, 6):  # it comes back with its first weights
            stand_in.restart()
            return 500, {"error": {"message": "EngineCore encountered an issue."}}
        return (503, {}) if number == 9 else None

    stand_in.trouble = die
    urls = [serve(stand_in).url] + [serve(StandIn(model_folder, tokenizer, seed=3)).url] * (num_servers - 1)
    metrics, rollouts, weights = run("served", urls, lora=lora, per_device_generation_batch_size=8)
    _, expected_rollouts, expected_weights = run("here", None, lora=lora)
    assert sampled(rollouts) == sampled(expected_rollouts)
    for name, tensor in expected_weights.items():
        assert_close(weights[name], tensor, rtol=0, atol=1e-6)
    assert sum(step["rollout_retries"] for step in metrics) >= (4 if num_servers == 1 else 1)


def test_sampler_drops_responses_from_other_weights(run, serve, stand_in) -> None:
    def answer_from_the_base(number: int, body: dict) -> None:
        if number == 3:
            stand_in.restart()

    stand_in.trouble = answer_from_the_base  # its completions come from its first weights, as its version shows
    metrics, rollouts, _ = run("served", serve(stand_in).url, lora=None)
    _, expected_rollouts, _ = run("here", None, lora=None)
    assert sampled(rollouts) == sampled(expected_rollouts)
    assert sum(step["rollout_retries"] for step in metrics) >= 1


def test_server_pool_limits_concurrent_requests(run, serve, stand_in) -> None:
    server = serve(stand_in)
    run("served", server.url, max_steps=1, per_device_generation_batch_size=8)
    assert server.most_at_once == 2


def test_server_rollouts_off_policy_use_the_weights_before(run, serve, stand_in) -> None:
    metrics, rollouts, weights = run("ahead", serve(stand_in).url, max_steps=4, **ONE_OFF)
    assert [step["staleness"] for step in metrics] == [0, 1, 1, 1]
    assert metrics[0]["mismatch_logprob"] < 1e-4 < 1e-3 < metrics[1]["mismatch_logprob"]
    # The second batch comes from the weights that the first was sampled from.
    _, at_rest, _ = run("rest", None, max_steps=2, learning_rate=0.0)
    assert sampled(rollouts)[:32] == sampled(at_rest)
    assert len(sampled(rollouts)) == 4 * 16

    # Resumed from any checkpoint, with a restarted server, the run ends with the same weights.
    shutil.rmtree("ahead/checkpoints/checkpoint-4")
    shutil.rmtree("ahead/checkpoints/checkpoint-3")
    stand_in.restart()
    resumed_metrics, resumed, resumed_weights = run("ahead", serve(stand_in).url, "--resume", max_steps=4, **ONE_OFF)
    assert sampled(resumed) == sampled(rollouts)
    assert [step["staleness"] for step in resumed_metrics] == [0, 1, 1, 1]
    for name, tensor in weights.items():
        assert_close(resumed_weights[name], tensor, rtol=0, atol=1e-6)


def test_server_rollouts_of_two_processes_resume_on_one(run, serve, stand_in) -> None:
    metrics, rollouts, weights = run("one", serve(stand_in).url, **ONE_OFF)
    stand_in.restart()
    stand_in.loaded.clear()
    tree = json.loads(Path("one.yaml").read_text()) | {"output_dir": str(Path("two").absolute())}
    Path("two.yaml").write_text(json.dumps(tree))
    launch = Launch(num_processes=2, file="ddp.yaml")
    process = start_forked(Path.cwd(), "-m", "rekatrain", "train", "two.yaml", launch=launch)
    assert process.wait(240) == 0, process.output()
    assert sampled(read_records(Path("two/rollouts.jsonl"))) == sampled(rollouts)
    assert len(stand_in.loaded) == 2  # each version that is sampled from once, not once per process

    # One process resumes the run of two: the checkpoint holds the queued batch of both.
    shutil.rmtree("two/checkpoints/checkpoint-3")
    stand_in.restart()
    _, resumed, resumed_weights = run("two", serve(stand_in).url, "--resume", **ONE_OFF)
    assert sampled(resumed) == sampled(rollouts)
    for name, tensor in weights.items():
        assert_close(resumed_weights[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.launched
def test_split_sequences_train_server_rollouts_as_one(run, serve, stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    # Importance weights of rollouts one update old, and a run of one process that two go on with under ZeRO-2.
    _, rollouts, weights = run("one", serve(stand_in).url, **ONE_OFF)
    shutil.copytree("one", "two")
    for step in (2, 3):
        shutil.rmtree(f"two/checkpoints/checkpoint-{step}")
    stand_in.restart()
    tree = json.loads(Path("one.yaml").read_text()) | {"output_dir": str(Path("two").absolute())}
    Path("two.yaml").write_text(json.dumps(tree))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    launch = Launch(num_processes=2, file="zero2.yaml")
    process = start_forked(Path.cwd(), "-m", "rekatrain", "train", "two.yaml", "--resume", launch=launch)
    assert process.wait(240) == 0, process.output()
    assert "sequences: each 2 processes split the tokens" in process.output()
    resumed = read_records(Path("two/rollouts.jsonl"))
    assert sampled(resumed) == sampled(rollouts)
    of_step = [record["importance_sum"] / record["importance_num"] for record in rollouts if record["step"] == 3]
    assert max(abs(weight - 1) for weight in of_step) > 1e-3  # the weights say something
    last = load_file("two/checkpoints/checkpoint-3/adapter_model.safetensors")
    for name, tensor in weights.items():
        assert_close(last[name], tensor, rtol=0, atol=1e-6)


def test_server_rollouts_off_policy_at_learning_rate_0_match(run, serve, stand_in) -> None:
    metrics, _, _ = run("ahead", serve(stand_in).url, learning_rate=0.0, **ONE_OFF)
    assert max(step["mismatch_logprob"] for step in metrics) < 1e-4


class TwoWorkers(StandIn):
    """Answers as vLLM 0.30 with two workers: after a failure, the second's answer is that to the next request."""

    late: tuple[int, Any] | None = None

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        answer = super().__call__(path, body)
        if path.split("?")[0] not in ("/v1/load_lora_adapter", "/collective_rpc") or answer[0] == 400:
            return answer
        if self.late is not None:
            self.late, answer = answer, self.late
        elif answer[0] != 200:
            self.late = answer
        return answer


def test_checks_leave_no_failure_in_the_workers_of_a_server(run, serve, model_folder, tokenizer) -> None:
    server = TwoWorkers(model_folder, tokenizer, seed=3)
    metrics, _, _ = run("served", serve(server).url)
    assert len(metrics) == 3 and server.late is None


# Errors of one line, before a weight is loaded


def break_it(stand_in: StandIn, how: str) -> None:
    change: dict[str, Callable[[], object]] = {
        "old": lambda: setattr(stand_in, "version", "0.19.1"),
        "no vLLM": lambda: setattr(stand_in, "_version", lambda body: (200, {"hello": 1})),
        "other model": lambda: setattr(stand_in, "folder", Path("/models/other")),
        "short": lambda: setattr(stand_in, "context", 20),
        "other tokenizer": lambda: setattr(stand_in, "_tokenize", lambda body: (200, {"tokens": [1]})),
        "raw logprobs": lambda: setattr(stand_in, "forced_logprob", -7.5),
        "no lora": lambda: setattr(stand_in, "has_lora", False),
        "no runtime": lambda: setattr(stand_in, "_load_lora_adapter", lambda body: (404, {"detail": "Not Found"})),
    }
    change[how]()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("old", r"is vLLM 0.19.1: rollouts need 0.30.0 or newer"),
        ("no vLLM", r"does not answer as vLLM does"),
        ("other model", r"serves '/models/other', the recipe trains '.*model0'; start it by rekatrain serve-rollouts"),
        ("short", r"has a context of 20 tokens, .* need \d+; start it with --max-model-len \d+"),
        ("other tokenizer", r"has another tokenizer: it encodes '.*' as \[1\]"),
        ("raw logprobs", r"--logprobs-mode processed_logprobs"),
        ("no lora", r"was started without --enable-lora"),
        ("no runtime", r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
    ],
)
def test_check_servers_reports_a_wrong_server_in_one_line(run, serve, stand_in, capsys, how: str, message: str) -> None:
    break_it(stand_in, how)
    line = error_line(run, serve(stand_in).url, capsys=capsys)
    assert re.search(message, line) and "http://127.0.0.1" in line
    assert stand_in.loaded == [] and not Path("rejected").exists()


def test_check_servers_reports_too_few_listed_logprobs(run, serve, stand_in, capsys) -> None:
    line = error_line(run, serve(stand_in).url, capsys=capsys, top_k=25)
    assert re.search(r"logprobs of 25, .* rloo.top_k needs .* start it with --max-logprobs 25", line)
    assert stand_in.loaded == [] and not Path("rejected").exists()
    choice = {"token_ids": [0], "logprobs": {"token_logprobs": [-1.0], "top_logprobs": [{"token_id:0": -1.0}]}}
    stand_in.trouble = lambda number, body: (200, {"model": body["model"], "choices": [choice] * 4})
    assert "does not list the 5 log-probs" in error_line(run, serve(stand_in).url, capsys=capsys, top_k=5)


def test_check_servers_reports_an_unreachable_server(run, serve, stand_in, capsys) -> None:
    assert "cannot be reached" in error_line(run, "http://127.0.0.1:9", capsys=capsys)
    assert "must read http://HOST:PORT" in error_line(run, "http://127.0.0.1:9/v1", capsys=capsys)
    stand_in._health = lambda body: (503, {})  # it goes down after the checks, for good
    line = error_line(run, serve(stand_in).url, capsys=capsys, vllm_server_timeout=0.2)
    assert "no vLLM server for 0.2 s" in line and "--resume" in line


def test_run_stops_at_rejected_requests_and_unknown_finishes(run, serve, stand_in, capsys) -> None:
    stand_in.trouble = lambda number, body: (400, {"error": {"message": "max_tokens is too large"}})
    assert "max_tokens is too large" in error_line(run, serve(stand_in).url, capsys=capsys)
    shutil.rmtree("rejected")
    choice = {"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -1.0]}}
    stand_in.trouble = lambda number, body: (200, {"model": body["model"], "choices": [choice] * 4})
    assert "--generation-config vllm" in error_line(run, serve(stand_in).url, capsys=capsys)
    shutil.rmtree("rejected")
    stand_in.trouble = lambda number, body: (500, {})
    assert "failed 8 times" in error_line(run, serve(stand_in).url, capsys=capsys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_staleness": 1, "vllm_server_base_url": None}, "rloo.max_staleness 1 needs vLLM servers"),
        ({"max_staleness": 1}, "set importance_sampling_correction"),
        ({"top_p": 0.9}, "rloo.top_p 0.9 with vllm_server_base_url needs rloo.top_k, too"),
        ({"top_k": 5, **ONE_OFF}, "rloo.top_p and rloo.top_k need num_iterations 1 and max_staleness 0"),
        ({"lora": {**LORA, "use_dora": True}}, "lora.use_dora is not supported for rollouts by vLLM"),
    ],
)
def test_recipe_options_that_servers_lack_are_rejected(run, capsys, settings: dict, message: str) -> None:
    url = settings.pop("vllm_server_base_url", "http://127.0.0.1:9")
    assert message in error_line(run, url, capsys=capsys, **settings)


def test_serve_rollouts_prints_the_command_of_a_recipe(run, serve, stand_in, capsys) -> None:
    run("served", serve(stand_in).url, max_steps=1, lora={**LORA, "r": 12})
    main(["serve-rollouts", "served.yaml", "--port", "8123", "--tensor-parallel-size", "2", "--print"])
    line = capsys.readouterr().out.splitlines()[-1]
    longest = max(int(length) for length in re.findall(r"--max-model-len (\d+)", line))
    assert 12 < longest < 60
    for text in (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
        "--enable-lora",
        "--max-lora-rank 16",
        "--logprobs-mode processed_logprobs",
        "--generation-config vllm",
        "--port 8123",
        "--tensor-parallel-size 2",
        "--dtype float32",
    ):
        assert text in line
    assert "--max-logprobs" not in line
    for top_k, num_listed in ((50, 50), (999, 300)):  # no more than there are tokens
        main(["serve-rollouts", "served.yaml", f"rloo.top_k={top_k}", "--print"])
        assert f"--max-logprobs {num_listed}" in capsys.readouterr().out
    main(["serve-rollouts", "served.yaml", "lora=null", "--print"])
    assert "lora" not in capsys.readouterr().out.lower().replace("served", "").split("--model")[1].split("--host")[1]
