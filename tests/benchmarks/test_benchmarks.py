"""The benchmarks run on tiny models, and their counts are right."""

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from rekatrain.trainer.export.gguf_model import write_gguf
from rekatrain.trainer.export.lazy_weights import LazyWeights
from rekatrain.trainer.models.source import find_source
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions
from tests.conftest import tiny_llama
from tests.helpers import forks

FOLDER = Path(__file__).parent
QUESTIONS = ["What is 2+2?", "17 + 25 =", "Name a colour.", "Be brief."]


@pytest.fixture(scope="module")
def model_arguments(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a tiny model with the vocabulary of the tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("benchmarks")
    model = tiny_llama(tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": text}) + "\n" for text in QUESTIONS))
    return ["--model", str(folder / "model"), "--prompts", str(prompts)]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


def run(name: str, arguments: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run a benchmark and return the results in its report."""
    module = load(name, monkeypatch)
    monkeypatch.setattr(load("work", monkeypatch), "subprocess", SimpleNamespace(run=forks.run))  # of an arm
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(out)])
    module.main()
    report = json.loads(out.read_text())
    assert report["machine"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    return report["results"]


def test_rloo_vs_trl_gives_both_engines_the_same_work(
    model_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ["--prompts-per-step", "2", "--num-generations", "2", "--caps", "6", "--steps", "2", "--lengths", "equal"]
    arms = ["--arms", "rekatrain", "trl-defaults", "--betas", "0.1"]
    (case,) = run("rloo_vs_trl", [*model_arguments, *size, *arms], tmp_path / "out.json", monkeypatch)
    (ours,), (trls,) = (case["runs"][arm] for arm in ("rekatrain", "trl-defaults"))
    for our_step, trl_step in zip(ours["steps"], trls["steps"], strict=True):
        assert our_step["prompt_tokens"] == trl_step["prompt_tokens"]
        assert our_step["lengths"] == trl_step["lengths"] == [6] * 4
        # Sampling, the reference and the training pass: each prompt, and each completion without its last token.
        needed = 3 * (sum(our_step["prompt_tokens"]) + 4 * 5)
        assert our_step["slots_needed"] == trl_step["slots_needed"] == needed == sum(our_step["slots"].values())
        padded = 4 * max(trl_step["prompt_tokens"])
        # Prefill and five decoding steps, two scoring passes, and the training pass twice because of checkpointing.
        assert trl_step["slots"] == {"sample": padded + 4 * 5, "score": 2 * (padded + 24), "train": 2 * (padded + 24)}
    assert case["ratios"]["rekatrain / trl-defaults"]["completions/s"] > 0


def test_rloo_vs_trl_compares_rewards_against_time(
    model_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ["--prompts-per-step", "2", "--num-generations", "2", "--caps", "6", "--steps", "2"]
    arms = ["--arms", "rekatrain", "trl-8", "--wall-clock"]
    results = run("rloo_vs_trl", [*model_arguments, *size, *arms], tmp_path / "out.json", monkeypatch)
    assert [line["steps"] for line in results["table"]] == [2, 2]
    ours, trls = (results["runs"][arm]["steps"] for arm in ("rekatrain", "trl-8"))
    assert [step["prompt_tokens"] for step in ours] == [step["prompt_tokens"] for step in trls]
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_needed_flops_equal_those_of_an_unpadded_pass(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tokenizer)
    packed = pack_completions([[5, 6, 7]], [[[8, 9, 10, 11]]], torch.device("cpu"))
    logprobs = CompletionLogprobs(model, temperature=1.0, num_tokens=len(tokenizer))
    with FlopCounterMode(display=False) as counter:
        logprobs(packed).sum().backward()
    products = sum(
        flops for name, flops in counter.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm")
    )
    needed = load("roofline", monkeypatch).needed_flops(model, [3], [4])
    assert needed["linear layers"] + needed["LM head"] == products


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("roofline", ["--num-prompts", "2", "--lengths", "4", "6", "--rounds", "1"]),
        ("sampler", ["--batch-sizes", "4", "--num-generations", "2", "--length", "4", "--rounds", "1"]),
    ],
)
def test_benchmark_reports_results(
    model_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]
) -> None:
    results = run(name, [*model_arguments, *arguments], tmp_path / "out.json", monkeypatch)
    if name == "roofline":
        assert results["summary"]["useful tokens"] > 2 * (3 + 5)
        assert sum(results["fractions"].values()) == pytest.approx(1)
    else:
        assert all(rate > 0 for rate in results["tokens_per_second"][0].values())


def test_growth_plots_every_axis(model_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_point = ["--prompts-per-step", "2", "--num-generations", "2", "--max-completion-length", "4"]
    results = run("growth", [*model_arguments, *one_point], tmp_path / "out.json", monkeypatch)
    assert [len(points) for points in results.values()] == [1, 1, 1]
    assert all(points[0]["slots/needed"] == 1 for points in results.values())
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_engines_finds_a_float32_file_equal_to_transformers(
    model_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = LazyWeights(find_source(model_arguments[1]))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_arguments[1])
    tokenizer.chat_template = "{{ messages }}"  # a GGUF file needs one
    files = []
    for file_type in ("f32", "q8_0"):
        files.append(tmp_path / f"model-{file_type}.gguf")
        size = weights.model.config.intermediate_size
        write_gguf(files[-1], weights, tokenizer, file_type=file_type, name="tiny", intermediate_size=size)
    size = ["--num-prompts", "3", "--length", "8", "--positions", "24"]
    results = run("engines", [*model_arguments, *size, "--gguf", *map(str, files)], tmp_path / "out.json", monkeypatch)
    exact, coarse = results["engines"]
    assert exact["equal"] == 1.0 and exact["positions"] >= 8 and exact["KL"] < 1e-9 < 1e-6 < coarse["KL"] < 0.1
    assert all(each["engine"] == "model-q8_0.gguf" and each["gap"] > 0 for each in results["differences"])


@pytest.mark.slow
def test_learning_gives_every_method_as_many_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["--steps", "2", "--completions", "8", "--seeds", "2", "--goal", "0", "--workers", "1"]
    results = run("learning", [*size, "--learning-rates", "1e-4"], tmp_path / "out.json", monkeypatch)
    assert list(results["runs"]) == ["RLOO k=4", "RLOO k=2", "REINFORCE", "RAFT"]
    assert all(len(of_method) == 2 and len(of_method[0]["rewards"]) == 2 for of_method in results["runs"].values())


@pytest.mark.slow
def test_staleness_keeps_servers_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["--steps", "5", "--prompts", "6", "--group", "2", "--rows", "4", "--cap", "60", "--pace", "0.03"]
    arms = ["--staleness", "0", "3", "--train-seconds", "1"]
    results = run("staleness", [*size, *arms], tmp_path / "out.json", monkeypatch)
    on_policy, ahead = results["table"]
    assert (on_policy["max_staleness"], on_policy["staleness"]) == (0, 0) and 1 <= ahead["staleness"] <= 3
    assert on_policy["busy"] < ahead["busy"] <= 1


def test_staleness_compares_rewards_at_equal_times(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"staleness": 0.0, "completions/mean_length": 30.0, "completions/clipped_ratio": 0.5}

    def arm(seconds: float, busy: float, rewards: list[float]) -> dict:
        steps = [{"seconds": seconds, "reward": reward, **others} for reward in rewards]
        return {"busy": busy, "running": 10 * busy, "steps": steps}

    for step in (slow := arm(20.0, 0.5, [0.0, 0.2, 0.6]))["steps"]:
        step["importance/effective_sample_size"] = 1.0
    fast = [arm(10.0, 0.8, [0.1, 0.3, 0.5, 0.9]), arm(10.0, 1.0, [0.3, 0.5, 0.5, 0.9])]
    for step in [step for each in fast for step in each["steps"]]:
        step["importance/effective_sample_size"] = 0.75
    module = load("staleness_vllm", monkeypatch)
    on_policy, ahead = module.summarize({0: [slow], 4: fast})
    assert (on_policy["seconds"], ahead["seconds"]) == (60, 40) and ahead["server busy"] == pytest.approx(0.9)
    assert (on_policy["running"], ahead["running"]) == (5, pytest.approx(9))
    # The fastest run takes 40 s: after 20 s the slow one has ended one step, the fast ones two.
    assert (on_policy["reward at 20 s"], ahead["reward at 20 s"]) == (0, pytest.approx(0.3))
    assert (on_policy["reward at 40 s"], ahead["reward at 40 s"]) == (pytest.approx(0.1), pytest.approx(0.5))
    assert (on_policy["first reward"], ahead["first reward"]) == (0, pytest.approx(0.2))
    assert (on_policy["ESS"], ahead["ESS"]) == (1, 0.75)
    # The mean is over the steps that ended in a window, or it is that of the last step before.
    monkeypatch.setattr(module, "WINDOW_SECONDS", 15.0)
    on_policy, ahead = module.summarize({0: [slow], 4: fast})
    assert (on_policy["reward at 40 s"], ahead["reward at 40 s"]) == (pytest.approx(0.2), pytest.approx(0.7))


@pytest.mark.launched
def test_trace_of_one_step_stays_short() -> None:
    """A reader follows one completion through few files, and seldom turns back."""
    finished = forks.run([sys.executable, str(FOLDER / "trace.py")], env=os.environ)
    assert finished.returncode == 0, finished.stderr
    *visits, counts = [line for line in finished.stdout.splitlines() if re.match(r" *\d+ |files ", line)]
    assert visits[0].split() == ["0", "trainer/rloo/step.py", "take_step"]
    num_files, num_functions, num_changes = map(int, re.findall(r"\d+", counts))
    assert num_functions > num_files
    assert num_files <= 14
    assert num_changes <= 30
