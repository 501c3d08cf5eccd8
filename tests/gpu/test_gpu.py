"""Checks of everything that differs on a GPU. Each runs on the CPU too, so that its code is known to run.

bash tests/gpu/run.sh                 # on a machine with a CUDA GPU
pytest -q tests/gpu -k "not cuda"     # the CPU form
"""

import copy
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text
from rekatrain.trainer.cli import main
from rekatrain.trainer.rloo.kernels.grouped_attention import PackedGroups
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions
from rekatrain.trainer.rloo.sampler.decode_step import Calls, CudaGraphs, EagerCalls
from rekatrain.trainer.rloo.sampler.in_process import Sampler
from tests.conftest import tiny_llama
from tests.end_to_end.small_runs import LORA, PROJECT, rloo_recipe, weights, write_data, write_recipe
from tests.helpers.recorded_calls import RecordedCalls

has_gpu = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not has_gpu, reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
# Error of an output of order 1. A GPU multiplies float32 exactly here: TF32 is off by default.
ERRORS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
GROUPS = {
    "short": [(5, [3, 7, 1]), (1, [2, 2, 6]), (9, [])],
    "one token": [(1, [])],
    "blocks": [(300, [150, 20, 400]), (128, [256]), (130, [0, 1])],
}


def attention(groups: Any, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the output of attention and the gradients of query, key and value, in float64 on the CPU."""
    num_tokens = sum(prompt + sum(completions) for prompt, completions in groups)
    generator = torch.Generator().manual_seed(0)
    # Sizes that FlexAttention's kernels have: heads of 64, 8 that share 2 key-value heads.
    drawn = [torch.randn(1, heads, num_tokens, 64, generator=generator) for heads in (8, 2, 2)]
    states = [each.bfloat16().to(device, dtype).requires_grad_() for each in drawn]
    output = PackedGroups(groups, torch.device(device)).attend(0, *states, 0.125)
    weights = torch.randn(output.shape, generator=generator).bfloat16().to(device, dtype)
    return [each.detach().cpu().double() for each in (output, *torch.autograd.grad(output, states, weights))]


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("layout", GROUPS)
@pytest.mark.parametrize("device", DEVICES)
def test_attention_and_gradients_equal_the_cpus_in_float64(device: str, layout: str, dtype: torch.dtype) -> None:
    expected = attention(GROUPS[layout], "cpu", torch.float64)
    for actual, exact in zip(attention(GROUPS[layout], device, dtype), expected, strict=True):
        assert (actual - exact).norm() <= ERRORS[dtype] * max(1.0, exact.norm())  # some gradients are 0


@pytest.mark.gpu
@needs_gpu
def test_attention_of_many_lengths_stays_compiled() -> None:
    # Lengths share a graph; a fall-back to dense attention is an error (`fullgraph`).
    for num_tokens in (1, 2, 100, 129, 257, 600, 1025):
        for dtype in ERRORS:
            attention([(num_tokens, [num_tokens // 2])], "cuda", dtype)


def scored(device: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, is_lora: bool) -> dict[str, Tensor]:
    """Return log-probabilities of packed completions, and the gradients of all trained weights, in float64."""
    model: Any = tiny_llama(tokenizer, hidden_size=256)  # heads of 64
    if is_lora:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, config)
    model = model.bfloat16().to(device, dtype)
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(len(tokenizer), (length,), generator=generator).tolist() for length in (40, 90, 30, 17)]
    packed = pack_completions(ids[:1], [ids[1:]], torch.device(device))
    logprobs_T = CompletionLogprobs(model, temperature=0.8, num_tokens=len(tokenizer))(packed)
    (logprobs_T * torch.linspace(-1, 2, len(logprobs_T), device=device)).sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: each.detach().cpu().double() for name, each in {"logprobs": logprobs_T, **grads}.items()}


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("device", DEVICES)
def test_logprobs_and_gradients_equal_the_cpus_in_float64(
    device: str, is_lora: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected, actual = (
        scored(*place, tokenizer, is_lora) for place in (("cpu", torch.float64), (device, torch.float32))
    )
    assert actual.keys() == expected.keys()
    for name, exact in expected.items():
        assert (actual[name] - exact).norm() <= 1e-4 * exact.norm() + 1e-6, name


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("device", DEVICES)
def test_sampler_records_what_training_scores(
    device: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(tokenizer, hidden_size=256, initializer_range=0.05).to(device, dtype)
    prompts = [encode_text(text, tokenizer) for text in ("human: What is 2+2? <sep> assistant:", "a")]
    sampler = Sampler(model, tokenizer, max_completion_length=40, temperature=1.0, batch_size=8)
    groups = sampler.sample(prompts, [(0,), (1,)], 4)
    sampled = torch.tensor([logprob for group in groups for one in group for logprob in one.logprobs])
    packed = pack_completions(prompts, [[one.ids for one in group] for group in groups], torch.device(device))
    with torch.no_grad():
        scores = CompletionLogprobs(model, temperature=1.0, num_tokens=len(tokenizer))(packed).cpu()
    assert (sampled - scores).abs().mean() <= ERRORS[dtype]


# Whole runs: on the GPU where there is one, otherwise on the CPU.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_resumed_run_has_the_bits_of_an_unbroken_one(folder: Path, model_folder: Path) -> None:
    options = {"full_determinism": True, "beta": 0.1, "max_steps": 4, "save_steps": 2}
    unbroken, resumed = (rloo_recipe(folder, name, model_folder, rloo=options) for name in ("unbroken", "resumed"))
    main(["train", str(unbroken)])
    main(["train", str(resumed), "rloo.max_steps=2"])
    main(["train", str(resumed), "--resume"])
    torch.use_deterministic_algorithms(False)
    expected = weights(folder / "unbroken", 4)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder / "resumed", 4).items())


@pytest.mark.slow
@pytest.mark.launched
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_on_one_device_takes_the_steps_of_one_process(stage: int, folder: Path, model_folder: Path) -> None:
    alone, sharded = (rloo_recipe(folder, name, model_folder) for name in ("alone", "sharded"))
    main(["train", str(alone)])
    launch = ["--config_file", str(PROJECT / f"recipes/accelerate/zero{stage}.yaml"), "--num_processes", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "rekatrain", "train", str(sharded)]
    paths = os.pathsep.join([str(PROJECT / ".package"), str(PROJECT), str(folder), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "DeepSpeed" in finished.stderr
    expected = weights(folder / "alone", 3)
    for name, tensor in weights(folder / "sharded", 3).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_qlora_trains_the_adapter_of_a_packed_model(stage: str, folder: Path, model_folder: Path) -> None:
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    model = {
        "pretrained_model_name_or_path": str(model_folder),
        "dtype": "bfloat16",
        "quantization_config": quantization,
    }
    if stage == "rloo":
        recipe = rloo_recipe(folder, "run", model_folder, lora=LORA)
    else:
        data = {"path": str(folder / "sft.jsonl"), "format": "prompt_answer"}
        settings = {"max_steps": 3, "save_steps": 3, "bf16": True}
        recipe = write_recipe(folder, "run", model_folder, stage="sft", dataset=data, sft=settings, lora=LORA)
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"model": model}))
    main(["train", str(recipe)])
    adapter = weights(folder / "run", 3)
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert all(tensor.isfinite().all() for tensor in adapter.values())


@pytest.mark.parametrize("num_late", [0, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_graphs_on_a_device_sample_the_tokens_of_the_cpu(
    device: str, num_late: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    # On a CPU in float64, where no draw depends on rounding; FlexAttention has float32 at most. Groups join the batch,
    # and the cache grows: both change what was captured.
    model = tiny_llama(tokenizer, hidden_size=256).to(torch.float64 if device == "cpu" else torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # completions of different lengths
    texts = ("human: Name a colour. <sep> assistant:", "a", "human:", "human: 17 + 25 = <sep> assistant:")
    prompts = [encode_text(text, tokenizer) for text in texts]
    moved = copy.deepcopy(model).to(device)

    def sample(policy: Any, calls: Calls | None = None) -> list[list[int]]:
        sampler = Sampler(policy, tokenizer, max_completion_length=150, temperature=0.9, batch_size=12)
        if calls is not None:
            sampler.num_late, sampler.make_calls = num_late, lambda: calls
        groups = sampler.sample(prompts, [(4, index) for index in range(len(prompts))], 6)
        return [one.ids for group in groups for one in group]

    graphs = RecordedCalls() if device == "cpu" else CudaGraphs()
    replayed, called, on_cpu = sample(moved, graphs), sample(moved, EagerCalls()), sample(model)
    assert replayed == called
    assert graphs.num_replays > 50
    num_equal = sum(one == other for one, other in zip(replayed, on_cpu, strict=True))
    assert num_equal >= (24 if device == "cpu" else 22)


def test_throughput_measures_each_stage_and_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    throughput = importlib.import_module("throughput")
    words = [
        "--device",
        "cpu",
        "--shapes",
        "tiny",
        "--tokens",
        "64",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "out.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *words])
    throughput.main()
    lines = json.loads((tmp_path / "out.json").read_text())["results"]["lines"]
    assert [(line["stage"], line["method"]) for line in lines] == [
        (stage, method) for stage in ("sft", "rloo") for method in ("full", "lora")
    ]
    assert all(0 < line["MFU"] < 1 and line["GB"] > 0.1 and line["planned GB"] > 0.3 for line in lines)
