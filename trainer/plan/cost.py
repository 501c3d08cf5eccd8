"""Arithmetic, traffic and time of a step, from published rates and stated shares of them.

The estimate is for judging a launch, not for promising one. Completions are taken to run to their cap, as in the
memory plan: real ones are shorter. FLOPs are those of tests/benchmarks/roofline.py:

    2 * weights a token forward, as many for the gradient of the inputs, as many for that of the weights (not of a
    frozen base), as many again where activations are recomputed; attention 4 * heads * head size * keys seen forward
"""

from dataclasses import dataclass

from rekatrain.trainer.plan.memory import Plan
from rekatrain.trainer.plan.states import base_bytes, is_bfloat16


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a GPU and its links do in a second, and the share of it that is taken to be reached.

    Defaults: NVIDIA H100 SXM5 80 GB: 989 TFLOP/s dense bfloat16, 3.35 TB/s of memory, NVLink 900 GB/s both ways
    together (data sheet, nvidia.com/en-us/data-center/h100); a 400 Gbit/s network port a GPU (DGX H100 data sheet). The
    training share is what Meta reached for Llama 3 405B, 38 to 43 % (arXiv 2407.21783, table 4). The other shares, and
    the time to launch a layer's kernels in eager PyTorch, are our assumptions: no GPU run of this program stands behind
    them.
    """

    name: str = "H100 SXM5"
    flops: float = 989e12
    memory: float = 3.35e12
    nvlink: float = 450e9
    network: float = 50e9
    share_training: float = 0.4
    share_memory: float = 0.6
    share_links: float = 0.7
    seconds_to_launch_a_layer: float = 2e-4

    def describe(self) -> str:
        """The rates in words."""
        return (
            f"{self.name}: {self.share_training:.0%} of {self.flops / 1e12:.0f} TFLOP/s, {self.share_memory:.0%} of "
            f"{self.memory / 1e12:.2f} TB/s memory, {self.share_links:.0%} of NVLink's {self.nvlink / 1e9:.0f} GB/s "
            f"and of the network's {self.network / 1e9:.0f} GB/s a GPU"
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A step of one GPU.

    train_tokens:   tokens that the model is trained on, all micro-batches together
    sampled_tokens: completion tokens drawn
    flops:          arithmetic by phase
    traffic:        bytes that the GPU sends and receives, by what for
    seconds:        by phase
    """

    train_tokens: int
    sampled_tokens: int
    flops: dict[str, float]
    traffic: dict[str, float]
    seconds: dict[str, float]


def estimate(plan: Plan, rates: Rates) -> Cost:
    """The cost of one step of the plan's recipe."""
    train_tokens, pairs = _trained(plan)
    forward = _forward_flops(plan, train_tokens, pairs)
    is_adapter = plan.recipe.lora is not None
    passes = 1 + (1 if is_adapter else 2) + plan.checkpoints_activations
    flops = {"train": passes * forward}
    seconds: dict[str, float] = {}
    sampled = 0
    if plan.recipe.stage == "rloo":
        config = plan.rloo
        sampled = plan.prompts * config.num_generations * config.max_completion_length
        flops["sample"] = _forward_flops(plan, sampled + plan.prompts * plan.prompt_tokens, pairs)
        if config.beta:
            flops["score"] = forward
        seconds["sample"] = _decoding_seconds(plan, rates)
    traffic = _traffic(plan)
    slow = plan.launch.num_nodes > 1
    link = (rates.network if slow else rates.nvlink) * rates.share_links
    seconds |= {
        phase: count / (rates.flops * rates.share_training) for phase, count in flops.items() if phase != "sample"
    }
    seconds["traffic"] = sum(traffic.values()) / link
    return Cost(train_tokens=train_tokens, sampled_tokens=sampled, flops=flops, traffic=traffic, seconds=seconds)


def _trained(plan: Plan) -> tuple[int, float]:
    """Tokens of a process's step, and the pairs of query and key that are not masked."""
    passes = plan.passes
    if plan.recipe.stage != "rloo":
        tokens = passes.micro_batch_tokens * passes.num_micro_batches
        return tokens, tokens * plan.row_tokens * plan.launch.sequence_parallel / 2
    config = plan.rloo
    own, prompt = config.max_completion_length - 1, plan.prompt_tokens
    rows = plan.prompts * config.num_generations
    pairs = plan.prompts * prompt**2 / 2 + rows * (own * prompt + own**2 / 2)
    return plan.prompts * prompt + rows * own, pairs


def _forward_flops(plan: Plan, tokens: int, pairs: float) -> float:
    weights = plan.shape.num_linear + plan.shape.num_head + (plan.shape.num_adapter if plan.recipe.lora else 0)
    return 2.0 * weights * tokens + 4.0 * plan.shape.num_layers * plan.shape.attention_dims * pairs


def _decoding_seconds(plan: Plan, rates: Rates) -> float:
    """Each token of a batch reads all weights and the batch's cache; with enough rows the products take longer."""
    config = plan.rloo
    at_once = plan.passes.sampled_at_once
    batches = -(-plan.prompts * config.num_generations // at_once)
    size = 2 if is_bfloat16(plan.recipe) or plan.casts else 4
    weights = base_bytes(plan.recipe, plan.shape, size)
    # Half of a completion's cache is there on average; a group's prompt is read once.
    cache = plan.shape.num_layers * plan.shape.kv_dims * size
    cached_tokens = at_once * config.max_completion_length / 2 + at_once / config.num_generations * plan.prompt_tokens
    read = (weights + cache * cached_tokens) / (rates.memory * rates.share_memory)
    computed = 2.0 * plan.shape.num_base * at_once / (rates.flops * rates.share_training)
    launched = plan.shape.num_layers * rates.seconds_to_launch_a_layer
    return batches * config.max_completion_length * max(read, computed, launched)


def _traffic(plan: Plan) -> dict[str, float]:
    """Bytes through a GPU's links in a step: ring collectives move (N - 1) / N of what they reduce or gather."""
    launch, shape = plan.launch, plan.shape
    ring = (launch.num_gpus - 1) / launch.num_gpus
    if not ring:
        return {}
    size = 2 if launch.engine == "deepspeed" or is_bfloat16(plan.recipe) else 4
    trained = shape.num_trained * (4 if plan.recipe.lora and launch.engine == "ddp" else size)
    # An all-reduce is a scatter of sums and a gather; ZeRO 1 and 2 gather the updated weights in place of gradients.
    traffic = {"gradients and updates": 2 * ring * trained}
    if launch.shards(3) > 1:
        whole = base_bytes(plan.recipe, shape, size)
        traffic = {
            "gradients and updates": ring * trained,
            "parameters gathered": 2 * ring * whole * plan.passes.num_micro_batches,
        }
        if plan.recipe.stage == "rloo":
            traffic["parameters to sample"] = ring * whole
    if launch.sequence_parallel > 1:
        # Ulysses (arXiv 2309.14509): queries, keys, values and outputs change places, forward and backward.
        tokens = plan.passes.micro_batch_tokens * plan.passes.num_micro_batches
        width = 2 * shape.attention_dims + shape.kv_dims
        traffic["sequence parallelism"] = 2.0 * 2 * width * tokens * shape.num_layers
    return traffic
