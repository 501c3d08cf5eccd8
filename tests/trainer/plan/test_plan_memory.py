"""The memory of a plan: to the byte what the stages' own passes take, and near what a whole process takes."""

import importlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rekatrain.trainer.plan.live_memory import LiveMemory, over_layers
from rekatrain.trainer.plan.model_size import build
from rekatrain.trainer.plan.passes import Passes
from rekatrain.trainer.recipe.load import Recipe
from transformers import LlamaConfig, PreTrainedTokenizerFast

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
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


def passes(*, num_layers: int = 3, stage: str = "rloo", lora: dict | None = None, **more: Any) -> Passes:
    model = {"pretrained_model_name_or_path": "unused", "dtype": "float32"}
    sections: dict[str, Any] = {"rloo": RLOO, "sft": {"per_device_train_batch_size": 2}}
    recipe = Recipe(stage=stage, output_dir="", model=model, dataset={}, lora=lora, **sections)  # type: ignore[arg-type]
    config = llama(num_layers)
    return Passes(
        recipe=recipe,
        config=config,
        num_layers=num_layers,
        prompts=2,
        prompt_tokens=30,
        row_tokens=64,
        is_cpu=True,
        **more,
    )


@pytest.mark.parametrize("casts", [False, True], ids=["as the weights", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_pass_without_data_takes_what_a_real_one_takes(lora: dict | None, checkpointing: bool, casts: bool) -> None:
    planned = passes(lora=lora, casts=casts)
    model = build(planned.config, planned.recipe).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    live = LiveMemory(model, lambda tensor: "all")
    with live:
        with torch.autocast("cpu", torch.bfloat16) if casts else nullcontext():
            loss = planned._loss(model)
        loss.backward()
    assert live.peak.total() > 100_000
    assert planned.train(checkpointing=checkpointing).total() == live.peak.total()


@pytest.mark.parametrize("stage", ["sft", "rloo"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_further_layer_takes_what_the_last_one_did(stage: str, checkpointing: bool) -> None:
    whole = passes(num_layers=7, stage=stage, reduces_at_once=True)
    exact = whole._train(7, checkpointing)
    assert whole.train(checkpointing=checkpointing).total() == pytest.approx(exact.total(), rel=0.005)


def test_parts_grow_by_what_the_last_layer_added() -> None:
    assert over_layers(lambda layers: Counter(saved=10 * layers, once=7), 44) == Counter(saved=440, once=7)


def test_an_attention_of_one_text_keeps_no_more_than_that_of_packed_groups() -> None:
    packed = passes(reduces_at_once=True)
    fused = replace(packed, is_cpu=False)
    assert 0.8 < fused.train(checkpointing=False).total() / packed.train(checkpointing=False).total() <= 1.02


@pytest.mark.parametrize(("stage", "lora"), [("rloo", None)])
def test_a_whole_run_takes_what_was_planned(
    stage: str, lora: dict | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller instance of tests/benchmarks/plan.py: two real steps in a process of their own."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    plan = importlib.import_module("plan")
    plan.make_model(tmp_path / "model", tokenizer, 256, 6)
    plan.write_rows(tmp_path, tokenizer, 100)
    section = {"max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "beta": 0.05}
    lengths = {"max_completion_length": 400, "micro_batch_tokens": 4000, "gradient_checkpointing": False}
    case = plan.Case(size="small", stage=stage, section=section | lengths)
    prompt_tokens = plan.count_prompt_tokens(tokenizer)
    result = plan.run_case(case, tmp_path, {"small": tmp_path / "model"}, prompt_tokens)
    assert result["measured GB"] > 1.0  # mostly ours, not the interpreter's
    assert result["ratio"] == pytest.approx(1, abs=0.1)
