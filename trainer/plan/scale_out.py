"""`rekatrain plan --scale-out`: a step of RLOO on 8 to 1,024 GPUs, trainers and rollout servers apart, on paper.

A simulation of three resources, at the rates of cost.py: trainers (arithmetic and collectives), rollout servers (one
vLLM replica a GPU or more), and the way of new weights between them. Completions run to their cap.
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
# Rows that one replica decodes at a time: vLLM's default limit (max_num_seqs).
ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Point:
    """Seconds of a step by resource, with so many trainers and servers."""

    trainers: int
    servers: int
    compute: float
    collectives: float
    rollouts: float
    longest: float
    weights: float
    tokens: int

    @property
    def training(self) -> float:
        """Collectives run beside the arithmetic where they are the shorter."""
        return max(self.compute, self.collectives)

    @property
    def sampling(self) -> float:
        return max(self.rollouts, self.longest)

    @property
    def overlapped(self) -> float:
        """A step where the next batch is sampled while this one trains (one step off policy)."""
        return max(self.training, self.sampling) + self.weights

    @property
    def on_policy(self) -> float:
        """A step where each waits for the other."""
        return self.training + self.sampling + self.weights

    @property
    def limit(self) -> str:
        """What is used up first."""
        named = {
            "training: arithmetic": self.compute,
            "training: collectives": self.collectives,
            "rollouts: memory bandwidth": self.rollouts,
            "rollouts: the longest completion": self.longest,
            "weights to servers": self.weights,
        }
        return max(named, key=lambda name: named[name])


def scale_out(recipe: Recipe, gpu_memory: float, prompt_tokens: int | None, rates: Rates | None = None) -> str:
    """Two tables: the recipe's own step, and one that grows with the GPUs."""
    rates = rates or Rates()
    if recipe.stage != "rloo":
        raise InputError("--scale-out is for stage rloo: give it an rloo recipe")
    config = make_plan(recipe, PlannedLaunch(num_gpus=1, gpu_memory=gpu_memory), prompt_tokens=prompt_tokens).rloo
    texts = [f"rates: {rates.describe()}; {ROWS_AT_ONCE} rows to a replica"]
    for title, a_gpu in (
        (f"the recipe's step of {config.prompts_per_step} x {config.num_generations} completions", None),
        (f"a step that grows: 8 x {config.num_generations} completions a GPU", 8),
    ):
        rows = []
        for size in SIZES:
            prompts = config.prompts_per_step if a_gpu is None else a_gpu * size
            points = [
                # A trainer without a prompt has nothing to do.
                point(recipe, min(trainers, prompts), size - trainers, prompts, gpu_memory, prompt_tokens, rates)
                for trainers in _splits(size)
            ]
            best = min(points, key=lambda one: (one.overlapped, one.trainers))
            rows.append(_row(size, best))
        header = [
            "GPUs",
            "train",
            "serve",
            "train s",
            "rollouts s",
            "weights s",
            "step s",
            "on policy",
            "tokens/s",
            "first used up",
        ]
        texts.append(f"{title}\n{table(header, rows)}")
    return "\n\n".join(texts)


def _splits(size: int) -> list[int]:
    """How many of the GPUs may train: eighths of them."""
    return [size * eighths // 8 for eighths in range(1, 8)]


def _row(size: int, best: Point) -> list[str]:
    return [
        str(size),
        str(best.trainers),
        str(best.servers),
        f"{best.training:.1f}",
        f"{best.sampling:.1f}",
        f"{best.weights:.2f}",
        f"{best.overlapped:.1f}",
        f"{best.on_policy:.1f}",
        f"{best.tokens / best.overlapped:,.0f}",
        best.limit,
    ]


def point(
    recipe: Recipe,
    trainers: int,
    servers: int,
    prompts: int,
    gpu_memory: float,
    prompt_tokens: int | None,
    rates: Rates,
) -> Point:
    """One step, on so many trainers and servers."""
    share = ceil(prompts / trainers)
    shared_out = replace(recipe, rloo={**recipe.rloo, "prompts_per_step": share * trainers})
    is_full = recipe.lora is None
    launch = PlannedLaunch(
        engine="deepspeed" if is_full else "ddp" if trainers > 1 else "single",
        zero_stage=3 if is_full else 0,
        num_gpus=trainers,
        num_nodes=trainers // gcd(trainers, 8) if trainers > 8 else 1,
        gpu_memory=gpu_memory,
    )
    plan = make_plan(shared_out, launch, prompt_tokens=prompt_tokens)
    cost = estimate(plan, rates)
    rollouts, longest = _rollouts(plan, servers, prompts, gpu_memory, rates)
    return Point(
        trainers=trainers,
        servers=servers,
        compute=cost.seconds["train"] + cost.seconds.get("score", 0.0),
        collectives=_collectives(cost, launch, rates),
        rollouts=rollouts,
        longest=longest,
        weights=_weights(plan, rates),
        tokens=prompts * (plan.prompt_tokens + plan.rloo.num_generations * plan.rloo.max_completion_length),
    )


def _collectives(cost: Cost, launch: PlannedLaunch, rates: Rates) -> float:
    sent = sum(size for name, size in cost.traffic.items() if name != "parameters to sample")
    return sent / ((rates.network if launch.num_nodes > 1 else rates.nvlink) * rates.share_links)


def _rollouts(plan: Plan, servers: int, prompts: int, gpu_memory: float, rates: Rates) -> tuple[float, float]:
    """Seconds to sample a step, and those that its longest completion takes however many servers there are."""
    weights = base_bytes(plan.recipe, plan.shape, 2)
    cache = plan.shape.kv_dims * plan.shape.num_layers * 2
    row = plan.prompt_tokens + plan.rloo.max_completion_length
    ways = next((ways for ways in (1, 2, 4, 8) if weights / ways < 0.75 * gpu_memory), 8)
    replicas = max(1, servers // ways)
    room = (0.9 * gpu_memory - weights / ways - 4 * GB) * ways
    rows = ceil(prompts * plan.rloo.num_generations / replicas)
    at_once = max(1, min(rows, ROWS_AT_ONCE, int(room / cache / row)))
    cached = cache * at_once * (plan.rloo.max_completion_length / 2 + plan.prompt_tokens / plan.rloo.num_generations)
    read = (weights + cached) / (ways * rates.memory * rates.share_memory)
    computed = 2 * plan.shape.num_base * at_once / (ways * rates.flops * rates.share_training)
    seconds_a_token = max(read, computed)
    alone = weights / (ways * rates.memory * rates.share_memory)
    length = plan.rloo.max_completion_length
    # Continuous batching: a row that ends makes room for the next.
    return max(1.0, rows / at_once) * length * seconds_a_token, length * alone


def _weights(plan: Plan, rates: Rates) -> float:
    """A pipelined broadcast takes as long as one copy of what is sent, however many listen."""
    sent = 4 * plan.shape.num_adapter if plan.recipe.lora else 2 * plan.shape.num_base
    return sent / (rates.network * rates.share_links)
