"""`rekatrain plan --compare`: a table of which method fits which launch, on nodes of 8 GPUs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.quantization import check_quantization
from rekatrain.trainer.plan.combinations import LORA, QUANTIZATION
from rekatrain.trainer.plan.machine import GB, PlannedLaunch
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.plan.report import table
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.optimizers import check_optim
from rekatrain.trainer.rloo.distributed import check_zero

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
METHODS = ("full", "LoRA", "QLoRA")


def compare(recipe: Recipe, gpu_memory: float, host_memory: float | None, prompt_tokens: int | None) -> str:
    """Return a table of the GPU memory that SFT and RLOO need with each method, engine and number of GPUs.

    Combinations that a run rejects, such as ZeRO-3 with QLoRA, or ZeRO with Muon, are left out.

    gpu_memory:    bytes of one GPU
    host_memory:   bytes of one host; None: not checked
    prompt_tokens: tokens per prompt in RLOO; None: 256
    """
    lines = []
    for stage in ("sft", "rloo"):
        for method in METHODS:
            for engine, settings in ENGINES.items():
                if _is_rejected(_as(recipe, stage, method, PlannedLaunch(**settings)), settings):
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
                lines.append([f"{stage} {method}", engine, *cells])
    header = ["stage, weights", "engine", *(f"{count} GPU{'s' * (count > 1)}" for count in NUM_GPUS)]
    host = "" if host_memory is None else f", {host_memory / GB:.4g} GB per host"
    legend = [
        f"GB (10^9 bytes) per GPU in the phase that needs the most; GPUs of {gpu_memory / GB:.4g} GB, 8 per node{host}",
        "(GB phase): does not fit, and the phase that needs the most",
        "-: the step cannot be divided among this number of GPUs",
    ]
    return "\n".join([*legend, "", table(header, lines)])


def _cell(recipe: Recipe, launch: PlannedLaunch, prompt_tokens: int | None) -> str:
    try:
        plan = make_plan(recipe, launch, prompt_tokens=prompt_tokens)
        needed = f"{plan.worst.gpu_bytes / GB:.0f}"
        return f"({needed} {plan.worst.name})" if plan.overfull else needed
    except InputError:  # for example more GPUs than prompts
        return "-"


def _is_rejected(recipe: Recipe, settings: dict[str, Any]) -> bool:
    try:
        check_quantization(recipe, has_gpu=True, zero_stage=settings.get("zero_stage"))
        check_optim(recipe, is_deepspeed=settings["engine"] == "deepspeed")
        if recipe.stage == "rloo":
            check_zero(recipe, settings.get("zero_stage", 0))
        return False
    except InputError:
        return True


def _as(recipe: Recipe, stage: str, method: str, launch: PlannedLaunch) -> Recipe:
    """Return the recipe with another stage and method, but its own lengths and batch sizes."""
    others = dict(_sections(recipe))
    is_sharded = launch.engine == "deepspeed"
    model = {key: value for key, value in recipe.model.items() if key != "quantization_config"}
    # DeepSpeed keeps float32 weights for the optimizer. Without it, full fine-tuning needs a float32 model.
    model["dtype"] = "bfloat16" if method != "full" or is_sharded else "float32"
    if method == "QLoRA":
        model["quantization_config"] = QUANTIZATION
    rloo = {**others["rloo"], "bf16": method == "full"}
    # At least one prompt per GPU.
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
    """Yield the sections of both stages: the recipe's own, and a default for the other stage."""
    checkpointed = {"gradient_checkpointing": True}
    yield "sft", recipe.sft or {"per_device_train_batch_size": 1, "max_length": 4096, "bf16": True, **checkpointed}
    yield (
        "rloo",
        recipe.rloo or {"max_steps": 1, "max_completion_length": 1536, "micro_batch_tokens": 16384, **checkpointed},
    )
