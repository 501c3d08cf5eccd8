"""`rekatrain plan --scale-out`: estimate a step of RLOO on 8 to 1,024 GPUs that are split into trainers and servers.

Each split in the table is one that a run accepts: the prompts can be divided evenly among the trainers, and training
and the servers fit. The times are those of rollout_step.py.
"""

from dataclasses import dataclass, replace

from rekatrain.data.errors import InputError
from rekatrain.trainer.plan.cost import CALIBRATION, Rates
from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.plan.report import table
from rekatrain.trainer.plan.rollout_step import ScaledStep, server_ways, simulate_step, with_prompts
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
SOME_URL = "http://127.0.0.1:8000"
HEADER = [
    "GPUs",
    "trainers",
    "launch",
    "servers",
    "training s",
    "rollouts s",
    "weights s",
    "step s",
    "on-policy step s",
    "tokens/s",
    "bottleneck",
]


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split of the GPUs that a run accepts: its prompts can be divided among the trainers, and everything fits.

    launch: the trainers
    ways:   GPUs of one server
    """

    launch: PlannedLaunch
    step: ScaledStep
    ways: int

    @property
    def engine(self) -> str:
        """Name of the launch file in recipes/accelerate, without its suffix."""
        offload = "-offload" if self.launch.offload_optimizer else ""
        return f"zero{self.launch.zero_stage}{offload}" if self.launch.engine == "deepspeed" else self.launch.engine


def scale_out(recipe: Recipe, gpu_memory: float, prompt_tokens: int | None, rates: Rates | None = None) -> str:
    """Return two tables: the recipe's own step, and a step that grows with the number of GPUs.

    gpu_memory:    bytes of one GPU
    prompt_tokens: tokens per prompt; None: 256
    """
    rates = rates or Rates()
    if recipe.stage != "rloo":
        raise InputError(f"--scale-out is for stage rloo, not {recipe.stage}: use an RLOO recipe")
    config = RLOOConfig(**recipe.rloo)
    texts = [
        f"rates: {rates.describe()}\n"
        "These times are estimates for this GPU, also with another --gpu-memory. All completions have the maximum "
        "length. The fractions were fitted to published speeds of other programs:\n"
        + "".join(f"  {line}\n" for line in CALIBRATION)
        + "trainers, servers: GPUs that train and that sample, in the fastest split that fits and that divides the "
        "prompts evenly among the trainers; launch: file of recipes/accelerate\n"
        "step: the next batch is sampled during training (one step off policy); on-policy step: one after the other\n"
        "tokens/s: prompt and completion tokens per second of `step`"
    ]
    for title, prompts_per_gpu in (
        (f"the recipe's step of {config.prompts_per_step} x {config.num_generations} completions", None),
        (f"a step that grows: 8 x {config.num_generations} completions per GPU", 8),
    ):
        lines = []
        for size in SIZES:
            prompts = config.prompts_per_step if prompts_per_gpu is None else prompts_per_gpu * size
            split = best_split(recipe, size, prompts, gpu_memory, prompt_tokens, rates)
            lines.append(
                [str(size), *(["-"] * (len(HEADER) - 2)), "nothing fits"] if split is None else _line(size, split)
            )
        texts.append(f"{title}\n{table(HEADER, lines)}")
    return "\n\n".join(texts)


def best_split(
    recipe: Recipe, size: int, prompts: int, gpu_memory: float, prompt_tokens: int | None, rates: Rates
) -> Split | None:
    """Return the split of `size` GPUs with the shortest step that a run accepts; None if there is none.

    prompts: prompts of the step
    """
    served = replace(recipe, rloo={**recipe.rloo, "vllm_server_base_url": SOME_URL})
    plan = make_plan(with_prompts(served, 1), PlannedLaunch(gpu_memory=gpu_memory), prompt_tokens=prompt_tokens)
    ways = server_ways(plan, gpu_memory)
    if ways is None:
        return None
    splits = []
    for trainers in range(1, size):
        servers = (size - trainers) // ways * ways
        if prompts % trainers == 0 and servers and (trainers <= 8 or trainers % 8 == 0):
            step = simulate_step(served, trainers, servers, prompts, gpu_memory, prompt_tokens, rates)
            splits.append((step.overlapped, trainers, step))
    for _, trainers, step in sorted(splits, key=lambda split: split[:2]):
        for launch in launches(trainers, gpu_memory):
            # Two prompts for each trainer: more of them need no more memory, and equal plans share their measurements.
            if _accepts(with_prompts(served, 2 * trainers), launch, prompt_tokens):
                return Split(launch=launch, step=step, ways=ways)
    return None


def launches(num_gpus: int, gpu_memory: float) -> list[PlannedLaunch]:
    """Return the launches of so many trainers, on nodes of 8: from the least traffic to the least memory."""
    shared = {"num_gpus": num_gpus, "num_nodes": max(1, num_gpus // 8), "gpu_memory": gpu_memory}
    whole = PlannedLaunch(engine="ddp" if num_gpus > 1 else "single", **shared)  # type: ignore[arg-type]  # from a dict
    deepspeed = [
        PlannedLaunch(engine="deepspeed", zero_stage=stage, offload_optimizer=host, offload_parameters=host, **shared)  # type: ignore[arg-type]  # from a dict
        for stage, host in ((2, False), (3, False), (3, True))
    ]
    return [whole, *deepspeed]


def _accepts(recipe: Recipe, launch: PlannedLaunch, prompt_tokens: int | None) -> bool:
    try:
        return make_plan(recipe, launch, prompt_tokens=prompt_tokens).fits
    except InputError:  # QLoRA excludes ZeRO-3
        return False


def _line(size: int, split: Split) -> list[str]:
    step = split.step
    return [
        str(size),
        str(step.num_trainers),
        split.engine,
        str(step.num_servers) + (f" ({split.ways} each)" if split.ways > 1 else ""),
        f"{step.training:.1f}",
        f"{step.sampling:.1f}",
        f"{step.weight_transfer:.2f}",
        f"{step.overlapped:.1f}",
        f"{step.on_policy:.1f}",
        f"{step.num_tokens / step.overlapped:,.0f}",
        step.bottleneck,
    ]
