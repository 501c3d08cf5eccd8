"""The kinds of adapters in the table of trainer/export/README.md, and vLLM's arithmetic of one scale."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import LlamaForCausalLM

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# Method in the table -> True for a model whose head is tied to its embeddings, and the section `lora:`.
METHODS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain LoRA": (False, PLAIN),
    "rsLoRA": (False, {**PLAIN, "use_rslora": True}),
    "DoRA": (False, {**PLAIN, "use_dora": True}),
    "rank_pattern, alpha_pattern": (
        False,
        {**PLAIN, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32, "layers.1.mlp.down_proj": 3}},
    ),
    "modules_to_save": (False, {**PLAIN, "modules_to_save": ["lm_head", "norm"]}),
    "modules_to_save: a head that is tied": (True, {**PLAIN, "modules_to_save": ["lm_head"]}),
    "modules_to_save: embeddings that are tied": (True, {**PLAIN, "modules_to_save": ["embed_tokens"]}),
    "LoRA on embed_tokens": (False, {**PLAIN, "target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on lm_head": (False, {**PLAIN, "target_modules": ["q_proj", "lm_head"]}),
    "LoRA on embed_tokens that are tied": (True, {**PLAIN, "target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on lm_head that is tied": (True, {**PLAIN, "target_modules": ["q_proj", "lm_head"]}),
    "target_parameters": (
        False,
        {**PLAIN, "target_modules": ["q_proj"], "target_parameters": ["gate_proj.weight", "up_proj.weight"]},
    ),
    "target_parameters: lm_head": (False, {**PLAIN, "target_parameters": ["lm_head.weight"]}),
    "target_parameters: embed_tokens that are tied": (True, {**PLAIN, "target_parameters": ["embed_tokens.weight"]}),
    "target_modules: a pattern": (
        False,
        {**PLAIN, "target_modules": r".*layers\.[01]\.(self_attn\.(q|k)_proj|mlp\.up_proj)"},
    ),
    "layers_to_transform, exclude_modules": (
        False,
        PLAIN
        | {"layers_to_transform": [0, 1], "layers_pattern": "layers", "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "rsLoRA on embed_tokens, rank_pattern": (
        False,
        {
            **PLAIN,
            "target_modules": ["o_proj", "embed_tokens"],
            "use_rslora": True,
            "rank_pattern": {"embed_tokens": 2},
        },
    ),
    "DoRA, rsLoRA, patterns": (
        False,
        {
            **PLAIN,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {r".*\.1\..*": 2.5},
        },
    ),
    "modules_to_save: norms": (False, {**PLAIN, "modules_to_save": ["input_layernorm", "norm"]}),
    **{
        f"init_lora_weights: {kind}": (False, {**PLAIN, "init_lora_weights": kind})
        for kind in ("pissa", "pissa_niter_4", "olora", "eva", "loftq", "corda", "orthogonal", "lora_ga")
    },
}


def load_with_one_scale(folder: Path, base: LlamaForCausalLM) -> LlamaForCausalLM:
    """Add scale * B A to the weights with vLLM's scale: the config's alpha over its r, or over sqrt(r) with rsLoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors, modules = load_file(folder / "adapter_model.safetensors"), dict(base.named_modules())
    for name in tensors:
        module = modules.get(name.removeprefix("base_model.model.").partition(".lora_")[0])
        if ".lora_A." in name:
            module.weight.data += scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        elif name.endswith(".lora_embedding_A"):
            module.weight.data += (scale * tensors[name.replace("embedding_A", "embedding_B")] @ tensors[name]).T
    return base
