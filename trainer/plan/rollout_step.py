"""Estimate the time of a step of RLOO whose completions vLLM servers sample.

This is a model, not a measurement. It has three resources, with the rates of cost.py: trainers (arithmetic and
collectives), rollout servers (vLLM replicas of one or more GPUs), and the transfer of new weights to the servers. All
completions are assumed to have the maximum length.
"""

from dataclasses import dataclass, replace
from math import ceil, gcd

from rekatrain.trainer.plan.cost import Cost, Rates, estimate
from rekatrain.trainer.plan.machine import GB, PlannedLaunch
from rekatrain.trainer.plan.memory import Plan, make_plan
from rekatrain.trainer.plan.states import base_bytes
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.distributed import zero3_refusal

# Completions that one replica decodes at a time: vLLM's default limit (max_num_seqs) on a GPU of 70 GB or more, and on
# others (vLLM 0.30, engine/arg_utils.py).
MAX_BATCH, MAX_BATCH_OF_SMALL = 1024, 256
# Completions of the maximum length for which a server should have a cache.
MIN_COMPLETIONS = 8
# Bytes of a server's activations and CUDA graphs, an assumption. vLLM uses 90 % of a GPU by default.
SERVER_WORKING = 4 * GB


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


def simulate_step(
    recipe: Recipe,
    trainers: int,
    servers: int,
    prompts: int,
    gpu_memory: float,
    prompt_tokens: int | None,
    rates: Rates,
) -> ScaledStep:
    """Estimate one step; InputError if the prompts cannot be divided evenly among the trainers.

    trainers, servers: GPUs that train, and GPUs that sample
    prompts:           prompts of the step
    gpu_memory:        bytes of one GPU
    prompt_tokens:     tokens per prompt; None: 256
    """
    is_full = recipe.lora is None
    launch = PlannedLaunch(
        engine="deepspeed" if is_full else "ddp" if trainers > 1 else "single",
        zero_stage=0 if not is_full else 3 if zero3_refusal(recipe) is None else 2,
        num_gpus=trainers,
        num_nodes=trainers // gcd(trainers, 8) if trainers > 8 else 1,
        gpu_memory=gpu_memory,
    )
    plan = make_plan(with_prompts(recipe, prompts), launch, prompt_tokens=prompt_tokens)
    cost = estimate(plan, rates)
    rollouts, longest = _rollout_seconds(plan, servers, prompts, gpu_memory, rates)
    return ScaledStep(
        num_trainers=trainers,
        num_servers=servers,
        compute=sum(cost.seconds.get(phase, 0.0) for phase in ("train", "score", "update")),
        collectives=_collective_seconds(cost, launch, rates),
        rollouts=rollouts,
        longest_completion=longest,
        weight_transfer=_transfer_seconds(plan, rates),
        num_tokens=prompts * (plan.prompt_tokens + plan.rloo.num_generations * plan.rloo.max_completion_length),
    )


def _collective_seconds(cost: Cost, launch: PlannedLaunch, rates: Rates) -> float:
    sent = sum(size for name, size in cost.traffic.items() if name != "parameters to sample")
    return sent / ((rates.network if launch.num_nodes > 1 else rates.nvlink) * rates.link_fraction)


def _token_bytes(plan: Plan) -> int:
    return plan.shape.kv_dims * plan.shape.num_layers * 2


def _cache_room(plan: Plan, ways: int, gpu_memory: float) -> float:
    """Return the bytes of the KV cache of a server of `ways` GPUs."""
    return (0.9 * gpu_memory - base_bytes(plan.recipe, plan.shape, 2) / ways - SERVER_WORKING) * ways


def _rollout_seconds(plan: Plan, servers: int, prompts: int, gpu_memory: float, rates: Rates) -> tuple[float, float]:
    """Return the seconds to sample a step, and the seconds of one completion on an idle server."""
    weights = base_bytes(plan.recipe, plan.shape, 2)
    length = plan.rloo.max_completion_length
    ways = min(server_ways(plan, gpu_memory) or 8, servers)
    replicas = servers // ways
    room = _cache_room(plan, ways, gpu_memory) / _token_bytes(plan) / (plan.prompt_tokens + length)
    completions = ceil(prompts * plan.rloo.num_generations / replicas)
    limit = MAX_BATCH if gpu_memory >= 70 * GB else MAX_BATCH_OF_SMALL
    batch_size = max(1, min(completions, limit, int(room)))
    # On average half of a completion is in the cache. A group's prompt is in it once.
    cached = _token_bytes(plan) * batch_size * (length / 2 + plan.prompt_tokens / plan.rloo.num_generations)
    products = 2.0 * plan.shape.num_base * batch_size
    speed = rates.adapter_fraction if plan.recipe.lora else 1.0
    seconds_per_token = rates.token_seconds(weights / ways, cached / ways, products / ways) / speed
    alone = rates.token_seconds(weights / ways, 0.0, 0.0) / speed
    # Continuous batching: when a completion ends, the next one takes its slot.
    return max(1.0, completions / batch_size) * length * seconds_per_token, length * alone


def _transfer_seconds(plan: Plan, rates: Rates) -> float:
    """Return the seconds to send the weights. A pipelined broadcast takes as long as one copy."""
    sent = 4 * plan.shape.num_adapter if plan.recipe.lora else 2 * plan.shape.num_base
    return sent / (rates.network * rates.link_fraction)


def server_ways(plan: Plan, gpu_memory: float) -> int | None:
    """Return the number of GPUs of a server: the fewest with a cache for some completions, or else for one.

    None if the weights do not fit on 8 GPUs.
    """
    length = plan.prompt_tokens + plan.rloo.max_completion_length
    for completions in (MIN_COMPLETIONS, 1):
        for ways in (1, 2, 4, 8):
            if _cache_room(plan, ways, gpu_memory) >= completions * length * _token_bytes(plan):
                return ways
    return None


def with_prompts(recipe: Recipe, prompts: int) -> Recipe:
    """Return the recipe with another number of prompts per step."""
    return replace(recipe, rloo={**recipe.rloo, "prompts_per_step": prompts})
