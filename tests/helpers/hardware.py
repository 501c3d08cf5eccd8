"""Plans of the 21B recipes on hardware that people have, and what is wrong with their answers.

python -m tests.helpers.hardware      # all combinations: two or three minutes
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from rekatrain.data.errors import InputError
from rekatrain.trainer.plan.advice import advise
from rekatrain.trainer.plan.combinations import LORA, QUANTIZATION
from rekatrain.trainer.plan.compare import ENGINES
from rekatrain.trainer.plan.machine import GB, PlannedLaunch
from rekatrain.trainer.plan.memory import Plan, make_plan
from rekatrain.trainer.plan.report import misfits
from rekatrain.trainer.recipe.load import Recipe, load_recipe
from rekatrain.trainer.recipe.sections import check_sections

FOLDER = Path(__file__).parents[2] / "recipes" / "reka-flash-3"
# GPUs, GB of each, and GB of the host.
HARDWARE = ((1, 24, 64), (4, 24, 128), (8, 24, 256), (1, 48, 128), (4, 48, 256), (8, 80, 512), (8, 141, 1024))
ROLLOUTS = ("rloo.prompts_per_step=32", "rloo.per_device_generation_batch_size=16")
RECIPES: tuple[tuple[str, Sequence[str]], ...] = (
    ("sft-qlora", ()),
    ("sft-qlora", ("sft.max_length=4096",)),
    ("sft-lora", ()),
    ("sft-full", ()),
    ("reward", ()),
    ("rloo-8k", ROLLOUTS),
    ("rloo-32k", (*ROLLOUTS, "rloo.vllm_server_base_url=http://127.0.0.1:8000")),
)


def plan_of(name: str, overrides: Sequence[str], hardware: tuple[int, int, int]) -> Plan:
    """Return the plan of a recipe with a whole model on each GPU, as `rekatrain plan --gpus` makes it."""
    gpus, memory, host = hardware
    recipe = load_recipe(FOLDER / f"{name}.yaml", overrides)
    launch = PlannedLaunch(engine="ddp" if gpus > 1 else "single", num_gpus=gpus, gpu_memory=memory * GB)
    return make_plan(recipe, replace(launch, host_memory=host * GB))


def contradictions(plan: Plan) -> Iterator[str]:
    """Yield what is wrong with the answer to a plan: an unfit recommendation, or none where a method fits."""
    too_much = any(phase.gpu_bytes > plan.launch.gpu_memory for phase in plan.phases)
    too_much |= any(phase.host_bytes > (plan.launch.host_memory or 0) for phase in plan.phases)
    if too_much != bool(misfits(plan)):
        yield "the verdict is not that of the table"
    if not too_much:
        return
    changes = advise(plan)
    for change in changes:
        check_sections(change.recipe)
        if make_plan(change.recipe, change.launch).overfull:
            yield f"does not fit: {change.text}"
    if not changes:
        yield from (f"fits, but is not recommended: {method}" for method in fitting_methods(plan))


def fitting_methods(plan: Plan) -> Iterator[str]:
    """Yield the methods and engines of `plan --compare` under which the recipe fits on the plan's GPUs."""
    recipe, model = plan.recipe, dict(plan.recipe.model)
    methods: dict[str, Recipe] = {
        "as it is": recipe,
        "LoRA": replace(recipe, lora=recipe.lora or LORA),
        "QLoRA": replace(recipe, lora=recipe.lora or LORA, model={**model, "quantization_config": QUANTIZATION}),
    }
    for (method, changed), (engine, settings) in product(methods.items(), ENGINES.items()):
        try:
            launch = replace(plan.launch, **settings) if plan.launch.num_gpus > 1 or "zero_stage" in settings else None
            if make_plan(changed, launch or plan.launch).fits:
                yield f"{method}, {engine}"
        except InputError:
            continue


def main() -> None:
    """Print the answer to every combination."""
    for (name, overrides), hardware in product(RECIPES, HARDWARE):
        plan = plan_of(name, overrides, hardware)
        wrong = list(contradictions(plan))
        changes = advise(plan) if plan.overfull else []
        answer = "fits" if not plan.overfull else " | ".join(change.text for change in changes[:1]) or "nothing fits"
        needed = f"{plan.worst.gpu_bytes / GB:.1f} GB ({plan.worst.name})"
        print(
            f"{hardware[0]} x {hardware[1]} GB, {name} {' '.join(overrides)}: {needed}: {answer} {wrong or ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
