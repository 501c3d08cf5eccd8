"""Which callable each section of a recipe goes to. All are checked, whichever of them the command reads."""

import wandb
from peft import LoraConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from rekatrain.data.options import check_keywords
from rekatrain.data.sources import load_rows
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.grader import ScoringConfig
from rekatrain.trainer.evaluate import EvaluateConfig
from rekatrain.trainer.models import load_model
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.reward_model.pairs import encode_pairs
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.sft import encode_conversations

# What the program itself passes: where the run is, its seed, how the rows come.
TRL_RESERVED = (
    "output_dir",
    "seed",
    "data_seed",
    "report_to",
    "use_cpu",
    "disable_tqdm",
    "dataset_kwargs",
    "model_init_kwargs",
    "deepspeed",  # how a run is sharded is the launch file's to say
    "fsdp",
)
# How text becomes ids is data/reward_model_input.py's to say.
REWARD_RESERVED = ("chat_template_path", "eos_token", "pad_token")


def check_sections(recipe: Recipe) -> None:
    """Raise InputError for a key, a type or a reward that a section's callable does not know."""
    check_keywords("model", recipe.model, load_model)
    check_keywords("dataset", recipe.dataset, load_rows)
    encode_rows = encode_pairs if recipe.stage == "reward" else encode_conversations
    check_keywords("chat", recipe.chat, encode_rows, reserved=("rows", "tokenizer"))
    check_keywords("sft", recipe.sft, SFTConfig, reserved=TRL_RESERVED)
    check_keywords("reward", recipe.reward, RewardConfig, reserved=(*TRL_RESERVED, *REWARD_RESERVED))
    check_keywords("evaluate", recipe.evaluate, EvaluateConfig)
    check_keywords("scoring", recipe.scoring, ScoringConfig)
    if recipe.stage == "rloo" or recipe.rloo:
        check_keywords("rloo", recipe.rloo, RLOOConfig)
    if recipe.eval_dataset is not None:
        check_keywords("eval_dataset", recipe.eval_dataset, load_rows)
    if recipe.lora is not None:
        check_keywords("lora", recipe.lora, LoraConfig, reserved=("task_type", "peft_type", "inference_mode"))
    if recipe.wandb is not None:
        check_keywords("wandb", recipe.wandb, wandb.init)
    if recipe.stage == "rloo" or recipe.rewards:
        build_reward_functions(recipe.rewards)
