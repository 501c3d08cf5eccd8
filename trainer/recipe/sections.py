"""The callable of each section of a recipe. All sections are checked, whichever of them the command reads.

Sections whose callable needs no torch are checked first, so that their errors come at once. A callable of a library is
imported only if the recipe has its section.
"""

import importlib
from dataclasses import asdict
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.mixture import check_dataset
from rekatrain.data.options import check_keywords, check_type
from rekatrain.data.ranges import CountOrZero, Seed
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.trainer.launch.section import check_launch
from rekatrain.trainer.recipe.durations import seconds_of
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.upstream import (
    check_lora,
    check_quantization_section,
    check_reward,
    check_rollout_adapter,
    check_sft,
)
from rekatrain.trainer.recipe.values import check_secrets, check_values
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.synthesis.config import check_synthesis

# Optional trackers: section, module, and the callable whose keywords the section has.
TRACKERS = (("tensorboard", "torch.utils.tensorboard", "SummaryWriter"), ("trackio", "trackio", "init"))


def check_sections(recipe: Recipe) -> None:
    """Raise InputError for a key, a value or a reward that a section's callable does not have, and for a secret."""
    tree = asdict(recipe)
    check_values(tree)
    check_secrets(tree)
    _check_run(recipe)
    check_sft(recipe.sft)
    check_reward(recipe.reward)
    _check_held_out(recipe)
    if recipe.lora is not None:
        check_lora(recipe.lora)
        if recipe.stage == "rloo" and recipe.rloo.get("vllm_server_base_url"):
            check_rollout_adapter(recipe.lora)
    check_dataset("dataset", recipe.dataset, recipe.rewards)
    if recipe.eval_dataset is not None:
        deciding = recipe.evaluate.get("reward", "math_answer")
        check_dataset("eval_dataset", recipe.eval_dataset, [*recipe.rewards, str(deciding)])
    check_keywords("scoring", recipe.scoring, ScoringConfig)
    if recipe.stage == "rloo" or recipe.rloo:
        check_keywords("rloo", recipe.rloo, RLOOConfig)
        RLOOConfig(**recipe.rloo)
    if recipe.stage == "rloo" or recipe.rewards:
        build_reward_functions(recipe.rewards)
    if recipe.launch is not None:
        check_launch(recipe.launch, stage=recipe.stage, rloo=recipe.rloo)
    if recipe.generate is not None:
        check_synthesis("generate", recipe.generate, recipe.rewards)
    if recipe.filter is not None:
        check_synthesis("filter", recipe.filter, recipe.rewards)
    _check_trackers(recipe)
    _check_model(recipe)
    _check_chat(recipe)


def _check_run(recipe: Recipe) -> None:
    check_type("seed", recipe.seed, Seed)
    check_type("max_nonfinite_skips", recipe.max_nonfinite_skips, CountOrZero)
    seconds_of(recipe.time_limit)
    if not recipe.output_dir.strip():
        raise InputError("output_dir is empty: name a new folder for the run")
    if ".." in recipe.output_dir.lstrip("./").split("/"):
        raise InputError(f"output_dir is {recipe.output_dir!r}: write it without .. in its middle")
    if recipe.output_dir.startswith("~"):
        raise InputError(f"output_dir is {recipe.output_dir!r}: ~ would be the name of a folder; write the whole path")


def _check_held_out(recipe: Recipe) -> None:
    section: dict[str, Any] = getattr(recipe, recipe.stage)
    strategy = section.get("eval_strategy", "no")
    if strategy != "no" and recipe.eval_dataset is None:
        raise InputError(
            f"{recipe.stage}.eval_strategy is {strategy}, but the recipe has no eval_dataset: name the held-out rows "
            "there, or remove the key"
        )


def _check_trackers(recipe: Recipe) -> None:
    if recipe.wandb is not None:
        import wandb

        check_keywords("wandb", recipe.wandb, wandb.init)
    for name, module, attribute in TRACKERS:
        if getattr(recipe, name) is not None:
            try:
                target = getattr(importlib.import_module(module), attribute)
            except ImportError:
                raise InputError(f"{name}: {name} is not installed: pip install 'rekatrain[trackers]'") from None
            check_keywords(name, getattr(recipe, name), target)


def _check_model(recipe: Recipe) -> None:
    from rekatrain.trainer.models.load import load_model

    check_keywords("model", recipe.model, load_model)
    if recipe.stop_if:
        from rekatrain.trainer.run.guards import StopConfig, check_stop_if

        check_keywords("stop_if", recipe.stop_if, StopConfig)
        check_stop_if(recipe)
    if recipe.model.get("quantization_config") is not None:
        check_quantization_section(recipe.model["quantization_config"])
    for key in ("pretrained_model_name_or_path", "revision"):
        if recipe.model.get(key) == "":
            raise InputError(f"model.{key} is empty: write a folder or the id of a model, or remove it")
    if recipe.evaluate:
        from rekatrain.trainer.held_out_prompts import EvaluateConfig

        check_keywords("evaluate", recipe.evaluate, EvaluateConfig)
        EvaluateConfig(**recipe.evaluate)


def _check_chat(recipe: Recipe) -> None:
    if recipe.chat:
        from rekatrain.data.training_rows import encode_rows
        from rekatrain.trainer.reward_model.pairs import encode_pairs

        encode = encode_pairs if recipe.stage == "reward" else encode_rows
        check_keywords("chat", recipe.chat, encode, reserved=("rows", "tokenizer", "max_length"))
