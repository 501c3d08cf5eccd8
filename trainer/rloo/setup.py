"""Everything of an RLOO run that can be checked before a weight is loaded."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.rewards.compose import RewardFunction, build_reward_functions
from rekatrain.rewards.grader import Grader, ScoringConfig, check_columns
from rekatrain.trainer.launch import check_mixed_precision
from rekatrain.trainer.models import Policy, check_attention, check_model, load_model_tokenizer
from rekatrain.trainer.prompts import Prompt, load_prompts
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.in_process import Sampler


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """A checked run: its settings, its prompts and its rewards. The seed decides every random choice."""

    config: RLOOConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    rewards: list[RewardFunction]
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    seed: int = 0

    @cached_property
    def grader(self) -> Grader:
        """The grader that runs the rewards; it has worker processes from its first completion on."""
        return Grader(self.rewards, self.scoring)

    def prompt_indices(self, accelerator: Accelerator) -> range:
        """Indices in each step of the prompts that this process samples."""
        number = self.config.prompts_per_process(accelerator.num_processes)
        return range(accelerator.process_index * number, (accelerator.process_index + 1) * number)

    def make_sampler(self, policy: Policy) -> Sampler:
        """Make the in-process sampler with the settings of this run."""
        return Sampler(
            policy,
            self.tokenizer,
            max_completion_length=self.config.max_completion_length,
            temperature=self.config.temperature,
            batch_size=self.config.per_device_generation_batch_size,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            reasoning_budget=self.config.reasoning_budget,
            dtype=torch.bfloat16 if self.config.bf16 else None,
        )


def prepare(recipe: Recipe) -> RunSetup:
    """Check the recipe against its data, its rewards and its model's config; raise InputError for what is wrong."""
    config = RLOOConfig(**recipe.rloo)
    check_mixed_precision(recipe.stage, bf16=config.bf16)
    rewards = build_reward_functions(recipe.rewards)
    tokenizer = load_model_tokenizer(recipe)
    model_config = check_model(recipe, tokenizer)
    check_attention(model_config)
    if recipe.model.get("attn_implementation") is not None:
        raise InputError(
            f"model.attn_implementation is {recipe.model['attn_implementation']!r}, but stage rloo brings its own "
            "attention: take the key out"
        )
    _check_no_dropout(recipe, model_config)
    prompts = load_prompts(recipe.dataset, tokenizer, model_config, config.max_completion_length)
    check_columns(rewards, {name for prompt in prompts for name in prompt.row.columns})
    return RunSetup(
        config=config,
        tokenizer=tokenizer,
        prompts=prompts,
        rewards=rewards,
        scoring=ScoringConfig(**recipe.scoring),
        seed=recipe.seed,
    )


def _check_no_dropout(recipe: Recipe, model_config: PretrainedConfig) -> None:
    if recipe.lora and recipe.lora.get("lora_dropout", 0) != 0:
        raise InputError(
            f"lora.lora_dropout is {recipe.lora['lora_dropout']}, but must be 0 in stage rloo: with dropout the "
            "trained policy is not the sampled one"
        )
    for key in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(model_config, key, 0):
            raise InputError(f"the model's config.json has {key}: set it to 0, RLOO trains the policy that it samples")
