"""The held-out prompts of a recipe: its `eval_dataset`, without the prompts that are trained on, and `evaluate:`."""

import logging
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.data.ranges import Count, Temperature, Zero
from rekatrain.rewards.compose import RewardFunction, build_reward_functions
from rekatrain.rewards.gradable import check_source_columns
from rekatrain.trainer.prompts import Prompt, load_prompts
from rekatrain.trainer.recipe.load import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of a recipe's `evaluate:` section.

    reward:                           the deciding reward: an answer is right if this reward is exactly 1.0
    max_completion_length:            number of tokens after which an answer is cut off
    temperature:                      sampling temperature; 0 takes the most likely token
    num_generations:                  answers per prompt; more than one also gives pass@k
    per_device_generation_batch_size: answers sampled at the same time
    """

    reward: str = "math_answer"
    max_completion_length: Count = 512
    temperature: Zero | Temperature = 0.0
    num_generations: Count = 1
    per_device_generation_batch_size: Count = 64

    def __post_init__(self) -> None:
        if self.num_generations > 1 and self.temperature == 0:
            raise InputError(
                f"evaluate.num_generations {self.num_generations} at temperature 0 gives the same answer each time: "
                "set evaluate.temperature"
            )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out prompts of a recipe, and the rewards that judge the answers; the deciding one is among them."""

    config: EvaluateConfig
    prompts: list[Prompt]
    rewards: list[RewardFunction]


def prepare_held_out(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig, *, all_rewards: bool
) -> HeldOut:
    """Load the prompts of `eval_dataset` that are not in `dataset`; raise InputError for what is wrong.

    all_rewards: take the recipe's other rewards too, where they judge a source of held-out rows
    """
    config = EvaluateConfig(**recipe.evaluate)
    if recipe.eval_dataset is None:
        raise InputError("the recipe has no eval_dataset section: name the held-out rows there")
    # The recipe's options for that reward hold here too.
    options = {config.reward: None, **recipe.rewards}
    rewards = build_reward_functions(options if all_rewards else {config.reward: options[config.reward]})
    prompts = load_prompts(recipe.eval_dataset, tokenizer, model_config, config.max_completion_length, "eval_dataset")
    prompts = _held_out(prompts, load_prompts(recipe.dataset, tokenizer, model_config, 0))
    sources = {prompt.row.source.name: prompt.row.source for prompt in prompts}.values()
    # The recipe's other rewards may judge sources that have no held-out rows.
    rewards = [
        reward
        for reward in rewards
        if reward.name == config.reward or any(source.is_judged_by(reward.name) for source in sources)
    ]
    check_source_columns(rewards, sources)
    return HeldOut(config=config, prompts=prompts, rewards=rewards)


def _held_out(prompts: list[Prompt], trained_on: list[Prompt]) -> list[Prompt]:
    seen = {prompt.text for prompt in trained_on}
    held_out = [prompt for prompt in prompts if prompt.text not in seen]
    if len(held_out) < len(prompts):
        logger.warning(
            "%d of %d eval prompts are in dataset too and left out", len(prompts) - len(held_out), len(prompts)
        )
    if not held_out:
        raise InputError("every prompt of eval_dataset is in dataset too: there is nothing held out")
    return held_out
