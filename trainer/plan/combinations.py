"""Combined changes of a recipe and its launch, from those that keep the result to those that train something else."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.memory import Plan
from rekatrain.trainer.recipe.load import Recipe

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
QUANTIZATION = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
LORA_TEXT = "'lora={r: 16, lora_alpha: 32, target_modules: all-linear}' model.dtype=bfloat16 (trains an adapter)"
QUANTIZATION_TEXT = (
    "'model.quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true, "
    "bnb_4bit_compute_dtype: bfloat16}' (QLoRA: base weights in 4 bits)"
)
SERVERS_TEXT = "rloo.vllm_server_base_url=URL (sample with vLLM servers on other GPUs)"
SOME_URL = "http://127.0.0.1:8000"
# Keys of the length of a row or a completion; and the parts of it that are tried.
LENGTHS = {"sft": "max_length", "reward": "max_length", "rloo": "max_completion_length"}
PARTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the recipe or the launch.

    text: the change as command-line overrides or phrases
    """

    text: str
    recipe: Recipe
    launch: PlannedLaunch


def combinations(plan: Plan) -> Iterator[Change]:
    """Yield changes on the same GPUs: engines, smaller batches, split sequences, servers, methods, and shorter rows."""
    ways = (_engines, _splits) if plan.recipe.stage == "rloo" else (_engines,)
    for part in PARTS:
        for length_texts, shorter in _shorter(plan.recipe, part):
            for method_texts, trained in _methods(shorter, plan.launch):
                for sampling_texts, sampled in _sampling(trained, plan):
                    for engines, (batch_texts, batched) in product(ways, _batches(sampled)):
                        for engine_texts, launch in engines(plan.launch):
                            texts = [*engine_texts, *batch_texts, *sampling_texts, *method_texts, *length_texts]
                            if texts:
                                yield Change(text="; ".join(texts), recipe=batched, launch=launch)


def _shorter(recipe: Recipe, part: int) -> Iterator[tuple[list[str], Recipe]]:
    key = LENGTHS[recipe.stage]
    length = getattr(recipe, recipe.stage).get(key)
    if part == 1:
        yield [], recipe
    elif length and length // part >= 512:
        changes: dict[str, Any] = {key: length // part}
        if recipe.stage == "rloo":  # they must stay below the length
            ours = {name: recipe.rloo.get(name) for name in ("overlong_buffer", "reasoning_budget")}
            changes |= {name: value // part for name, value in ours.items() if value}
        unit = "completions" if recipe.stage == "rloo" else "rows"
        texts = [f"{recipe.stage}.{name}={value}" for name, value in changes.items()]
        yield [f"{' '.join(texts)} (shorter {unit})"], _with(recipe, changes)


def _methods(recipe: Recipe, launch: PlannedLaunch) -> Iterator[tuple[list[str], Recipe]]:
    yield [], recipe
    texts = []
    if recipe.lora is None:
        texts.append(LORA_TEXT)
        recipe = replace(recipe, lora=LORA, model={**recipe.model, "dtype": "bfloat16"})
        yield [*texts], recipe
    if not recipe.model.get("quantization_config") and not launch.is_cpu:
        texts.append(QUANTIZATION_TEXT)
        yield texts, replace(recipe, model={**recipe.model, "quantization_config": QUANTIZATION})


def _sampling(recipe: Recipe, plan: Plan) -> Iterator[tuple[list[str], Recipe]]:
    yield [], recipe
    if recipe.stage == "rloo" and not plan.samples_elsewhere and not plan.launch.is_cpu:
        yield [SERVERS_TEXT], _with(recipe, {"vllm_server_base_url": SOME_URL})


def _batches(recipe: Recipe) -> Iterator[tuple[list[str], Recipe]]:
    yield [], recipe
    section, stage = getattr(recipe, recipe.stage), recipe.stage
    changes: dict[str, Any] = {}
    if not section.get("gradient_checkpointing", stage != "rloo"):
        changes["gradient_checkpointing"] = True
    if stage == "rloo":
        least = {"micro_batch_tokens": 1024, "per_device_generation_batch_size": section.get("num_generations", 8)}
        usual = {"micro_batch_tokens": 8192, "per_device_generation_batch_size": 64}
        changes |= {key: value for key, value in least.items() if value < section.get(key, usual[key])}
    else:
        size, steps = section.get("per_device_train_batch_size", 8), section.get("gradient_accumulation_steps", 1)
        if size > 1:
            changes |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": size * steps}
    if changes:
        texts = [f"{stage}.{key}={str(value).lower()}" for key, value in changes.items()]
        yield [f"{' '.join(texts)} (same result, smaller batches)"], _with(recipe, changes)


def splits_text(size: int) -> str:
    """Return a phrase for sequences that are split among so many processes."""
    return f"split sequences: parallelism_config_sp_size: {size} in parallelism_config of the launch file (same result)"


def larger_splits(launch: PlannedLaunch) -> Iterator[int]:
    """Yield larger numbers of processes among which this launch can split each sequence."""
    sizes = (size for size in (2, 4, 8, 16) if size > launch.sequence_parallel)
    return (size for size in sizes if launch.num_gpus % size == 0)


def _engines(launch: PlannedLaunch) -> Iterator[tuple[list[str], PlannedLaunch]]:
    yield [], launch
    if launch.is_cpu:
        return
    for stage in (1, 2, 3) if launch.num_gpus > 1 else ():
        text = f"launch with ZeRO-{stage}"
        yield [text], _zero(launch, stage)
    if launch.num_gpus > 1:
        text = "launch with ZeRO-3 and the optimizer on the host (slower updates)"
        yield [text], replace(_zero(launch, 3), offload_optimizer=True)
    text = "launch with ZeRO-3, optimizer and parameters on the host (slow)"
    yield [text], replace(_zero(launch, 3), offload_optimizer=True, offload_parameters=True)
    if launch.engine == "deepspeed":  # a quantized base excludes ZeRO-3
        engine: Any = "ddp" if launch.num_gpus > 1 else "single"
        whole = replace(launch, engine=engine, zero_stage=0, offload_optimizer=False, offload_parameters=False)
        yield ["launch with a whole model on each GPU (ddp)"], replace(whole, sequence_parallel=1)


def _splits(launch: PlannedLaunch) -> Iterator[tuple[list[str], PlannedLaunch]]:
    for size in larger_splits(launch):
        yield [splits_text(size)], replace(launch, sequence_parallel=size)
        yield ["launch with ZeRO-3", splits_text(size)], replace(_zero(launch, 3), sequence_parallel=size)


def _zero(launch: PlannedLaunch, stage: int) -> PlannedLaunch:
    return replace(launch, engine="deepspeed", zero_stage=stage, offload_optimizer=False, offload_parameters=False)


def _with(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    return Recipe(**{**vars(recipe), recipe.stage: {**getattr(recipe, recipe.stage), **changes}})
