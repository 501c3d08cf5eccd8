"""Times of the plan: published speeds that the rates were fitted to, and others that they were not fitted to."""

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from rekatrain.trainer.plan.cost import CALIBRATION, Rates, estimate
from rekatrain.trainer.plan.machine import GB, PlannedLaunch
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.plan.rollout_step import simulate_step
from rekatrain.trainer.plan.scale_out import SIZES, best_split, scale_out
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
URL = "http://127.0.0.1:8000"
# Hidden size, layers, key-value heads, intermediate size and vocabulary of models with 64 heads.
LLAMA_70B = (8192, 80, 8, 28672, 128256, 128)
QWEN_32B = (5120, 64, 8, 25600, 151936, 128)
REKA = (6144, 44, 8, 19648, 100352, 96)


def recipe(folder: Path, shape: tuple[int, ...], stage: str, *, lora: bool, **section: object) -> Recipe:
    """A recipe of a Llama of this shape."""
    hidden, layers, kv_heads, intermediate, vocabulary, head_dim = shape
    LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        head_dim=head_dim,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    model = {"pretrained_model_name_or_path": str(folder), "dtype": "bfloat16"}
    name = {"sft": "sft", "rloo": "rloo"}[stage]
    others = {"stage": stage, "output_dir": "", "dataset": {}, "lora": LORA if lora else None, name: section}
    return Recipe(model=model, **others)  # type: ignore[arg-type]  # from a dict


def rloo(
    folder: Path, shape: tuple[int, ...], *, lora: bool, length: int, prompts: int = 64, group: int = 32
) -> Recipe:
    return recipe(
        folder,
        shape,
        "rloo",
        lora=lora,
        max_steps=1,
        prompts_per_step=prompts,
        num_generations=group,
        per_device_generation_batch_size=group,
        max_completion_length=length,
        micro_batch_tokens=8192,
        gradient_checkpointing=True,
        beta=0.0,
        vllm_server_base_url=URL,
    )


def test_rates_give_the_published_speed_of_lora(tmp_path: Path) -> None:
    sft = recipe(tmp_path, LLAMA_70B, "sft", lora=True, per_device_train_batch_size=1, max_length=4096, packing=True)
    cost = estimate(make_plan(sft, PlannedLaunch(engine="ddp", num_gpus=8)), Rates())
    assert cost.train_tokens / cost.seconds["train"] == pytest.approx(608, rel=0.1)
    assert "608 tokens/s" in CALIBRATION[0]


def test_rates_give_the_published_speeds_of_vllm(tmp_path: Path) -> None:
    rates = Rates()
    assert 16 / rates.token_seconds(2 * 27e9, 0.0, 16 * 2 * 27e9) == pytest.approx(439, rel=0.02)
    steps = [
        simulate_step(rloo(tmp_path, REKA, lora=lora, length=2048), 8, 8, 64, 80 * GB, None, rates)
        for lora in (True, False)
    ]
    assert steps[1].rollouts / steps[0].rollouts == pytest.approx(1788 / 2694, rel=1e-6)
    assert steps[1].longest_completion / steps[0].longest_completion == pytest.approx(1788 / 2694, rel=1e-6)


def test_step_times_are_near_published_ones_of_rl(tmp_path: Path) -> None:
    """NeMo-RL trains Qwen3 32B at 494 tokens/s per GPU one step off policy and 540 on policy (completions of 3,206)."""
    step = best_split(rloo(tmp_path, QWEN_32B, lora=False, length=3206), 32, 64, 80 * GB, 256, Rates())
    assert step is not None
    per_gpu = step.step.num_tokens / step.step.overlapped / 32
    assert 0.75 < per_gpu / 494 < 1.25


@pytest.mark.parametrize(("prompts", "gpu_memory"), [(30, 80), (64, 48), (64, 141)])
def test_best_split_is_one_that_a_run_accepts(tmp_path: Path, prompts: int, gpu_memory: int) -> None:
    given = rloo(tmp_path, REKA, lora=True, length=8192, prompts=prompts, group=8)
    for size in (8, 32):
        split = best_split(given, size, prompts, gpu_memory * GB, None, Rates())
        assert split is not None
        step = split.step
        assert step.num_trainers == split.launch.num_gpus
        assert step.num_trainers + step.num_servers <= size and step.num_servers % split.ways == 0
        assert RLOOConfig(**given.rloo).prompts_per_process(step.num_trainers) >= 1
        assert make_plan(given, split.launch).overfull == []


def test_scale_out_prints_only_splits_that_divide_the_prompts(tmp_path: Path) -> None:
    text = scale_out(rloo(tmp_path, REKA, lora=False, length=4096, prompts=24, group=8), 80 * GB, None)
    own, growing = text.split("\n\n")[1:]
    for table, prompts in ((own, [24] * len(SIZES)), (growing, [8 * size for size in SIZES])):
        rows = [re.split(r"\s{2,}", line) for line in table.splitlines()[3:]]
        assert [int(row[0]) for row in rows] == list(SIZES)
        assert all(total % int(row[1]) == 0 for total, row in zip(prompts, rows, strict=True))
    assert all(line in text for line in CALIBRATION) and "estimates" in text
