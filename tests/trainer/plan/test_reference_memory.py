"""The planned bytes of the KL penalty's reference are those that a run allocates for it."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rekatrain.trainer.plan.live_memory import LiveMemory
from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.model_size import build, measure_shape
from rekatrain.trainer.plan.states import count_states
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, make_reference
from tests.trainer.plan.test_plan_memory import LORA, llama

CONFIG = LlamaConfig(**{**llama(2).to_dict(), "attention_bias": True})


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize(
    ("lora", "continues", "takes_memory"),
    [(None, False, True), (LORA, False, False), ({**LORA, "bias": "all"}, False, True), (LORA, True, True)],
    ids=["full", "lora", "bias", "continued"],
)
def test_reference_has_the_planned_bytes(
    lora: dict[str, Any] | None, continues: bool, takes_memory: bool, beta: float, tmp_path: Path
) -> None:
    if continues:
        adapted = get_peft_model(LlamaForCausalLM(CONFIG), LoraConfig(**LORA, task_type="CAUSAL_LM"))
        adapted.peft_config["default"].base_model_name_or_path = "unused"
        adapted.save_pretrained(tmp_path)
    model = {"pretrained_model_name_or_path": str(tmp_path) if continues else "unused", "dtype": "float32"}
    rloo = {"max_steps": 1, "beta": beta}
    recipe = Recipe(stage="rloo", output_dir="", model=model, dataset={}, lora=lora, rloo=rloo)
    policy = CompletionLogprobs(build(CONFIG, recipe), temperature=1.0, num_tokens=CONFIG.vocab_size)
    with LiveMemory(policy, lambda tensor: "reference") as live:
        reference = make_reference(Accelerator(cpu=True), policy, RLOOConfig(**rloo), continues_adapter=continues)
    states = count_states(recipe, measure_shape(CONFIG, recipe), PlannedLaunch(is_cpu=True), uses_bf16=False)
    assert (reference is not None) == (beta > 0)
    buffers = sum(buffer.nbytes for buffer in policy.buffers()) if lora is None and beta else 0  # some frequencies
    assert live.live.total() == states.reference + buffers
    assert (states.reference > 0) == (takes_memory and beta > 0)
