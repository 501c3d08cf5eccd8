"""`rekatrain plan --scale-out`: estimate a step of RLOO on 8 to 1,024 GPUs that are split into trainers and servers.

This is a model, not a measurement. It has three resources, with the rates of cost.py: trainers (arithmetic and
collectives), rollout servers (vLLM replicas of one or more GPUs), and the transfer of new weights to the servers. All
completions are assumed to have the maximum length.
"""

from dataclasses import dataclass, replace
from math import ceil, gcd

from rekatrain.data.errors import InputError
from rekatrain.trainer.plan.cost import Cost, Rates, estimate
from rekatrain.trainer.plan.machine import GB, PlannedLaunch
from rekatrain.trainer.plan.memory import Plan, make_plan
from rekatrain.trainer.plan.report import table
from rekatrain.trainer.plan.states import base_bytes
from rekatrain.trainer.recipe.load import Recipe

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
# Completions that one replica decodes at a time: vLLM's default limit (max_num_seqs).
MAX_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class ScaledStep:
    """The time of one step by resource.

    num_trainers:       GPUs that train
    num_servers:        GPUs that sample
    compute:            seconds of the trainers' arithmetic
    collectives:        seconds of the trainers' collectives
    rollouts:           seconds that the servers need to sample all completions
    longest_completion: seconds that one completion needs on an idle server
    weight_transfer:    seconds to send new weights to the servers
    num_tokens:         prompt and completion tokens of the step
    """

    num_trainers: int
    num_servers: int
    compute: float
    collectives: float
    rollouts: float
    longest_completion: float
    weight_transfer: float
    num_tokens: int

    @property
    def training(self) -> float:
        """Seconds to train: collectives overlap with the arithmetic."""
        return max(self.compute, self.collectives)

    @property
    def sampling(self) -> float:
        """Seconds to sample: no number of servers is faster than one completion."""
        return max(self.rollouts, self.longest_completion)

    @property
    def overlapped(self) -> float:
        """Seconds per step if the next batch is sampled during training (one step off policy)."""
        return max(self.training, self.sampling) + self.weight_transfer

    @property
    def on_policy(self) -> float:
        """Seconds per step if sampling and training wait for each other."""
        return self.training + self.sampling + self.weight_transfer

    @property
    def bottleneck(self) -> str:
        """Name of the resource that takes the longest."""
        seconds = {
            "training: arithmetic": self.compute,
            "training: collectives": self.collectives,
            "rollouts: memory bandwidth": self.rollouts,
            "rollouts: longest completion": self.longest_completion,
            "weight transfer": self.weight_transfer,
        }
        return max(seconds, key=lambda name: seconds[name])


HEADER = [
    "GPUs",
    "trainers",
    "servers",
    "training s",
    "rollouts s",
    "weights s",
    "step s",
    "on-policy step s",
    "tokens/s",
    "bottleneck",
]


def scale_out(recipe: Recipe, gpu_memory: float, prompt_tokens: int | None, rates: Rates | None = None) -> str:
    """Return two tables: the recipe's own step, and a step that grows with the number of GPUs.

    gpu_memory:    bytes of one GPU
    prompt_tokens: tokens per prompt; None: 256
    """
    rates = rates or Rates()
    if recipe.stage != "rloo":
        raise InputError(f"--scale-out is for stage rloo, not {recipe.stage}: use an RLOO recipe")
    config = make_plan(recipe, PlannedLaunch(num_gpus=1, gpu_memory=gpu_memory), prompt_tokens=prompt_tokens).rloo
    texts = [
        f"rates: {rates.describe()}\n"
        "These times are estimates for this GPU, also with another --gpu-memory. A replica decodes "
        f"{MAX_BATCH} completions at a time.\n"
        "trainers, servers: GPUs that train and that sample, in the fastest split\n"
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
            steps = [
                # A trainer needs at least one prompt.
                simulate_step(
                    recipe, min(trainers, prompts), size - trainers, prompts, gpu_memory, prompt_tokens, rates
                )
                for trainers in _splits(size)
            ]
            best = min(steps, key=lambda step: (step.overlapped, step.num_trainers))
            lines.append(_line(size, best))
        texts.append(f"{title}\n{table(HEADER, lines)}")
    return "\n\n".join(texts)


def _splits(size: int) -> list[int]:
    """Return the numbers of trainers to try: one to seven eighths of the GPUs."""
    return [size * eighths // 8 for eighths in range(1, 8)]


def _line(size: int, best: ScaledStep) -> list[str]:
    return [
        str(size),
        str(best.num_trainers),
        str(best.num_servers),
        f"{best.training:.1f}",
        f"{best.sampling:.1f}",
        f"{best.weight_transfer:.2f}",
        f"{best.overlapped:.1f}",
        f"{best.on_policy:.1f}",
        f"{best.num_tokens / best.overlapped:,.0f}",
        best.bottleneck,
    ]


def simulate_step(
    recipe: Recipe,
    trainers: int,
    servers: int,
    prompts: int,
    gpu_memory: float,
    prompt_tokens: int | None,
    rates: Rates,
) -> ScaledStep:
    """Estimate one step.

    trainers, servers: GPUs that train, and GPUs that sample
    prompts:           prompts of the step
    gpu_memory:        bytes of one GPU
    prompt_tokens:     tokens per prompt; None: 256
    """
    # A step takes as long as its slowest trainer: round the prompts up to a multiple of the trainers.
    padded = replace(recipe, rloo={**recipe.rloo, "prompts_per_step": ceil(prompts / trainers) * trainers})
    is_full = recipe.lora is None
    launch = PlannedLaunch(
        engine="deepspeed" if is_full else "ddp" if trainers > 1 else "single",
        zero_stage=3 if is_full else 0,
        num_gpus=trainers,
        num_nodes=trainers // gcd(trainers, 8) if trainers > 8 else 1,
        gpu_memory=gpu_memory,
    )
    plan = make_plan(padded, launch, prompt_tokens=prompt_tokens)
    cost = estimate(plan, rates)
    rollouts, longest = _rollout_seconds(plan, servers, prompts, gpu_memory, rates)
    return ScaledStep(
        num_trainers=trainers,
        num_servers=servers,
        compute=cost.seconds["train"] + cost.seconds.get("score", 0.0),
        collectives=_collective_seconds(cost, launch, rates),
        rollouts=rollouts,
        longest_completion=longest,
        weight_transfer=_transfer_seconds(plan, rates),
        num_tokens=prompts * (plan.prompt_tokens + plan.rloo.num_generations * plan.rloo.max_completion_length),
    )


def _collective_seconds(cost: Cost, launch: PlannedLaunch, rates: Rates) -> float:
    sent = sum(size for name, size in cost.traffic.items() if name != "parameters to sample")
    return sent / ((rates.network if launch.num_nodes > 1 else rates.nvlink) * rates.link_fraction)


def _rollout_seconds(plan: Plan, servers: int, prompts: int, gpu_memory: float, rates: Rates) -> tuple[float, float]:
    """Return the seconds to sample a step, and the seconds of one completion on an idle server."""
    weights = base_bytes(plan.recipe, plan.shape, 2)
    token_bytes = plan.shape.kv_dims * plan.shape.num_layers * 2
    length = plan.rloo.max_completion_length
    # Use tensor parallelism over `ways` GPUs if the weights are too large for one.
    ways = next((ways for ways in (1, 2, 4, 8) if weights / ways < 0.75 * gpu_memory), 8)
    replicas = max(1, servers // ways)
    # Bytes for the cache: vLLM uses 90 % of a GPU by default; 4 GB are assumed for activations and CUDA graphs.
    room = (0.9 * gpu_memory - weights / ways - 4 * GB) * ways
    completions = ceil(prompts * plan.rloo.num_generations / replicas)
    batch_size = max(1, min(completions, MAX_BATCH, int(room / token_bytes / (plan.prompt_tokens + length))))
    # On average half of a completion is in the cache. A group's prompt is in it once.
    cached = token_bytes * batch_size * (length / 2 + plan.prompt_tokens / plan.rloo.num_generations)
    read = (weights + cached) / (ways * rates.memory * rates.memory_fraction)
    computed = 2 * plan.shape.num_base * batch_size / (ways * rates.flops * rates.training_fraction)
    seconds_per_token = max(read, computed)
    alone = weights / (ways * rates.memory * rates.memory_fraction)
    # Continuous batching: when a completion ends, the next one takes its slot.
    return max(1.0, completions / batch_size) * length * seconds_per_token, length * alone


def _transfer_seconds(plan: Plan, rates: Rates) -> float:
    """Return the seconds to send the weights. A pipelined broadcast takes as long as one copy."""
    sent = 4 * plan.shape.num_adapter if plan.recipe.lora else 2 * plan.shape.num_base
    return sent / (rates.network * rates.link_fraction)
