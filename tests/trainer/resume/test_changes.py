"""The class of each key of a recipe when a run is resumed: free, warned or refused."""

import inspect
import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from rekatrain.data.errors import InputError
from rekatrain.data.sources import load_rows
from rekatrain.rewards.compose import OwnKeys
from rekatrain.rewards.registry import REWARDS, read_signature
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.trainer.held_out_prompts import EvaluateConfig
from rekatrain.trainer.launch.section import LaunchConfig
from rekatrain.trainer.models.load import load_model
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.lora_keys import LORA_ALLOWED
from rekatrain.trainer.recipe.trl_keys import REWARD_ALLOWED, SFT_ALLOWED
from rekatrain.trainer.resume.changes import (
    FREE,
    REFUSED,
    RULES,
    UNKNOWN,
    WARNED,
    Effect,
    check_changes,
    find_changes,
    report_changes,
    rule_of,
)
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.run.guards import StopConfig
from rekatrain.trainer.synthesis.config import FilterConfig, GenerateConfig

README = Path(__file__).parents[3] / "trainer" / "resume" / "README.md"
SECTIONS = {
    "model": inspect.signature(load_model).parameters,
    "lora": LORA_ALLOWED,
    "dataset": {*inspect.signature(load_rows).parameters, "order", "rewards"},
    "eval_dataset": inspect.signature(load_rows).parameters,
    "chat": ["end_of_turn", "turns", "reasoning"],
    "sft": SFT_ALLOWED,
    "reward": REWARD_ALLOWED,
    "rloo": [field.name for field in fields(RLOOConfig)],
    "scoring": [field.name for field in fields(ScoringConfig)],
    "evaluate": [field.name for field in fields(EvaluateConfig)],
    "generate": [field.name for field in fields(GenerateConfig)],
    "filter": [field.name for field in fields(FilterConfig)],
    "launch": [field.name for field in fields(LaunchConfig)],
    "stop_if": [field.name for field in fields(StopConfig)],
    "wandb": ["project", "mode"],
    "tensorboard": ["log_dir"],
    "trackio": ["project"],
    **{
        f"rewards.{name}": [*read_signature(name).options, *(field.name for field in fields(OwnKeys))]
        for name in REWARDS
    },
    "rewards.my_rewards:brevity": ["limit", "weight", "timeout", "requires"],
}
TRL_FREE = """
    max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing
    gradient_checkpointing_kwargs torch_empty_cache_steps logging_strategy logging_steps logging_first_step
    eval_strategy eval_steps eval_on_start eval_accumulation_steps per_device_eval_batch_size save_strategy save_steps
    save_total_limit save_only_model dataloader_num_workers dataloader_pin_memory ddp_timeout metric_for_best_model
    greater_is_better early_stopping_patience
"""
# The free and the warned keys; every other one is refused.
KEYS = {
    FREE: {
        "-": "output_dir on_nonfinite max_nonfinite_skips time_limit",
        "sft": TRL_FREE,
        "reward": TRL_FREE,
        "rloo": """
            max_steps eval_steps eval_on_start log_completions_steps
            metric_for_best_model greater_is_better early_stopping_patience save_steps save_total_limit
            micro_batch_tokens
            per_device_generation_batch_size
            gradient_checkpointing max_unscorable_steps ddp_timeout restart_optimizer vllm_server_base_url
            vllm_server_timeout vllm_request_timeout vllm_weight_transfer vllm_enable_sleep_mode
        """,
        "model": "pretrained_model_name_or_path revision",
        **{
            name: " ".join({*SECTIONS[name]} - ({"order", "rewards"} if name == "dataset" else set()))
            for name in (
                "dataset",
                "eval_dataset",
                "chat",
                "scoring",
                "evaluate",
                "generate",
                "filter",
                "launch",
                "stop_if",
            )
        },
        "stop_if": " ".join(SECTIONS["stop_if"]),
        "wandb": "project mode",
        "tensorboard": "log_dir",
        "trackio": "project",
        **{f"rewards.{name}": "timeout" for name in [*REWARDS, "my_rewards:brevity"]},
        "rewards.code_tests": "timeout time_limit total_time_limit memory_limit_mb max_processes isolation",
        "rewards.reasoning_gym": "timeout time_limit memory_limit_mb isolation",
        "rewards.reward_model": "timeout pretrained_model_name_or_path revision",
        "rewards.json_schema": "timeout schema",
        "rewards.judge": """
            timeout base_url api_key_env concurrency request_timeout max_retries outage_timeout cache prompt_price
            completion_price
        """,
        "rewards.remote_reward_model": """
            timeout url api_key_env concurrency request_timeout max_retries outage_timeout batch_size
        """,
    },
    WARNED: {
        "model": "attn_implementation",
        "sft": "pad_to_multiple_of full_determinism",
        "reward": "pad_to_multiple_of full_determinism",
        "rloo": "full_determinism fused_lm_head",
        "rewards.reward_model": "device micro_batch_tokens",
    },
}
# Sections as a whole, which one of two recipes may lack.
WHOLE = {
    "lora": REFUSED,
    **dict.fromkeys(
        ("dataset", "eval_dataset", "generate", "filter", "launch", "wandb", "tensorboard", "trackio"), FREE
    ),
    "rewards.math_answer": REFUSED,
}

RECIPE = Recipe(
    stage="rloo",
    output_dir="runs/a",
    model={"pretrained_model_name_or_path": "m"},
    dataset={"path": "rows.jsonl"},
    rloo={"max_steps": 4, "learning_rate": 1e-6},
    rewards={"math_answer": None},
)


def all_keys() -> Iterator[str]:
    """Every key of every section of every stage."""
    yield from (field.name for field in fields(Recipe) if field.name not in {*SECTIONS, "rewards"})
    yield from (f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys)


def test_each_key_has_its_class() -> None:
    expected = {
        (key if section == "-" else f"{section}.{key}"): effect
        for effect, sections in KEYS.items()
        for section, keys in sections.items()
        for key in keys.split()
    }
    actual = {key: rule_of(key).effect for key in all_keys()}
    assert {key: effect for key, effect in actual.items() if effect is not REFUSED} == expected
    assert {key: rule_of(key).effect for key in WHOLE} == WHOLE


def test_each_key_has_a_rule_and_each_rule_a_key() -> None:
    keys = [*all_keys(), *WHOLE]
    assert [key for key in keys if rule_of(key) is UNKNOWN] == []
    with_values = {rule_of("rloo.optim", *rule.among) for rule in RULES if rule.among}
    assert {rule_of(key) for key in keys} | with_values == set(RULES)
    assert rule_of("rloo.new_key").effect is REFUSED


def test_defaults_that_are_written_out_are_no_change() -> None:
    written = replace(
        RECIPE,
        model={**RECIPE.model, "dtype": "bfloat16", "revision": None},
        dataset={**RECIPE.dataset, "order": "shuffled", "limit": None},
        rloo={**RECIPE.rloo, "max_staleness": 0, "beta": 0.05},
        rewards={"math_answer": {"weight": 1.0}},
    )
    assert find_changes(RECIPE, written) == find_changes(written, RECIPE) == []
    sft = replace(RECIPE, stage="sft", rloo={}, rewards={}, sft={"learning_rate": 1e-4}, lora={"r": 4})
    same = replace(sft, sft={"learning_rate": 0.0001, "packing": False, "bf16": False}, lora={"r": 4, "bias": "none"})
    assert find_changes(sft, same) == []


def changed(**sections: object) -> list[tuple[str, Effect]]:
    return [(str(change), change.rule.effect) for change in find_changes(RECIPE, replace(RECIPE, **sections))]


def test_find_changes_names_both_values() -> None:
    assert changed(output_dir="./runs/a", rloo={**RECIPE.rloo, "micro_batch_tokens": 4096, "beta": 0.1}) == [
        ("output_dir was 'runs/a' and is './runs/a'", FREE),
        ("rloo.micro_batch_tokens was 8192 and is 4096", FREE),
        ("rloo.beta was 0.05 and is 0.1", REFUSED),
    ]
    assert changed(rewards={"length": {"target": 9}}, lora={"r": 4}) == [
        ("rewards.math_answer was {} and is absent", REFUSED),
        ("lora was absent and is {'r': 4}", REFUSED),
        ("rewards.length was absent and is {'target': 9}", REFUSED),
    ]
    (long,) = changed(dataset={"path": "x" * 1000})
    assert len(long[0]) < 200


@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
@pytest.mark.parametrize(
    ("before", "now", "effect"),
    [
        (None, "adamw_torch", WARNED),  # the default is adamw_torch_fused
        ("adamw_torch", "adamw_torch_fused", WARNED),
        ("adamw_bnb_8bit", "adamw_8bit", FREE),
        ("muon", None, REFUSED),
        ("adamw_torch", "muon", REFUSED),
        ("adamw_8bit", "adamw_torch", REFUSED),
        (None, "adamw_8bit", REFUSED),
    ],
)
def test_another_optimizer_needs_the_same_state(
    stage: str, before: str | None, now: str | None, effect: Effect
) -> None:
    def recipe(optim: str | None) -> Recipe:
        section = {"max_steps": 4} | ({} if optim is None else {"optim": optim})
        return replace(RECIPE, **{"stage": stage, "rloo": {}, stage: section})

    (change,) = find_changes(recipe(before), recipe(now))
    assert (change.key, change.rule.effect) == (f"{stage}.optim", effect)


def test_refused_changes_are_one_line_with_reasons() -> None:
    changes = find_changes(RECIPE, replace(RECIPE, seed=1, rloo={"max_steps": 9, "learning_rate": 1e-5}))
    with pytest.raises(InputError) as error:
        check_changes(changes)
    assert str(error.value) == (
        "--resume: seed was 0 and is 1: every random choice follows from it; rloo.learning_rate was 1e-06 and is "
        "1e-05: it changes the size of the steps. Set it back, or start another run, from the weights of this one: "
        "rekatrain export RUN OUT"
    )


def test_allowed_changes_are_reported_by_class(caplog: pytest.LogCaptureFixture) -> None:
    model = {**RECIPE.model, "attn_implementation": "eager"}
    changes = find_changes(RECIPE, replace(RECIPE, model=model, rloo={**RECIPE.rloo, "max_steps": 9}, output_dir="b"))
    check_changes(changes)
    with caplog.at_level(logging.INFO):
        report_changes(changes)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "changed since the checkpoint: model.attn_implementation was None and is 'eager' (it changes the last bits "
            "of the arithmetic)",
        ),
        ("INFO", "changed since the checkpoint: output_dir was 'runs/a' and is 'b'; rloo.max_steps was 4 and is 9"),
    ]


def test_readme_has_the_table() -> None:
    grouped: dict[tuple[str, str], list[str]] = {}
    for rule in RULES:
        sections = "" if rule.sections == "-" else f"{', '.join(rule.sections.split())}: "
        keys = ", ".join(f"`{key}`" for key in rule.keys.split())
        keys += f" ({', '.join(rule.among)})" if rule.among else ""
        grouped.setdefault((rule.effect.value, rule.reason), []).append(sections + keys)
    table = "".join(f"| {effect} | {'; '.join(keys)} | {reason} |\n" for (effect, reason), keys in grouped.items())
    assert f"|---|---|---|\n{table}\n" in README.read_text()
