"""Keys of TRL, PEFT and bitsandbytes: each is allowed with a check of its values, or refused with a reason."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import pytest
from peft import LoraConfig
from transformers import BitsAndBytesConfig, EarlyStoppingCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_type
from rekatrain.trainer.recipe import lora_keys, trl_keys
from rekatrain.trainer.recipe.upstream import check_lora, check_quantization_section, check_reward, check_sft
from rekatrain.trainer.recipe.values import HUB_KEY

TABLES: dict[str, tuple[type, Mapping[str, Any], Mapping[str, str], tuple[str, ...]]] = {
    "sft": (SFTConfig, trl_keys.SFT_ALLOWED, trl_keys.SFT_REFUSED, trl_keys.TRL_RESERVED),
    "reward": (
        RewardConfig,
        trl_keys.REWARD_ALLOWED,
        trl_keys.REWARD_REFUSED,
        (*trl_keys.TRL_RESERVED, *trl_keys.REWARD_RESERVED),
    ),
    "lora": (LoraConfig, lora_keys.LORA_ALLOWED, lora_keys.LORA_REFUSED, lora_keys.LORA_RESERVED),
}
CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "sft": check_sft,
    "reward": check_reward,
    "lora": check_lora,
    "model.quantization_config": check_quantization_section,
}
NUMBERS = [float("nan"), float("inf"), -float("inf"), -1e30, 1e30, 10**40, -7]


@pytest.mark.parametrize("name", TABLES)
def test_every_upstream_key_is_allowed_or_refused(name: str) -> None:
    config, allowed, refused, reserved = TABLES[name]
    names = {field.name for field in fields(config)}
    if name != "lora":
        names = {key for key in names if not HUB_KEY.fullmatch(key)}  # recipe/values.py refuses them
    ours = set(allowed) | set(refused) | set(reserved)
    assert names - ours == set()
    # SFTConfig alone has the first; the second is of transformers' EarlyStoppingCallback.
    assert ours - names <= {"dataset_kwargs", "early_stopping_patience"}
    assert "early_stopping_patience" in inspect.signature(EarlyStoppingCallback).parameters
    assert not set(allowed) & set(refused) and not set(allowed) & set(reserved)


@pytest.mark.parametrize("name", TABLES)
def test_refused_key_is_rejected_with_its_reason(name: str) -> None:
    _, _, refused, reserved = TABLES[name]
    for key in refused:
        with pytest.raises(InputError) as caught:
            CHECKS[name]({key: None})
        expected = "is set by the program" if key in reserved else f"is not supported: {refused[key]}"
        assert str(caught.value).startswith(f"{name}.{key} {expected}")
    for key in reserved:
        with pytest.raises(InputError, match=f"^{name}.{key} is set by the program"):
            CHECKS[name]({key: None})


@pytest.mark.parametrize("name", TABLES)
def test_upstream_default_of_an_allowed_key_is_allowed(name: str) -> None:
    config, allowed, _, _ = TABLES[name]
    for field in fields(config):
        if field.name in allowed:
            default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
            # TRL's "auto" is its own default; None stands for "not set" in the others.
            if default is not None and default != "auto":
                value = default if isinstance(default, bool | int | float | dict | list) else str(default)
                check_type(f"{name}.{field.name}", value, allowed[field.name])


@pytest.mark.parametrize("name", [*TABLES, "model.quantization_config"])
def test_allowed_key_rejects_every_number_without_sense(name: str) -> None:
    allowed = TABLES[name][1] if name in TABLES else lora_keys.QUANTIZATION_ALLOWED
    for key in allowed:
        for value in NUMBERS:
            if key == "lr_scheduler_kwargs":
                continue
            with pytest.raises(InputError) as caught:
                CHECKS[name]({key: value})
            message = str(caught.value)
            assert message.startswith(f"{name}.{key} is ") and "\n" not in message and len(message) < 500


def test_every_quantization_key_is_allowed_or_refused() -> None:
    names = {key for key in BitsAndBytesConfig().to_dict() if not key.startswith("_") and key != "quant_method"}
    assert names == set(lora_keys.QUANTIZATION_ALLOWED) | set(lora_keys.QUANTIZATION_REFUSED)


GOOD: list[tuple[str, dict[str, Any]]] = [
    ("sft", {"max_steps": -1, "num_train_epochs": 0.5, "warmup_steps": 0.1, "save_steps": 0.2, "max_grad_norm": 0}),
    ("sft", {"packing": True, "packing_strategy": "bfd", "neftune_noise_alpha": 5, "max_length": None}),
    ("sft", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
    ("sft", {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}}),
    ("sft", {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}}),
    ("sft", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ("reward", {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 2}),
    ("lora", {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "rank_pattern": {"q_proj": 4}}),
    ("lora", {"target_modules": ".*q_proj", "init_lora_weights": "gaussian", "use_dora": True, "lora_dropout": 0.1}),
    ("model.quantization_config", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
]
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"max_steps": 0}, "sft.max_steps is 0; it should be -1 or be greater than or equal to 1"),
    ("sft", {"num_train_epochs": 0}, "sft.num_train_epochs is 0; it should be greater than 0"),
    ("sft", {"learning_rate": 1e9}, "sft.learning_rate is 1000000000.0; it should be less than or equal to 1"),
    ("sft", {"learning_rate": True}, "sft.learning_rate is True; it should be a valid number"),
    ("sft", {"learning_rate": "1e-4"}, "sft.learning_rate is '1e-4'; it should be a valid number"),
    ("sft", {"per_device_train_batch_size": True}, "sft.per_device_train_batch_size is True"),
    ("sft", {"per_device_train_batch_size": 2.0}, "sft.per_device_train_batch_size is 2.0"),
    ("sft", {"packing": True, "packing_strategy": "wrapped"}, "sft.packing_strategy is wrapped: it lays rows end to"),
    ("sft", {"packing_strategy": "bfd"}, "sft.packing_strategy without sft.packing does nothing"),
    ("sft", {"save_strategy": "best"}, "sft.save_strategy is best: a run resumes from checkpoints at known steps"),
    ("sft", {"save_strategy": "no"}, "sft.save_strategy is no: the run would leave nothing behind"),
    ("sft", {"eval_steps": 5}, "sft.eval_steps without sft.eval_strategy does nothing"),
    ("sft", {"lr_scheduler_kwargs": {"no_such": 1}}, "sft.lr_scheduler_kwargs: "),
    ("sft", {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "sft.lr_scheduler_kwargs: "),
    ("sft", {"lr_scheduler_type": "cosine_with_min_lr"}, "sft.lr_scheduler_type cosine_with_min_lr needs"),
    ("sft", {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "sft.grad"),
    ("sft", {"optim": "sgd"}, "sft.optim is 'sgd'; it should be 'adamw_torch'"),
    ("sft", {"learning_rat": 1}, "unknown key sft.learning_rat: did you mean sft.learning_rate?"),
    ("lora", {"r": 0}, "lora.r is 0; it should be greater than or equal to 1"),
    ("lora", {"lora_dropout": 1.0}, "lora.lora_dropout is 1.0; it should be less than 1"),
    ("lora", {"init_lora_weights": "pissa"}, "lora.init_lora_weights is pissa: the adapter must start as zero"),
    ("lora", {"init_lora_weights": "pissa_niter_4"}, "lora.init_lora_weights is 'pissa_niter_4'; it should be 'gaus"),
    ("lora", {"init_lora_weights": False}, "lora.init_lora_weights is False: the adapter must start as zero"),
    ("lora", {"target_modules": []}, "lora.target_modules is []"),
    ("lora", {"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern.q_proj is 0"),
    ("lora", {"layers_pattern": "layers"}, "lora.layers_pattern without lora.layers_to_transform does nothing"),
    ("model.quantization_config", {"load_in_4bit": True, "load_in_8bit": True}, "model.quantization_config sets load"),
]


@pytest.mark.parametrize(("name", "section"), GOOD)
def test_check_accepts_a_good_section(name: str, section: dict[str, Any]) -> None:
    CHECKS[name](section)


@pytest.mark.parametrize(("name", "section", "message"), BAD)
def test_check_rejects_a_bad_section_with_this_message(name: str, section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        CHECKS[name](section)
    assert str(caught.value).startswith(message)
