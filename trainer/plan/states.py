"""Static memory of one process and its host: parameters, gradients, optimizer states, and copies of parameters.

Bytes per parameter, counted as DeepSpeed's estimators count them (test_plan.py compares the two): 16-bit parameters 2,
float32 gradients 4, float32 weights 4, AdamW's moments 8. The estimators assume gradients of 16 bits, we accumulate 32.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.continued import is_adapter
from rekatrain.trainer.models.weights import readable
from rekatrain.trainer.plan.live_memory import Parts
from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.model_size import ModelShape
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.optimizers import ADAMW_8BIT, MUON, TORCH_ADAMW, optim_of

# DeepSpeed's defaults, as numbers of parameters: the most that ZeRO-3 keeps gathered, the bucket that it fetches in
# advance, and the bucket of gradients that it reduces at once.
MAX_LIVE_PARAMETERS = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
REDUCE_BUCKET = 500_000_000
# Parameters that ZeRO-3 updates at once.
SUB_GROUP = 1_000_000_000
# Bytes per weight in NF4 (QLoRA, arXiv 2305.14314): half a byte, and one scale per 64 weights. The scale is a float32,
# or with double quantization 8 bits and one float32 per 256 scales.
NF4_BYTES = 0.5 + 4 / 64
DOUBLE_QUANTIZED_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes per moment of 8-bit AdamW (arXiv 2110.02861): one, and a float32 scale per block of 256.
MOMENT_8BIT_BYTES = 1 + 4 / 256


@dataclass(frozen=True, kw_only=True)
class States:
    """Static memory, in bytes: `host` per host, everything else per process.

    weights:   parameters and adapters, present all the time
    gradients: present from the first backward pass of an update to its end
    optimizer: the optimizer's state, with DeepSpeed also float32 weights and gradients
    temporary: tensors that an update makes and frees
    buffers:   gathered parameters and buckets of gradients, during training
    reference: copy of the model, or of what an adapter trains, that the KL penalty needs
    gathered:  unsharded parameters for in-process sampling under ZeRO-3
    host:      offloaded states of all processes of one host, by part
    """

    weights: Parts
    gradients: float
    optimizer: float
    temporary: float
    buffers: float
    reference: float
    gathered: float
    host: Parts = field(default_factory=Counter)


def count_states(recipe: Recipe, shape: ModelShape, launch: PlannedLaunch, *, uses_bf16: bool) -> States:
    """Count the static memory of a recipe under a launch.

    uses_bf16: True if the stage computes in bfloat16, whatever the dtype of the weights is
    """
    is_16_bit = is_bfloat16(recipe) or (launch.engine == "deepspeed" and uses_bf16)
    size = 2 if is_16_bit else 4
    has_adapter = recipe.lora is not None
    base = int(base_bytes(recipe, shape, size) / launch.shards(3))
    if launch.engine == "deepspeed":
        return _sharded(recipe, shape, launch, base, is_16_bit)
    # PEFT keeps an adapter in float32, even on a bfloat16 model. Without one, the weights are trained in their dtype.
    trained_size = 4 if has_adapter else size
    weights: Parts = Counter({"parameters": base})
    if has_adapter:
        weights["adapters"] = shape.num_adapter * trained_size
    gradients = shape.num_trained * trained_size
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=moment_bytes(recipe, shape, trained_size),
        temporary=_update_bytes(recipe, shape, trained_size, is_cpu=launch.is_cpu),
        buffers=gradients if launch.engine == "ddp" else 0,  # DDP's buckets are a copy of all gradients
        reference=_reference_bytes(recipe, base, gradients),
        gathered=0,
    )


def _sharded(recipe: Recipe, shape: ModelShape, launch: PlannedLaunch, base: int, is_16_bit: bool) -> States:
    size = 2 if is_16_bit else 4
    has_adapter = recipe.lora is not None
    weights: Parts = Counter({"parameters": base})
    host: Parts = Counter()
    if has_adapter:
        weights["adapters"] = shape.num_adapter * size // launch.shards(3)
    trained = shape.num_trained
    # Micro-batches are added up in float32, whatever the dtype of the weights is. Stage 1 has float32 gradients of the
    # whole model on each process, beside those of a backward pass.
    gradients = trained * (4 + (size if is_16_bit and launch.zero_stage < 2 else 0)) / launch.shards(2)
    # Per trained parameter: 4 bytes of float32 weight, 8 of moments, and, if the model has 16 bits, 4 of float32
    # gradient. Stage 3 has float32 gradients for one sub-group at a time: DeepSpeed's estimator counts 2 bytes.
    is_by_sub_group = launch.zero_stage == 3 and not launch.offload_optimizer
    float32_gradients = 2 if is_by_sub_group else 4
    optimizer = trained * (4 + 8 + (float32_gradients if is_16_bit else 0)) / launch.shards(1)
    if launch.offload_optimizer:
        host["optimizer"] = int(optimizer * launch.gpus_per_node)
        optimizer, gradients = 0.0, gradients if launch.zero_stage < 2 else 0.0
    if launch.offload_parameters and launch.zero_stage == 3:
        host["parameters"] = weights.total() * launch.gpus_per_node
        weights = Counter()
    # torch's AdamW without the fused kernel makes a square root of each second moment, at stage 3 by sub-groups.
    in_update = trained if launch.zero_stage < 3 else min(trained, SUB_GROUP)
    temporary = 4 * in_update / launch.shards(1) if optim_of(recipe) == "adamw_torch" and not launch.is_cpu else 0.0
    # A bucket of 16-bit gradients is reduced as a float32 copy.
    buffers = float((size + (4 if is_16_bit else 0)) * min(trained, REDUCE_BUCKET))
    if launch.zero_stage == 3:
        buffers += size * min(shape.num_all, max(MAX_LIVE_PARAMETERS + PREFETCH_BUCKET, shape.largest_module))
    needs_whole = recipe.stage == "rloo" and launch.zero_stage == 3 and launch.num_gpus > 1
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        temporary=0.0 if launch.offload_optimizer else temporary,
        buffers=buffers if launch.num_gpus > 1 else 0,
        reference=_reference_bytes(recipe, base, trained * size),
        gathered=base_bytes(recipe, shape, size) + size * shape.num_adapter if needs_whole else 0,
        host=host,
    )


def _reference_bytes(recipe: Recipe, base: int, trained: int) -> int:
    """Return the bytes that the reference of the KL penalty takes beside the policy.

    base:    bytes of the model on this process, without its adapter
    trained: bytes of all that is trained
    """
    if recipe.stage != "rloo" or not recipe.rloo.get("beta", 0.05):
        return 0
    if recipe.lora is None:
        return base
    # The reference is the model without a new adapter. Else it has copies of the values that the run begins with.
    keeps_start = recipe.lora.get("bias", "none") != "none" or is_adapter(recipe)
    return trained if keeps_start else 0


def moment_bytes(recipe: Recipe, shape: ModelShape, size: int) -> float:
    """Return the bytes of an unsharded optimizer's state: AdamW has two moments per weight, Muon one per matrix.

    size: bytes of one trained weight, in whose dtype torch's optimizers keep their state
    """
    optim = optim_of(recipe)
    if optim == MUON:
        return float(size * (2 * shape.num_trained - shape.num_matrices))
    if optim in ADAMW_8BIT:
        return 2 * (MOMENT_8BIT_BYTES * shape.num_8bit + 4 * (shape.num_trained - shape.num_8bit))
    assert optim in TORCH_ADAMW
    return 2.0 * shape.num_trained * size


def _update_bytes(recipe: Recipe, shape: ModelShape, size: int, *, is_cpu: bool) -> float:
    """Return the bytes of the tensors that an update of an unsharded model makes and frees."""
    optim = optim_of(recipe)
    if optim == MUON:
        # The momentum with Nesterov's step, twice a bfloat16 matrix, and two products of it with itself.
        rows, columns = shape.largest_matrix
        return (size + 2 + 2) * rows * columns + 2 * 2 * min(rows, columns) ** 2
    if optim == "adamw_torch":
        # The square root of the second moments: on a GPU of all weights at once, on a CPU of one after the other.
        return float(size * (shape.largest_trained if is_cpu else shape.num_trained))
    return 0.0


def base_bytes(recipe: Recipe, shape: ModelShape, size: int) -> float:
    """Return the bytes of the unsharded model without its adapter.

    size: bytes of one parameter that is not quantized
    """
    quantization = quantization_of(recipe)
    if quantization is None:
        return float(shape.num_base * size)
    is_double = quantization.get("bnb_4bit_use_double_quant", False)
    nf4_bytes = DOUBLE_QUANTIZED_NF4_BYTES if is_double else NF4_BYTES
    return shape.num_linear * nf4_bytes + (shape.num_base - shape.num_linear) * size


def quantization_of(recipe: Recipe) -> dict[str, object] | None:
    """Return the recipe's 4-bit quantization settings; None without quantization."""
    quantization: dict[str, object] | None = recipe.model.get("quantization_config")
    return quantization if quantization and quantization.get("load_in_4bit") else None


def is_bfloat16(recipe: Recipe) -> bool:
    """Return True if the weights are loaded in bfloat16."""
    return bool(recipe.model.get("dtype", "bfloat16") == "bfloat16")


def reward_models(recipe: Recipe) -> tuple[float, float]:
    """Return the bytes of the recipe's local reward models for one process: on its GPU, and on its host.

    Raise InputError if a config cannot be loaded, or is not a classifier's.
    """
    options = recipe.rewards.get("reward_model")
    if recipe.stage != "rloo" or not options:
        return 0.0, 0.0
    names = options["pretrained_model_name_or_path"]
    num_parameters = sum(
        _num_parameters_of_classifier(name, options.get("revision"))
        for name in (names if isinstance(names, list) else [names])  # of an ensemble, a list
    )
    size = num_parameters * (2 if options.get("dtype", "float32") == "bfloat16" else 4)
    return (0.0, size) if options.get("device", "cpu") == "cpu" else (size, 0.0)


def _num_parameters_of_classifier(name: str, revision: str | None) -> int:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"no reward model could be loaded from {name!r}: {str(error).splitlines()[0]}") from error
    architectures = config.architectures or []
    if architectures and not any(each.endswith("ForSequenceClassification") for each in architectures):
        raise InputError(
            f"rewards.reward_model names {name!r}, which is a {', '.join(architectures)} and no sequence classifier: "
            "its head would be random; name the export of a reward run"
        )
    with readable(name), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    return int(model.num_parameters())
