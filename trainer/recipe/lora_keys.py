"""The keys of `peft.LoraConfig` and of bitsandbytes' config that a recipe may set, and why it may not set others.

Every field of `peft.LoraConfig` is in exactly one table; a test walks them. What is allowed has been trained, exported
and compared with training.
"""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import FiniteFloat

from rekatrain.data.ranges import CountOrZero, FractionBelowOne, PositiveWeight, Weight

Rank = Annotated[int, Ge(1), Le(4096)]
Alpha = Annotated[int, Ge(1), Le(10**6)]
Name = Annotated[str, MinLen(1)]
Names = Annotated[list[Name], MinLen(1)]

LORA_RESERVED = ("task_type", "peft_type", "inference_mode")
# Any: type forms, which typing has no class for.
LORA_ALLOWED: dict[str, Any] = {
    "r": Rank,
    "lora_alpha": Alpha,
    "lora_dropout": FractionBelowOne,
    "target_modules": Names | Name,
    "exclude_modules": Names | Name | None,
    "target_parameters": Names | None,
    "modules_to_save": Names | None,
    "layers_to_transform": Annotated[list[CountOrZero], MinLen(1)] | CountOrZero | None,
    "layers_pattern": Names | Name | None,
    "rank_pattern": dict[Name, Rank],
    "alpha_pattern": dict[Name, PositiveWeight],
    "bias": Literal["none", "all", "lora_only"],
    "use_rslora": bool,
    "use_dora": bool,
    "init_lora_weights": Literal["gaussian", "orthogonal"] | bool,
}

# Keys of the section that are no fields of PEFT's config: PEFT has them as arguments of its optimizers.
LORA_OWN: dict[str, Any] = {"loraplus_lr_ratio": Annotated[FiniteFloat, Ge(1), Le(10**4)]}

_START = "the adapter must start as zero: the reference of a run is the model without it"
_UNTESTED = "nobody has tried it with this program"
VALUE_REASONS: dict[str, dict[Any, str]] = {
    "init_lora_weights": {
        False: _START,
        **dict.fromkeys(("pissa", "olora", "eva", "corda", "loftq", "mica", "lora_ga"), _START),
    },
}
LORA_REFUSED: dict[str, str] = {
    **dict.fromkeys(("base_model_name_or_path", "revision"), "the section model names the base"),
    **dict.fromkeys(("auto_mapping", "peft_version", "runtime_config"), "PEFT sets it"),
    "fan_in_fan_out": "PEFT reads it from the layers",
    **dict.fromkeys(("megatron_config", "megatron_core"), "the models are transformers', not Megatron's"),
    "trainable_token_indices": "the chat format adds no ids; modules_to_save: [embed_tokens] trains all embeddings",
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _START),
    **dict.fromkeys(("velora_config", "monteclora_config", "arrow_config", "kasa_config"), _UNTESTED),
    **dict.fromkeys(("use_bdlora", "use_qalora", "qalora_group_size", "lora_bias"), _UNTESTED),
    "alora_invocation_tokens": "an adapter that is off in the prompt would not be the policy that is sampled",
    "layer_replication": "the exported model would have other layers than the base",
    "ensure_weight_tying": "the checks reject what would untie weights",
}

QUANTIZATION_ALLOWED: dict[str, Any] = {
    "load_in_4bit": bool,
    "load_in_8bit": bool,
    "bnb_4bit_quant_type": Literal["nf4", "fp4"],
    "bnb_4bit_use_double_quant": bool,
    "bnb_4bit_compute_dtype": Literal["float32", "bfloat16"],
    "bnb_4bit_quant_storage": Literal["uint8", "bfloat16", "float32"],
    "llm_int8_threshold": Weight,
    "llm_int8_skip_modules": Names | None,
}
QUANTIZATION_REFUSED: dict[str, str] = {
    "llm_int8_enable_fp32_cpu_offload": "weights stay on the GPU that trains",
    "llm_int8_has_fp16_weight": "float16 is not trained; set load_in_4bit",
}
