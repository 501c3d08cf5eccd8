"""`rekatrain plan`, and the memory check that `train` makes before it loads weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.weights import one_line
from rekatrain.trainer.plan.calibrate import calibrate, read_rates
from rekatrain.trainer.plan.compare import compare
from rekatrain.trainer.plan.cost import Rates
from rekatrain.trainer.plan.machine import GB, PlannedLaunch, current_launch, read_launch_file
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.plan.model_size import load_config
from rekatrain.trainer.plan.report import advice_lines, gigabytes, misfits, render_plan
from rekatrain.trainer.plan.scale_out import SOME_URL, scale_out
from rekatrain.trainer.recipe.load import Recipe

logger = logging.getLogger(__name__)

# Types of models that tests sample and train (tests/trainer/models/test_families.py).
TESTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "bert")


def plan(
    recipe: Recipe,
    *,
    launch_file: Path | None,
    num_gpus: int | None,
    num_nodes: int,
    gpu_memory: float,
    host_memory: float | None,
    prompt_tokens: int | None,
    table: str | None,
    calibrated: Path | None = None,
    rates_file: Path | None = None,
) -> bool:
    """Print the plan of a recipe, or a table over many launches; return False if the plan does not fit.

    launch_file:   an Accelerate launch file; None: `num_gpus`, or the launch of this process
    num_gpus:      GPUs that train, with a whole model each or as the launch file says; None: those of the file
    num_nodes:     nodes that hold these GPUs
    gpu_memory:    GB (10^9 bytes) of one GPU
    host_memory:   GB of one host; None: not checked
    prompt_tokens: tokens per prompt in stage rloo; None: 256
    table:         "compare" or "scale-out" for a table; None: the plan
    calibrated:    file to write rates to that are measured on this machine; the plan uses them
    rates_file:    file with such rates, which the plan uses
    """
    host = None if host_memory is None else host_memory * GB
    recipe = with_servers(recipe)
    if table == "compare":
        print(compare(recipe, gpu_memory * GB, host, prompt_tokens))
        return True
    if table == "scale-out":
        print(scale_out(recipe, gpu_memory * GB, prompt_tokens, read_rates(rates_file) if rates_file else None))
        return True
    if launch_file is not None:
        launch = read_launch_file(launch_file, gpu_memory=gpu_memory * GB, host_memory=host, num_gpus=num_gpus)
    elif num_gpus is None:
        launch = current_launch()
    else:
        engine = "ddp" if num_gpus > 1 else "single"
        launch = PlannedLaunch(engine=engine, num_gpus=num_gpus, num_nodes=num_nodes, gpu_memory=gpu_memory * GB)  # type: ignore[arg-type]  # "ddp" or "single"
        launch = replace(launch, host_memory=host)
    with _plannable(recipe):
        planned = make_plan(recipe, launch, prompt_tokens=prompt_tokens)
        rates = read_rates(rates_file) if rates_file else Rates()
        if calibrated is not None:
            rates = calibrate(planned, calibrated)
        print(render_plan(planned, rates=rates))
        return not planned.overfull


def with_servers(recipe: Recipe) -> Recipe:
    """Return the recipe as `rekatrain launch` trains it, if its section `launch:` places vLLM servers."""
    placement = (recipe.launch or {}).get("placement")
    if placement not in ("split", "shared") or recipe.rloo.get("vllm_server_base_url"):
        return recipe
    return replace(recipe, rloo={**recipe.rloo, "vllm_server_base_url": SOME_URL})


def check_fits(recipe: Recipe, *, is_overridden: bool) -> None:
    """Raise InputError if the run does not fit its launch; only log a warning if `is_overridden`."""
    with _plannable(recipe):
        planned = make_plan(_within_context(recipe), current_launch())
        is_fitting = not planned.overfull
    if is_fitting:
        worst = planned.worst
        logger.info(
            "plan: phase %s needs the most memory, %s of %s GB",
            worst.name,
            gigabytes(worst.gpu_bytes),
            gigabytes(planned.launch.gpu_memory),
        )
    elif is_overridden:
        logger.warning("plan: %s", "; ".join(misfits(planned)))
    else:
        message = "\n".join([*misfits(planned), *advice_lines(planned)])
        raise InputError(f"{message}\n(--skip-memory-check starts the run anyway)")


@contextmanager
def _plannable(recipe: Recipe) -> Iterator[None]:
    """Turn what the code of an untested architecture raises, as it is run without weights, into InputError.

    An error of a tested one is a bug of ours, and keeps its traceback.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers' models raise many unrelated classes
        model_type = load_config(recipe).model_type
        if model_type in TESTED:
            raise
        raise InputError(
            f"the code of model_type {model_type}, an architecture that nobody has tried here, fails in stage "
            f"{recipe.stage}: {one_line(error)}"
        ) from error


def _within_context(recipe: Recipe) -> Recipe:
    """Cap `max_length` at the model's context: a longer limit is no error, because the stages check each sequence."""
    context = load_config(recipe).get_text_config().max_position_embeddings

    def capped(section: dict[str, Any]) -> dict[str, Any]:
        return {**section, "max_length": context} if (section.get("max_length") or 0) > context else section

    return replace(recipe, sft=capped(recipe.sft), reward=capped(recipe.reward))
