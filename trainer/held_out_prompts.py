"""The held-out prompts of a recipe: its `eval_dataset`, without the prompts that are trained on, and `evaluate:`."""

import logging
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.data.ranges import Count, CountOrZero, Seconds, Temperature, Zero
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
    num_generations:                  answers per prompt; more than one also gives avg@k, pass@k and maj@k
    per_device_generation_batch_size: answers sampled at the same time
    reasoning_budgets:                numbers of reasoning tokens after which an open `<reasoning>` is closed, each of
                                      which is measured, such as [0, 256, 1024]; null among them: no budget. An
                                      evaluation while a run trains has none

    Answers of an OpenAI-compatible endpoint instead of the recipe's model, for the command alone:

    base_url, model:  of the endpoint, http://HOST:PORT/v1, or a list of equal ones; the model's name in requests
    format:           chat sends messages, and the server's template renders them; reka sends the rendered prompt as
                      ids to /completions, for a server of a model with the recipe's tokenizer
    reasoning_tags, extra_body, api_key_env: see `rekatrain.trainer.synthesis.config.ServerConfig`
    concurrency, request_timeout, max_retries: see `rekatrain.rewards.models.endpoint.Endpoint`
    """

    reward: str = "math_answer"
    max_completion_length: Count = 512
    temperature: Zero | Temperature = 0.0
    num_generations: Count = 1
    per_device_generation_batch_size: Count = 64
    reasoning_budgets: list[CountOrZero | None] | None = None
    base_url: str | list[str] | None = None
    model: str | None = None
    format: Literal["chat", "reka"] = "chat"
    reasoning_tags: list[str] | None = None
    extra_body: dict[str, JsonValue] = field(default_factory=dict)
    api_key_env: str | None = None
    concurrency: Count = 16
    request_timeout: Seconds = 600.0
    max_retries: CountOrZero = 4

    def __post_init__(self) -> None:
        if self.num_generations > 1 and self.temperature == 0:
            raise InputError(
                f"evaluate.num_generations {self.num_generations} at temperature 0 gives the same answer each time: "
                "set evaluate.temperature"
            )
        if (self.base_url is None) != (self.model is None):
            raise InputError("evaluate.base_url and evaluate.model go together: set both or neither")
        if self.base_url is None and (self.api_key_env or self.reasoning_tags or self.extra_body):
            raise InputError("evaluate: api_key_env, reasoning_tags and extra_body need base_url: set it")
        if self.reasoning_budgets is not None:
            self._check_budgets(self.reasoning_budgets)

    def _check_budgets(self, budgets: list[int | None]) -> None:
        if not budgets or len(set(budgets)) < len(budgets):
            raise InputError(
                f"evaluate.reasoning_budgets is {budgets}: write different numbers, such as [0, 256, 1024]"
            )
        if max(budget or 0 for budget in budgets) >= self.max_completion_length:
            raise InputError(
                f"evaluate.reasoning_budgets is {budgets}: each must be smaller than evaluate.max_completion_length "
                f"({self.max_completion_length}), which the answer needs a part of"
            )
        if self.base_url is not None and self.format != "reka":
            raise InputError(
                "evaluate.reasoning_budgets with base_url needs evaluate.format: reka, as the reasoning is closed in "
                "the prompt"
            )

    @property
    def base_urls(self) -> list[str]:
        """URLs of the servers; none where the recipe's model answers."""
        urls = self.base_url or []
        return [urls] if isinstance(urls, str) else urls


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
    # The context of a chat server's model is not known here.
    length = config.max_completion_length if config.base_url is None or config.format == "reka" else 0
    prompts = load_prompts(recipe.eval_dataset, tokenizer, model_config, length, "eval_dataset")
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
