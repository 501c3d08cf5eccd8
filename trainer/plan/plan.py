"""`rekatrain plan`, and the same check before `train` loads a weight."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.plan.compare import compare
from rekatrain.trainer.plan.cost import Rates
from rekatrain.trainer.plan.machine import GB, PlannedLaunch, launched, read_launch_file
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.plan.model_size import load_config
from rekatrain.trainer.plan.report import advice_lines, gigabytes, misfits, show
from rekatrain.trainer.plan.scale_out import scale_out
from rekatrain.trainer.recipe.load import Recipe

logger = logging.getLogger(__name__)


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
) -> bool:
    """Print the plan of a recipe, or one of the tables over many launches -> whether it fits."""
    host = None if host_memory is None else host_memory * GB
    if table == "compare":
        print(compare(recipe, gpu_memory * GB, host, prompt_tokens))
        return True
    if table == "scale-out":
        print(scale_out(recipe, gpu_memory * GB, prompt_tokens))
        return True
    if launch_file is not None:
        if num_gpus is not None:
            raise InputError("--launch says how many GPUs there are: leave out --gpus")
        launch = read_launch_file(launch_file, gpu_memory=gpu_memory * GB, host_memory=host)
    elif num_gpus is None:
        launch = launched()
    else:
        engine = "ddp" if num_gpus > 1 else "single"
        launch = PlannedLaunch(engine=engine, num_gpus=num_gpus, num_nodes=num_nodes, gpu_memory=gpu_memory * GB)  # type: ignore[arg-type]  # one of the two
        launch = replace(launch, host_memory=host)
    planned = make_plan(recipe, launch, prompt_tokens=prompt_tokens)
    print(show(planned, rates=Rates()))
    return not planned.overfull


def check_fits(recipe: Recipe, *, is_overridden: bool) -> None:
    """Raise InputError where the run cannot fit what it was launched on, unless that is overridden: then warn."""
    planned = make_plan(_within_context(recipe), launched())
    if not planned.overfull:
        worst = planned.worst
        logger.info(
            "plan: phase %s needs most, %s of %s GB",
            worst.name,
            gigabytes(worst.gpu_bytes),
            gigabytes(planned.launch.gpu_memory),
        )
    elif is_overridden:
        logger.warning("plan: %s", "; ".join(misfits(planned)))
    else:
        told = "\n".join([*misfits(planned), *advice_lines(planned)])
        raise InputError(f"{told}\n(--skip-memory-check runs it all the same)")


def _within_context(recipe: Recipe) -> Recipe:
    """A limit on rows may lie beyond the model's context: the stages look at the rows themselves."""
    context = load_config(recipe).get_text_config().max_position_embeddings

    def capped(section: dict[str, Any]) -> dict[str, Any]:
        return {**section, "max_length": context} if (section.get("max_length") or 0) > context else section

    return replace(recipe, sft=capped(recipe.sft), reward=capped(recipe.reward))
