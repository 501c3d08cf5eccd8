"""Check the sections that go to TRL, PEFT and bitsandbytes against the tables of allowed keys.

A library's own checks come late, after the weights, or not at all: a NaN rate, an epoch of no step, an option that lets
rows see each other. So the tables say what may be set (trl_keys.py, lora_keys.py), and this file what fits together.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keys, check_type
from rekatrain.trainer.models.vllm_limits import find_vllm_limit
from rekatrain.trainer.recipe import lora_keys, trl_keys
from rekatrain.trainer.run.best import check_best


def check_section(
    name: str,
    section: Mapping[str, Any],
    allowed: Mapping[str, Any],
    refused: Mapping[str, str],
    *,
    reserved: Collection[str] = (),
    reasons: Mapping[str, Mapping[Any, str]] | None = None,
) -> None:
    """Raise InputError for a key that is reserved, refused or unknown, and for a value that makes no sense.

    allowed: key -> type form of its values
    refused: key -> the reason
    reasons: key -> value -> the reason why it is not among the values
    """
    for key in section:
        if key in reserved:
            raise InputError(f"{name}.{key} is set by the program: remove it from the recipe")
        if key in refused:
            raise InputError(f"{name}.{key} is not supported: {refused[key]}")
    check_keys(f"{name}.", section, list(allowed), required=())
    for key, value in section.items():
        known = (reasons or {}).get(key, {})
        reason = next((why for bad, why in known.items() if type(bad) is type(value) and bad == value), None)
        if reason is not None:
            raise InputError(f"{name}.{key} is {value}: {reason}")
        check_type(f"{name}.{key}", value, allowed[key])


def check_sft(section: Mapping[str, Any]) -> None:
    """Raise InputError for a key or a value of `sft:` that a run cannot have."""
    check_section(
        "sft",
        section,
        trl_keys.SFT_ALLOWED,
        trl_keys.SFT_REFUSED,
        reserved=trl_keys.TRL_RESERVED,
        reasons=trl_keys.VALUE_REASONS,
    )
    _check_trl_values("sft", section)
    if "packing_strategy" in section and not section.get("packing"):
        raise InputError("sft.packing_strategy without sft.packing does nothing: set packing: true, or remove it")


def check_reward(section: Mapping[str, Any]) -> None:
    """Raise InputError for a key or a value of `reward:` that a run cannot have."""
    check_section(
        "reward",
        section,
        trl_keys.REWARD_ALLOWED,
        trl_keys.REWARD_REFUSED,
        reserved=(*trl_keys.TRL_RESERVED, *trl_keys.REWARD_RESERVED),
        reasons=trl_keys.VALUE_REASONS,
    )
    _check_trl_values("reward", section)


def check_lora(section: Mapping[str, Any]) -> None:
    """Raise InputError for a key or a value of `lora:` that an adapter cannot have."""
    check_section(
        "lora",
        section,
        lora_keys.LORA_ALLOWED | lora_keys.LORA_OWN,
        lora_keys.LORA_REFUSED,
        reserved=lora_keys.LORA_RESERVED,
        reasons=lora_keys.VALUE_REASONS,
    )
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = section.get(key)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"lora.{key} has {pattern!r}, which is no regular expression: {error}") from error
    if "layers_pattern" in section and section.get("layers_to_transform") is None:
        raise InputError("lora.layers_pattern without lora.layers_to_transform does nothing: set both, or neither")
    if section.get("layers_to_transform") is not None and isinstance(section.get("target_modules"), str):
        raise InputError(
            "lora.layers_to_transform needs a list in lora.target_modules, such as [q_proj, v_proj]: a text selects "
            "the layers on its own"
        )


def check_rollout_adapter(section: Mapping[str, Any]) -> None:
    """Raise InputError for an adapter that vLLM servers of rollouts do not load."""
    rejected = find_vllm_limit(section)
    if rejected is not None:
        raise InputError(f"{rejected} is not supported for rollouts by vLLM, which loads plain LoRA: remove it")


def check_quantization_section(section: Mapping[str, Any]) -> None:
    """Raise InputError for a key or a value of `model.quantization_config:` that cannot be loaded."""
    name = "model.quantization_config"
    check_section(name, section, lora_keys.QUANTIZATION_ALLOWED, lora_keys.QUANTIZATION_REFUSED)
    if section.get("load_in_4bit") and section.get("load_in_8bit"):
        raise InputError(f"{name} sets load_in_4bit and load_in_8bit: a weight has one of them; remove the other")


def _check_trl_values(name: str, section: Mapping[str, Any]) -> None:
    """Raise InputError for settings that contradict each other, or that nobody would read."""
    if section.get("eval_strategy", "no") == "no":
        for key in ("eval_steps", "eval_on_start", "eval_accumulation_steps", "per_device_eval_batch_size"):
            if section.get(key):
                raise InputError(f"{name}.{key} without {name}.eval_strategy does nothing: set it, or remove {key}")
    check_best(name, section, evaluates=section.get("eval_strategy", "no") != "no", key=f"{name}.eval_strategy")
    if section.get("gradient_checkpointing_kwargs") and section.get("gradient_checkpointing") is False:
        raise InputError(
            f"{name}.gradient_checkpointing_kwargs with gradient_checkpointing: false does nothing: remove it"
        )
    _check_schedule(name, section)


def _check_schedule(name: str, section: Mapping[str, Any]) -> None:
    """Raise InputError unless transformers makes a schedule of these options; only with options torch is imported."""
    kind, options = section.get("lr_scheduler_type", "linear"), section.get("lr_scheduler_kwargs") or {}
    needed = {
        "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
        "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
        "warmup_stable_decay": ("num_decay_steps",),
    }.get(kind, ())
    if needed and not any(option in options for option in needed):
        raise InputError(f"{name}.lr_scheduler_type {kind} needs {name}.lr_scheduler_kwargs with {' or '.join(needed)}")
    if not options:
        return
    import torch
    from transformers import get_scheduler

    num_steps = 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.get("learning_rate", 1e-4))
    try:
        schedule = get_scheduler(kind, optimizer, 2, num_steps, scheduler_specific_kwargs=dict(options))
        rates = []
        for _ in range(num_steps):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        is_sensible = all(isinstance(rate, float) and 0 <= rate <= 1 for rate in rates)
    # Each schedule has its own arithmetic of its options, and none checks them.
    except (ArithmeticError, ValueError, TypeError) as error:
        raise InputError(f"{name}.lr_scheduler_kwargs: {str(error).splitlines()[0]}") from error
    if not is_sensible:
        raise InputError(f"{name}.lr_scheduler_kwargs is {dict(options)}: the learning rate would leave [0, 1]")
