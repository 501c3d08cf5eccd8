"""The callable of each section of a recipe. All sections are checked, whichever of them the command reads.

Sections whose callable needs no torch are checked first, so that their errors come at once. A callable of a library is
imported only if the recipe has its section.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keywords
from rekatrain.data.sources import load_rows
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.grader import ScoringConfig
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig

# Keywords that the program itself passes: the run folder, its seed, the form of the rows.
TRL_RESERVED = (
    "output_dir",
    "seed",
    "data_seed",
    "report_to",
    "use_cpu",
    "disable_tqdm",
    "dataset_kwargs",
    "model_init_kwargs",
    "deepspeed",  # the launch file decides how a run is sharded
    "fsdp",
)
# A run uploads nothing, and its keys would need a secret.
HUB_KEY = re.compile(r"hub_\w+|push_to_hub\w*")
# A recipe is printed, logged and copied to the run folder. `api_key_env`, `eos_token` and the like are no secrets.
SECRET_KEY = re.compile(
    r"\w*(password|passwd|passphrase|secret|secret_key|credentials?|api_?key|access_?key|private_?key)"
    r"|(\w*_)?(hf|hub|auth|access|api|bearer|refresh|session)_?token|authorization",
    re.IGNORECASE,
)
# data/reward_model_input.py decides how text becomes ids.
REWARD_RESERVED = ("chat_template_path", "eos_token", "pad_token")


def check_sections(recipe: Recipe) -> None:
    """Raise InputError for a key, a type or a reward that a section's callable does not know, and for a secret."""
    check_secrets(asdict(recipe))
    check_keywords("dataset", recipe.dataset, load_rows)
    if recipe.eval_dataset is not None:
        check_keywords("eval_dataset", recipe.eval_dataset, load_rows)
    check_keywords("scoring", recipe.scoring, ScoringConfig)
    if recipe.stage == "rloo" or recipe.rloo:
        check_keywords("rloo", recipe.rloo, RLOOConfig)
    if recipe.stage == "rloo" or recipe.rewards:
        build_reward_functions(recipe.rewards)
    _check_wandb(recipe)
    _check_model(recipe)
    _check_trl(recipe)


def check_secrets(tree: Mapping[str, Any]) -> None:
    """Raise InputError for a key anywhere in a recipe whose name says that its value is a secret.

    Also raises it for the keys by which TRL uploads models. The message does not show the value.
    """
    for stage in ("sft", "reward"):
        for key in tree.get(stage) or {}:
            if HUB_KEY.fullmatch(str(key)):
                raise InputError(
                    f"{stage}.{key}: a run uploads nothing: remove it from the recipe; `hf upload` uploads an export"
                )
    _check_secrets("", tree)


def _check_secrets(prefix: str, tree: object) -> None:
    if isinstance(tree, list):
        for number, item in enumerate(tree):
            _check_secrets(f"{prefix}{number}.", item)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            if SECRET_KEY.fullmatch(str(key)):
                raise InputError(
                    f"{prefix}{key} would be written to the run folder: remove it from the recipe; secrets are read "
                    "from the environment (HF_TOKEN, WANDB_API_KEY, `api_key_env` of a reward, `scoring.environment`)"
                )
            _check_secrets(f"{prefix}{key}.", value)


def _check_wandb(recipe: Recipe) -> None:
    if recipe.wandb is not None:
        import wandb

        check_keywords("wandb", recipe.wandb, wandb.init)


def _check_model(recipe: Recipe) -> None:
    from peft import LoraConfig

    from rekatrain.trainer.models import load_model

    check_keywords("model", recipe.model, load_model)
    if recipe.stop_if:
        from rekatrain.trainer.guards import StopConfig, check_stop_if

        check_keywords("stop_if", recipe.stop_if, StopConfig)
        check_stop_if(recipe)
    if recipe.lora is not None:
        check_keywords("lora", recipe.lora, LoraConfig, reserved=("task_type", "peft_type", "inference_mode"))
    if recipe.evaluate:
        from rekatrain.trainer.evaluate import EvaluateConfig

        check_keywords("evaluate", recipe.evaluate, EvaluateConfig)


def _check_trl(recipe: Recipe) -> None:
    if recipe.chat:
        from rekatrain.trainer.reward_model.pairs import encode_pairs
        from rekatrain.trainer.sft import encode_conversations

        encode_rows = encode_pairs if recipe.stage == "reward" else encode_conversations
        check_keywords("chat", recipe.chat, encode_rows, reserved=("rows", "tokenizer"))
    if recipe.sft:
        from trl.trainer.sft_config import SFTConfig

        check_keywords("sft", recipe.sft, SFTConfig, reserved=TRL_RESERVED)
    if recipe.reward:
        from trl.trainer.reward_config import RewardConfig

        check_keywords("reward", recipe.reward, RewardConfig, reserved=(*TRL_RESERVED, *REWARD_RESERVED))
