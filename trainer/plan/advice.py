"""What to change where a plan does not fit, nearest to what was asked first, each change planned again."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.memory import Plan, make_plan
from rekatrain.trainer.recipe.load import Recipe, Section

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# Changes that are told, and how often a batch is halved.
MOST = 4
HALVINGS = 3
QUANTIZATION = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A step towards fitting: what it says to do, and what is then planned."""

    text: str
    recipe: Recipe
    launch: PlannedLaunch

    @property
    def kind(self) -> str:
        """What is changed, whatever to."""
        return self.text.split("=")[0].split(":")[0].split("-")[0]


def advise(plan: Plan) -> list[Change]:
    """Changes that make the plan fit: those that do so alone, or else the first ones that do together; or none."""
    alone = list(islice((one for one in _changes(plan.recipe, plan.launch) if _fits(plan, one)), MOST))
    if alone:
        return alone
    recipe, launch, texts = plan.recipe, plan.launch, []
    done: set[str] = set()
    while change := next((one for one in _strongest(recipe, launch) if one.kind not in done), None):
        done.add(change.kind)
        recipe, launch = change.recipe, change.launch
        texts.append(change.text)
        together = replace(change, text="; ".join(texts))
        if _fits(plan, together):
            return [together]
    return []


def _strongest(recipe: Recipe, launch: PlannedLaunch) -> list[Change]:
    """Of each kind of change the last one, in their order."""
    return list({change.kind: change for change in _changes(recipe, launch)}.values())


def _fits(plan: Plan, change: Change) -> bool:
    try:
        return make_plan(change.recipe, change.launch, prompt_tokens=plan.prompt_tokens or None).fits
    except InputError:  # a change that the recipe has no room for, such as prompts that GPUs cannot share out
        return False


def _changes(recipe: Recipe, launch: PlannedLaunch) -> Iterator[Change]:
    """Single changes, from those that change no result to those that train something else."""
    section = {"sft": recipe.sft, "reward": recipe.reward, "rloo": recipe.rloo}[recipe.stage]

    def by_recipe(key: str, value: object, note: str = "") -> Change:
        changed = _with_section(recipe, {**section, key: value})
        return Change(text=f"{recipe.stage}.{key}={_yaml(value)}{note}", recipe=changed, launch=launch)

    if not section.get("gradient_checkpointing", recipe.stage != "rloo"):
        yield by_recipe("gradient_checkpointing", True, " (the same result, a third more arithmetic)")
    if recipe.stage == "rloo":
        for key, least in (("micro_batch_tokens", 1024), ("per_device_generation_batch_size", None)):
            value = int(section.get(key, {"micro_batch_tokens": 8192}.get(key, 64)))
            least = least or int(section.get("num_generations", 8))
            for smaller in (value // 2**halvings for halvings in range(1, HALVINGS + 1)):
                if smaller >= least:
                    yield by_recipe(key, smaller, " (the same result, smaller products)")
    else:
        rows, steps = section.get("per_device_train_batch_size", 8), section.get("gradient_accumulation_steps", 1)
        while rows > 1 and rows % 2 == 0:
            rows, steps = rows // 2, steps * 2
            changed = {**section, "per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
            yield Change(
                text=f"{recipe.stage}.per_device_train_batch_size={rows} {recipe.stage}.gradient_accumulation_steps="
                f"{steps} (the same step)",
                recipe=_with_section(recipe, changed),
                launch=launch,
            )
    if not launch.is_cpu:
        yield from _launches(recipe, launch)
    if recipe.lora is None:
        yield Change(
            text="'lora={r: 16, lora_alpha: 32, target_modules: all-linear}' model.dtype=bfloat16 (trains an adapter)",
            recipe=replace(recipe, lora=LORA, model={**recipe.model, "dtype": "bfloat16"}),
            launch=launch,
        )
    elif not recipe.model.get("quantization_config") and not launch.is_cpu:
        yield Change(
            text="'model.quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: "
            "bfloat16}' (QLoRA: a base in four bits)",
            recipe=replace(recipe, model={**recipe.model, "quantization_config": QUANTIZATION}),
            launch=launch,
        )


def _launches(recipe: Recipe, launch: PlannedLaunch) -> Iterator[Change]:
    def by_launch(text: str, **changes: Any) -> Change:  # Any: a field of PlannedLaunch
        return Change(text=text, recipe=recipe, launch=replace(launch, **changes))

    for stage in (1, 2, 3):
        if launch.num_gpus > 1 and (launch.engine != "deepspeed" or launch.zero_stage < stage):
            yield by_launch(f"launch with ZeRO-{stage}", engine="deepspeed", zero_stage=stage)
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
