"""Planned memory: equal to the byte for the stages' own passes, and close for a whole process."""

import copy
import importlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rekatrain.trainer.plan.live_memory import LiveMemory, extrapolate_layers
from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.model_size import build, measure_shape
from rekatrain.trainer.plan.passes import measure_train, run_loss, train_peak
from rekatrain.trainer.plan.states import count_states
from rekatrain.trainer.plan.workload import Workload
from rekatrain.trainer.recipe.load import Recipe

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SEQUENCE_TOKENS = 500  # of a row in a whole run
RLOO = {"max_steps": 1, "num_generations": 3, "max_completion_length": 40, "micro_batch_tokens": 400}


def llama(num_layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=331,
        hidden_size=64,
        intermediate_size=205,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )


def workload(*, num_layers: int = 3, stage: str = "rloo", lora: dict | None = None, **more: Any) -> Workload:
    model = {"pretrained_model_name_or_path": "unused", "dtype": "float32"}
    sections: dict[str, Any] = {"rloo": RLOO, "sft": {"per_device_train_batch_size": 2}}
    recipe = Recipe(stage=stage, output_dir="", model=model, dataset={}, lora=lora, **sections)  # type: ignore[arg-type]
    config = llama(num_layers)
    return Workload(
        recipe=recipe,
        config=config,
        num_layers=num_layers,
        num_prompts=2,
        prompt_tokens=30,
        sequence_tokens=64,
        is_cpu=True,
        **more,
    )


def exact_peak(whole: Workload, checkpointing: bool) -> float:
    """Return the peak of a training pass with all layers, in bytes."""
    return max(each.total() for each in measure_train(whole, whole.num_layers, checkpointing))


@pytest.mark.parametrize("autocasts", [False, True], ids=["as the weights", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_train_peak_equals_that_of_a_real_pass(lora: dict | None, checkpointing: bool, autocasts: bool) -> None:
    planned = workload(lora=lora, autocasts=autocasts)
    model = build(planned.config, planned.recipe).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    live = LiveMemory(model, lambda tensor: "all")
    with live:
        with torch.autocast("cpu", torch.bfloat16) if autocasts else nullcontext():
            loss = run_loss(planned, model)
        loss.backward()
    assert live.peak.total() > 100_000
    assert train_peak(planned, checkpointing).total() == live.peak.total()


@pytest.mark.parametrize("autocasts", [False, True], ids=["as the weights", "bfloat16"])
@pytest.mark.parametrize("stage", ["rloo", "reward"])
def test_plan_counts_float32_weights_of_a_bfloat16_model(stage: str, autocasts: bool) -> None:
    modules = ["norm", "embed_tokens"] + ["lm_head"] * (stage == "rloo")  # the head of a reward model is another one
    planned = workload(stage=stage, lora=LORA | {"modules_to_save": modules}, autocasts=autocasts)
    recipe = replace(planned.recipe, model=planned.recipe.model | {"dtype": "bfloat16"})
    planned = replace(planned, recipe=recipe)
    model = build(planned.config, recipe).train()
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    states = count_states(recipe, measure_shape(planned.config, recipe), PlannedLaunch(is_cpu=True), uses_bf16=True)
    assert states.weights.total() == sum(parameter.nbytes for parameter in parameters)
    assert states.gradients == sum(parameter.nbytes for parameter in trained)
    assert states.optimizer == 2 * states.gradients
    live = LiveMemory(model, lambda tensor: "all")
    with live:
        with torch.autocast("cpu", torch.bfloat16) if autocasts else nullcontext():
            loss = run_loss(planned, model)
        loss.backward()
    exact = live.peak.total()
    # The fake mask of a reward model is not seen to be all ones: attention then has it as a tensor.
    assert train_peak(planned, False).total() == (exact if stage == "rloo" else pytest.approx(exact, rel=0.04))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_train_peak_of_the_fused_head_equals_a_real_pass(lora: dict | None) -> None:
    planned = workload(lora=lora)
    recipe = replace(planned.recipe, rloo={**planned.recipe.rloo, "fused_lm_head": True})
    planned = replace(planned, recipe=recipe)
    model = build(planned.config, recipe).train()
    live = LiveMemory(model, lambda tensor: "all")
    with live:
        run_loss(planned, model).backward()
    assert train_peak(planned, False).total() == live.peak.total()
    # The kernel of a GPU works in its tile, where torch makes temporaries.
    on_gpu = train_peak(replace(planned, is_cpu=False), False)
    assert on_gpu.total() < live.peak.total()


@pytest.mark.parametrize("stage", ["sft", "rloo"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocasts", [False, True], ids=["as the weights", "bfloat16"])
def test_train_peak_grows_linearly_with_layers(autocasts: bool, stage: str, checkpointing: bool) -> None:
    # Autocast keeps copies of the weights until the forward pass ends: a deep model may have its peak in the forward
    # pass, where a shallow one has it in the backward pass.
    whole = workload(num_layers=24, stage=stage, reduces_in_backward=True, autocasts=autocasts)
    exact = exact_peak(whole, checkpointing)
    assert train_peak(whole, checkpointing).total() == pytest.approx(exact, rel=0.005)


@pytest.mark.parametrize(
    "section",
    [
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [4, 5], "rank_pattern": {"q_proj": 8}},
        {"target_modules": r".*layers\.[45]\.(mlp\.down_proj|self_attn\.q_proj)"},
        {"target_modules": ["layers.4.mlp.down_proj", "layers.5.mlp.down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.[0-3]\..*"},
        {"target_modules": r".*layers\.5\.mlp\.up_proj|lm_head"},
    ],
    ids=["layers_to_transform", "regex", "full names", "exclude_modules", "head"],
)
def test_train_peak_bounds_adapters_of_some_layers(section: dict) -> None:
    some = workload(num_layers=7, lora={**LORA, **section}, reduces_in_backward=True)
    planned, exact = train_peak(some, False).total(), exact_peak(some, False)
    every = train_peak(workload(num_layers=7, lora=LORA | {"r": 8}, reduces_in_backward=True), False).total()
    assert exact * 0.995 <= planned <= every * 1.1


def test_extrapolate_layers_grows_each_part_linearly() -> None:
    assert extrapolate_layers(lambda layers: Counter(saved=10 * layers, once=7), 44) == Counter(saved=440, once=7)


def test_train_peak_is_about_the_same_with_fused_attention() -> None:
    packed = workload(reduces_in_backward=True)
    fused = replace(packed, is_cpu=False)
    assert 0.8 < train_peak(fused, False).total() / train_peak(packed, False).total() <= 1.02


@pytest.mark.slow
@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
def test_make_plan_predicts_the_memory_of_a_whole_run(
    stage: str,
    has_adapter: bool,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run a small case of tests/benchmarks/plan.py: two real steps in a separate process."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    plan = importlib.import_module("plan")
    if stage == "sft":  # TRL multiplies 32,768 rows of the head at a time: of a smaller head it leaves memory untouched
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens([f"<{number}>" for number in range(32_768)])
    plan.make_model(tmp_path / "model", tokenizer, 256, 6)
    plan.write_rows(tmp_path, tokenizer, SEQUENCE_TOKENS)
    sizes = {
        "sft": {"per_device_train_batch_size": 4, "max_length": SEQUENCE_TOKENS},
        "reward": {"per_device_train_batch_size": 4, "max_length": SEQUENCE_TOKENS},
        "rloo": {"prompts_per_step": 2, "num_generations": 4, "beta": 0.05}
        | {"max_completion_length": 400, "micro_batch_tokens": 4000},
    }[stage]
    section = {"max_steps": 2, "gradient_checkpointing": False} | sizes
    case = plan.Case(size="small", stage=stage, section=section, has_adapter=has_adapter)
    prompt_tokens = plan.count_prompt_tokens(tokenizer)
    result = plan.run_case(case, tmp_path, {"small": tmp_path / "model"}, prompt_tokens)
    assert result["measured GB"] > 2 * 0.4  # most of it is the model and its activations, not the interpreter
    assert result["ratio"] == pytest.approx(1, abs=0.1)
