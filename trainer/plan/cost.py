"""Estimate the arithmetic, traffic and time of a step from published rates and assumed efficiencies.

The estimate serves to compare launches; it is not a measurement. All completions are assumed to have the maximum
length, as in the memory plan. FLOPs are counted as in tests/benchmarks/roofline.py:

    linear layers: 2 FLOPs per weight and token in the forward pass; as many again for the gradient of the inputs, for
                   the gradient of the weights (unless the base is frozen), and for recomputed activations
    attention:     4 * heads * head size per query and visible key in the forward pass
    Muon:          5 Newton-Schulz steps per matrix and update, see `newton_schulz_flops`
"""

from dataclasses import dataclass

from rekatrain.trainer.plan.memory import Plan
from rekatrain.trainer.plan.states import base_bytes, is_bfloat16
from rekatrain.trainer.recipe.optimizers import MUON, optim_of
from rekatrain.trainer.rloo.sequence_parallel import attention_heads

# What the fractions below were fitted to: published speeds of other programs on H100 GPUs. A test computes each of them
# from the rates.
CALIBRATION = (
    "training: 608 tokens/s per GPU, LoRA of Llama 3 70B on 8 GPUs (NVIDIA NeMo AutoModel)",
    "decoding: 439 tokens/s, 16 completions of a model of 27B parameters on one GPU (vLLM)",
    "LoRA in vLLM: 1,788 of 2,694 tokens/s (vLLM, pull request 11267)",
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The peak rates of a GPU and its links, and the fractions of them that a run is assumed to reach.

    Peak rates: NVIDIA H100 SXM5 80 GB (data sheet, nvidia.com/en-us/data-center/h100), with one 400 Gbit/s network port
    per GPU (DGX H100 data sheet). NVLink's 900 GB/s are both directions together. `CALIBRATION` says what the fitted
    fractions were fitted to, and what was measured on an H200. The others are our assumptions.

    name:                   name of the GPU
    measured_on:            name of the machine where `rekatrain plan --calibrate` measured the rates; else empty
    flops:                  dense bfloat16 FLOP/s
    memory:                 bytes per second that the GPU reads from its memory
    nvlink:                 bytes per second and direction between GPUs of a node
    network:                bytes per second and direction between nodes, per GPU
    disk:                   bytes per second that a node writes to the disk of checkpoints; an assumption
    training_fraction:      of `flops`, in training; fitted
    sampling_fraction:      of `flops`, in the matrix products of many completions that are decoded; an assumption
    memory_fraction:        of `memory`, in decoding; fitted
    adapter_fraction:       of the speed of vLLM without an adapter, with one; fitted
    link_fraction:          of `nvlink` and `network`; an assumption
    layer_launch_seconds:   seconds that the kernels of one layer take at least in a CUDA graph: 61 (counted by
                            tests/benchmarks/launches.py) of 5 us, as those of a model of 16 layers on an H200
    adapter_launch_seconds: likewise with an adapter: 75 kernels, as --calibrate measured on an H200
    """

    name: str = "H100 SXM5"
    flops: float = 989e12
    memory: float = 3.35e12
    nvlink: float = 450e9
    network: float = 50e9
    disk: float = 2e9
    training_fraction: float = 0.26
    sampling_fraction: float = 0.4
    memory_fraction: float = 0.44
    adapter_fraction: float = 1788 / 2694
    link_fraction: float = 0.7
    layer_launch_seconds: float = 3.0e-4
    adapter_launch_seconds: float = 4.6e-4
    measured_on: str = ""

    def describe(self) -> str:
        """Describe the rates and the fractions in one line."""
        if self.measured_on:
            return (
                f"measured: {self.flops / 1e12:.3g} TFLOP/s in a product, {self.training_fraction:.0%} of it in "
                f"training; {self.memory / 1e9:.0f} GB/s of memory, {self.memory_fraction:.0%} of it in decoding"
            )
        return (
            f"{self.name}: {self.training_fraction:.0%} of {self.flops / 1e12:.0f} TFLOP/s, "
            f"{self.memory_fraction:.0%} of {self.memory / 1e12:.2f} TB/s memory, {self.link_fraction:.0%} of NVLink's "
            f"{self.nvlink / 1e9:.0f} GB/s and of the network's {self.network / 1e9:.0f} GB/s per GPU"
        )

    def token_seconds(self, weights: float, cached: float, products: float) -> float:
        """Return the seconds to decode one token of each completion of a batch: to read memory, or to multiply.

        weights:  bytes of the weights
        cached:   bytes of the KV cache of the batch
        products: FLOPs of the batch
        """
        read = (weights + cached) / (self.memory * self.memory_fraction)
        return max(read, products / (self.flops * self.sampling_fraction))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one step on one GPU.

    train_tokens:   tokens that the model is trained on, over all micro-batches
    sampled_tokens: completion tokens that are sampled
    flops:          FLOPs by phase
    traffic:        bytes through the GPU's links, by purpose
    seconds:        seconds by phase, and for the traffic
    """

    train_tokens: int
    sampled_tokens: int
    flops: dict[str, float]
    traffic: dict[str, float]
    seconds: dict[str, float]


def estimate(plan: Plan, rates: Rates) -> Cost:
    """Estimate the cost of one step of the plan's recipe on one GPU."""
    train_tokens, pairs = _count_trained(plan)
    forward = _forward_flops(plan, train_tokens, pairs)
    is_adapter = plan.recipe.lora is not None
    passes = 1 + (1 if is_adapter else 2) + plan.checkpoints_activations
    flops = {"train": passes * forward}
    if optim_of(plan.recipe) == MUON:
        flops["update"] = float(plan.shape.newton_schulz)  # each process updates all matrices
    seconds: dict[str, float] = {}
    sampled = 0
    if plan.recipe.stage == "rloo":
        config = plan.rloo
        sampled = plan.num_prompts * config.num_generations * config.max_completion_length
        flops["sample"] = _forward_flops(plan, sampled + plan.num_prompts * plan.prompt_tokens, pairs)
        if config.beta:
            flops["score"] = forward
        if not plan.samples_elsewhere:
            seconds["sample"] = _decoding_seconds(plan, rates)
    traffic = _traffic(plan)
    link = (rates.network if plan.launch.num_nodes > 1 else rates.nvlink) * rates.link_fraction
    seconds |= {
        phase: count / (rates.flops * rates.training_fraction) for phase, count in flops.items() if phase != "sample"
    }
    seconds["traffic"] = sum(traffic.values()) / link
    return Cost(train_tokens=train_tokens, sampled_tokens=sampled, flops=flops, traffic=traffic, seconds=seconds)


def _count_trained(plan: Plan) -> tuple[int, float]:
    """Return one process's tokens per step, and its pairs of a query and a visible key."""
    workload = plan.workload
    if plan.recipe.stage != "rloo":
        tokens = workload.micro_batch_tokens * workload.num_micro_batches
        return tokens, tokens * workload.sequence_tokens * plan.launch.sequence_parallel / 2
    config = plan.rloo
    completion, prompt = config.max_completion_length - 1, plan.prompt_tokens  # the model is not run on the last token
    num_completions = plan.num_prompts * config.num_generations
    pairs = plan.num_prompts * prompt**2 / 2 + num_completions * (completion * prompt + completion**2 / 2)
    return plan.num_prompts * prompt + num_completions * completion, pairs


def _forward_flops(plan: Plan, tokens: int, pairs: float) -> float:
    weights = plan.shape.num_linear + plan.shape.num_head + (plan.shape.num_adapter if plan.recipe.lora else 0)
    return 2.0 * weights * tokens + 4.0 * plan.shape.num_layers * plan.shape.attention_dims * pairs


def _decoding_seconds(plan: Plan, rates: Rates) -> float:
    """Return the seconds to sample one step in process.

    Each decoding step takes the longest of three times: to read all weights and the batch's KV cache, to compute the
    matrix products, and to launch the kernels.
    """
    config = plan.rloo
    batch_size = plan.workload.sampler_batch_size
    batches = -(-plan.num_prompts * config.num_generations // batch_size)
    size = 2 if is_bfloat16(plan.recipe) or plan.uses_bf16 or config.rollout_dtype else 4
    weights = base_bytes(plan.recipe, plan.shape, size)
    # On average half of a completion is in the cache. A group's prompt is in it once.
    token_bytes = plan.shape.num_layers * plan.shape.kv_dims * size
    prompts = batch_size / config.num_generations
    cached_tokens = batch_size * config.max_completion_length / 2 + prompts * plan.prompt_tokens
    seconds = rates.token_seconds(weights, token_bytes * cached_tokens, 2.0 * plan.shape.num_base * batch_size)
    launch = rates.adapter_launch_seconds if plan.recipe.lora else rates.layer_launch_seconds
    return batches * config.max_completion_length * max(seconds, plan.shape.num_layers * launch)


def _traffic(plan: Plan) -> dict[str, float]:
    """Return the bytes through one GPU's links per step, by purpose.

    A ring collective of N GPUs moves (N - 1) / N of the tensor that it reduces or gathers.
    """
    launch, shape = plan.launch, plan.shape
    ring = (launch.num_gpus - 1) / launch.num_gpus
    if not ring:
        return {}
    size = 2 if launch.engine == "deepspeed" or is_bfloat16(plan.recipe) else 4
    trained = shape.num_trained * (4 if plan.recipe.lora and launch.engine == "ddp" else size)
    # An all-reduce is a reduce-scatter and an all-gather. ZeRO 1 and 2 all-gather updated weights instead of gradients.
    traffic = {"gradients and updates": 2 * ring * trained}
    if launch.shards(3) > 1:
        whole = base_bytes(plan.recipe, shape, size)
        traffic = {
            "gradients and updates": ring * trained,
            "parameters gathered": 2 * ring * whole * plan.workload.num_micro_batches,
        }
        if plan.recipe.stage == "rloo" and not (plan.samples_elsewhere and plan.recipe.lora):
            traffic["parameters to sample"] = ring * whole
    if launch.sequence_parallel > 1:
        # Ulysses (arXiv 2309.14509): queries, keys, values and outputs are exchanged in each pass, and their gradients.
        # Processes that share a key-value head each get a copy of it.
        copies = max(1.0, launch.sequence_parallel / attention_heads(plan.config)[1])
        width = 2 * shape.attention_dims + shape.kv_dims * copies
        num_passes = 2 + plan.checkpoints_activations + (plan.recipe.stage == "rloo" and plan.rloo.beta > 0)
        sent = 1 - 1 / launch.sequence_parallel
        traffic["sequence parallelism"] = sent * size * num_passes * width * _count_trained(plan)[0] * shape.num_layers
    return traffic
