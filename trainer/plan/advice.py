"""Find changes that make a plan fit. Changes that keep the result of the run come first.

Each change is planned again before it is recommended.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.plan.combinations import (
    LORA,
    LORA_TEXT,
    QUANTIZATION,
    QUANTIZATION_TEXT,
    Change,
    combinations,
    larger_splits,
    splits_text,
)
from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.memory import Plan, make_plan
from rekatrain.trainer.recipe.load import Recipe, Section

# Number of changes that are recommended, and number of times that a batch size is halved.
MAX_CHANGES = 4
MAX_HALVINGS = 3


def advise(plan: Plan) -> list[Change]:
    """Return single changes that make the plan fit; if there are none, combined ones; if none fits, nothing.

    More GPUs are recommended only where none of the changes on these GPUs fits. Nothing is returned only if no method
    fits under any engine, with the smallest batches, servers on other GPUs and a 16th of the length.
    """
    changes = list(_changes(plan.recipe, plan.launch))
    here = [change for change in changes if change.launch.num_gpus == plan.launch.num_gpus]
    single = list(islice((change for change in here if _fits(plan, change)), MAX_CHANGES))
    if all(_is_on_host(change) for change in single):  # slow: there may be a faster way with several changes
        single = (single or _first(plan, is_quantized=False)) + _first(plan, is_quantized=True)
    more = (change for change in changes if change not in here and _fits(plan, change))
    return single or list(islice(more, MAX_CHANGES))


def _first(plan: Plan, *, is_quantized: bool) -> list[Change]:
    """Return the first combined change that fits, with QLoRA or without it."""
    changes = (one for one in combinations(plan) if bool(one.recipe.model.get("quantization_config")) == is_quantized)
    return list(islice((change for change in changes if _fits(plan, change)), 1))


def _is_on_host(change: Change) -> bool:
    return change.launch.offload_optimizer or change.launch.offload_parameters


def _fits(plan: Plan, change: Change) -> bool:
    try:
        return make_plan(change.recipe, change.launch, prompt_tokens=plan.prompt_tokens or None).fits
    except InputError:  # a change that the recipe does not allow, such as more GPUs than prompts
        return False


def _changes(recipe: Recipe, launch: PlannedLaunch) -> Iterator[Change]:
    """Yield single changes: first those that keep the result, last those that train something else."""
    section = {"sft": recipe.sft, "reward": recipe.reward, "rloo": recipe.rloo}[recipe.stage]

    def by_recipe(key: str, value: object, note: str = "") -> Change:
        changed = _with_section(recipe, {**section, key: value})
        return Change(text=f"{recipe.stage}.{key}={_yaml(value)}{note}", recipe=changed, launch=launch)

    if not section.get("gradient_checkpointing", recipe.stage != "rloo"):
        yield by_recipe("gradient_checkpointing", True, " (same result, a third more arithmetic)")
    if recipe.stage == "rloo":
        for key, least in (("micro_batch_tokens", 1024), ("per_device_generation_batch_size", None)):
            value = int(section.get(key, {"micro_batch_tokens": 8192}.get(key, 64)))
            least = least or int(section.get("num_generations", 8))
            for smaller in (value // 2**halvings for halvings in range(1, MAX_HALVINGS + 1)):
                if smaller >= least:
                    yield by_recipe(key, smaller, " (same result, smaller matrix products)")
    else:
        size, steps = section.get("per_device_train_batch_size", 8), section.get("gradient_accumulation_steps", 1)
        while size > 1 and size % 2 == 0:
            size, steps = size // 2, steps * 2
            changed = {**section, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
            yield Change(
                text=f"{recipe.stage}.per_device_train_batch_size={size} {recipe.stage}.gradient_accumulation_steps="
                f"{steps} (same step)",
                recipe=_with_section(recipe, changed),
                launch=launch,
            )
    if not launch.is_cpu:
        yield from _launches(recipe, launch)
    if recipe.lora is None:
        yield Change(
            text=LORA_TEXT,
            recipe=replace(recipe, lora=LORA, model={**recipe.model, "dtype": "bfloat16"}),
            launch=launch,
        )
    elif not recipe.model.get("quantization_config") and not launch.is_cpu:
        yield Change(
            text=QUANTIZATION_TEXT,
            recipe=replace(recipe, model={**recipe.model, "quantization_config": QUANTIZATION}),
            launch=launch,
        )


def _launches(recipe: Recipe, launch: PlannedLaunch) -> Iterator[Change]:
    def by_launch(text: str, **changes: Any) -> Change:  # Any: values of PlannedLaunch's fields
        return Change(text=text, recipe=recipe, launch=replace(launch, **changes))

    for stage in (1, 2, 3):
        if launch.num_gpus > 1 and (launch.engine != "deepspeed" or launch.zero_stage < stage):
            yield by_launch(f"launch with ZeRO-{stage}", engine="deepspeed", zero_stage=stage)
    if recipe.stage == "rloo":  # in the other stages fewer processes would have other sequences: another batch size
        for size in larger_splits(launch):
            yield by_launch(splits_text(size), sequence_parallel=size)
    if launch.num_gpus > 1 and not launch.offload_optimizer:
        text = "launch with ZeRO-3 and the optimizer on the host (slower updates)"
        yield by_launch(text, engine="deepspeed", zero_stage=3, offload_optimizer=True)
    if not launch.offload_parameters:
        text = "launch with ZeRO-3, optimizer and parameters on the host (slow)"
        yield by_launch(text, engine="deepspeed", zero_stage=3, offload_optimizer=True, offload_parameters=True)
    for factor in (2, 4, 8):
        num_gpus = launch.num_gpus * factor
        if num_gpus <= 128:
            yield by_launch(
                f"more GPUs: {num_gpus} with ZeRO-3",
                num_gpus=num_gpus,
                num_nodes=max(launch.num_nodes, -(-num_gpus // 8)),
                engine="deepspeed",
                zero_stage=3,
            )


def _with_section(recipe: Recipe, section: Section) -> Recipe:
    return Recipe(**{**vars(recipe), recipe.stage: section})


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
