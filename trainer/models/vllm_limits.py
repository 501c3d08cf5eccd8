"""The limits of vLLM's LoRA. No imports of torch: a recipe is checked before it is imported."""

from collections.abc import Mapping
from typing import Any

# The LoRA ranks for which vLLM has kernels.
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Keys of a LoRA config whose adapters vLLM 0.30 rejects, or whose tensors it does not apply.
REJECTED = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")


def largest_rank(lora: Mapping[str, Any]) -> int:
    """Return the largest rank of any module of a LoRA config."""
    return max(int(lora.get("r", 8)), *(int(rank) for rank in (lora.get("rank_pattern") or {}).values()), 0)


def find_vllm_limit(lora: Mapping[str, Any]) -> str | None:
    """Return the part of a LoRA config that vLLM does not load, or None."""
    for key in REJECTED:
        if lora.get(key):
            return f"lora.{key}"
    if lora.get("bias", "none") != "none":
        return f"lora.bias {lora['bias']}"
    return f"lora: rank {largest_rank(lora)} above {MAX_RANKS[-1]}" if largest_rank(lora) > MAX_RANKS[-1] else None
