"""`rekatrain plan --compare`: which method fits which launch, on nodes of 8 GPUs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.models import check_quantization
from rekatrain.trainer.plan.advice import LORA, QUANTIZATION
from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.plan.report import table
from rekatrain.trainer.recipe.load import Recipe

NUM_GPUS = (1, 2, 4, 8, 16, 64)
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-0 (DDP)": {"engine": "ddp"},
    "ZeRO-1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO-2": {"engine": "deepspeed", "zero_stage": 2},
    "ZeRO-3": {"engine": "deepspeed", "zero_stage": 3},
    "ZeRO-3, optimizer on host": {"engine": "deepspeed", "zero_stage": 3, "offload_optimizer": True},
    "ZeRO-3, all on host": {
        "engine": "deepspeed",
        "zero_stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
    },
}
# Full fine-tuning needs float32 weights where no engine keeps them.
METHODS = ("full", "LoRA", "QLoRA")


def compare(recipe: Recipe, gpu_memory: float, host_memory: float | None, prompt_tokens: int | None) -> str:
    """A table of GB a GPU in the worst phase, for SFT and RLOO; brackets where it does not fit.

    An engine that a run refuses with a method, as ZeRO-3 with QLoRA, has no row for it.
    """
    rows = []
    for stage in ("sft", "rloo"):
        for method in METHODS:
            for engine, settings in ENGINES.items():
                if _is_refused(_as(recipe, stage, method, PlannedLaunch(**settings)), settings):
                    continue
                cells = []
                for num_gpus in NUM_GPUS:
                    launch = PlannedLaunch(
                        **(settings if num_gpus > 1 or settings["engine"] == "deepspeed" else {"engine": "single"}),
                        num_gpus=num_gpus,
                        num_nodes=-(-num_gpus // 8),
                        gpu_memory=gpu_memory,
                        host_memory=host_memory,
                    )
                    cells.append(_cell(_as(recipe, stage, method, launch), launch, prompt_tokens))
                rows.append([f"{stage} {method}", engine, *cells])
    header = ["stage, weights", "engine", *(f"{count} GPU{'s' * (count > 1)}" for count in NUM_GPUS)]
    return table(header, rows)


def _cell(recipe: Recipe, launch: PlannedLaunch, prompt_tokens: int | None) -> str:
    try:
        plan = make_plan(recipe, launch, prompt_tokens=prompt_tokens)
        needed = f"{plan.worst.gpu_bytes / 1e9:.0f}"
        return f"({needed} {plan.worst.name})" if plan.overfull else needed
    except InputError:  # prompts that so many GPUs cannot share out
        return "-"


def _is_refused(recipe: Recipe, settings: dict[str, Any]) -> bool:
    try:
        check_quantization(recipe, has_gpu=True, zero_stage=settings.get("zero_stage"))
        return False
    except InputError:
        return True


def _as(recipe: Recipe, stage: str, method: str, launch: PlannedLaunch) -> Recipe:
    """The recipe's lengths and batches in another stage, with other trained weights."""
    others = dict(_sections(recipe))
    is_sharded = launch.engine == "deepspeed"
    model = {key: value for key, value in recipe.model.items() if key != "quantization_config"}
    model["dtype"] = "bfloat16" if method != "full" or is_sharded else "float32"
    if method == "QLoRA":
        model["quantization_config"] = QUANTIZATION
    rloo = {**others["rloo"], "bf16": method == "full"}
    # A step has prompts enough for every GPU.
    rloo["prompts_per_step"] = max(rloo.get("prompts_per_step", 8), launch.num_gpus)
    return replace(
        recipe,
        stage=stage,  # type: ignore[arg-type]  # one of the two above
        model=model,
        lora=None if method == "full" else recipe.lora or LORA,
        sft=others["sft"],
        rloo=rloo,
    )


def _sections(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Both stages' sections: the recipe's own, and one with its lengths for the other stage."""
    checkpointed = {"gradient_checkpointing": True}
    yield "sft", recipe.sft or {"per_device_train_batch_size": 1, "max_length": 4096, "bf16": True, **checkpointed}
    yield (
        "rloo",
        recipe.rloo or {"max_steps": 1, "max_completion_length": 1536, "micro_batch_tokens": 16384, **checkpointed},
    )
