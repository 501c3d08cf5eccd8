"""`rekatrain plan` counts FlexAttention's block mask."""

from pathlib import Path

from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.rloo.kernels.block_mask import block_mask_bytes

RECIPE = Path(__file__).parents[3] / "recipes" / "reka-flash-3" / "rloo-full.yaml"
LONG = ("rloo.max_completion_length=32000", "rloo.micro_batch_tokens=32768", "rloo.num_generations=2")


def test_make_plan_counts_the_attention_mask_of_rloo_on_a_gpu() -> None:
    plan = make_plan(load_recipe(RECIPE, LONG), PlannedLaunch(engine="ddp", num_gpus=8))
    num_tokens = plan.workload.micro_batch_tokens
    assert num_tokens > 32_000
    masks = {phase.name: phase.gpu["attention mask"] for phase in plan.phases}
    # Four tables of blocks of 128 tokens, and three numbers per token; 10 bytes per pair of tokens would be 10 GB.
    assert masks.pop("train") == block_mask_bytes(num_tokens) < 2e6
    assert masks.pop("score", 0) in (0, block_mask_bytes(num_tokens))
    assert set(masks.values()) == {0}
