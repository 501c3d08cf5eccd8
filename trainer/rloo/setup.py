"""Everything of an RLOO run that can be checked before a weight is loaded."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.data.mixture import is_shuffled
from rekatrain.rewards.compose import RewardFunction, build_reward_functions
from rekatrain.rewards.gradable import check_source_columns, keep_gradable
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.rewards.workers.pool import num_workers_here
from rekatrain.trainer.evaluation.metrics import metric_names
from rekatrain.trainer.held_out_prompts import HeldOut, prepare_held_out
from rekatrain.trainer.models.config import check_attention
from rekatrain.trainer.models.load import Policy, check_model, load_model_tokenizer
from rekatrain.trainer.processes.interruption import INTERRUPTION
from rekatrain.trainer.processes.launch import (
    USUAL_DDP_TIMEOUT,
    check_mixed_precision,
    read_launch,
    read_sequence_parallel,
)
from rekatrain.trainer.prompts import Prompt, load_prompts
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.kernels.float32_head import compute_head_in_float32
from rekatrain.trainer.rloo.kernels.fused_head import check_head_targets
from rekatrain.trainer.rloo.sampler.in_process import Sampler
from rekatrain.trainer.rloo.sampler.vllm.server_pool import MAX_ATTEMPTS
from rekatrain.trainer.rloo.sequence_parallel import check_sequence_parallel
from rekatrain.trainer.run.best import BestModel

# Seconds per token of the longest completion of a batch, in process: a 21B model takes 20 to 50 ms.
SECONDS_PER_TOKEN = 0.1


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """A checked run: its settings, its prompts and its rewards. The seed decides every random choice.

    is_shuffled: False if each pass over the prompts goes in their order
    held_out:    prompts to evaluate while the run trains; None without `eval_steps`
    closing:     called when the run ends, in any way
    """

    config: RLOOConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    rewards: list[RewardFunction]
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    seed: int = 0
    is_shuffled: bool = True
    held_out: HeldOut | None = None
    closing: ExitStack = field(default_factory=ExitStack)

    def trained_rows(self) -> Iterator[Sequence[object]]:
        """Return the ids of each prompt and all that its rewards read, which a fingerprint is taken of."""
        rows = ((prompt.ids, prompt.row) for prompt in self.prompts)
        return ((ids, row.messages, row.columns, row.source.rewards) for ids, row in rows)

    def best_model(self) -> BestModel:
        """Return the best evaluation of a run that has not begun."""
        return make_best(self.config, self.held_out)

    @cached_property
    def grader(self) -> Grader:
        """The grader that runs the rewards; it has worker processes from its first completion on."""
        return Grader(self.rewards, self.scoring, unbroken=INTERRUPTION.unbroken)

    def prompt_indices(self, accelerator: Accelerator) -> range:
        """Indices in each step of the prompts that this process samples."""
        number = self.config.prompts_per_process(accelerator.num_processes)
        return range(accelerator.process_index * number, (accelerator.process_index + 1) * number)

    def ddp_timeout(self, num_processes: int) -> float:
        """Seconds that a process waits for the others in an exchange: the recipe's, or more than the run's own limits.

        Between two exchanges a process may load or save, or sample and score its groups of a step. A server, a reward
        or a disk that is too slow should end the run by its own limit, with its own message.
        """
        config = self.config
        if config.ddp_timeout is not None:
            return config.ddp_timeout
        num_prompts = config.prompts_per_process(num_processes)
        at_once = config.per_device_generation_batch_size // config.num_generations
        num_batches = math.ceil(num_prompts / at_once)
        if config.vllm_server_urls:
            num_requests = 1 if config.reasoning_budget is None else 2
            num_limits = (num_batches - 1 + MAX_ATTEMPTS) * num_requests
            sampling = config.vllm_server_timeout + num_limits * config.vllm_request_timeout
        else:
            sampling = num_batches * config.max_completion_length * SECONDS_PER_TOKEN
        batch_functions = [reward for reward in self.rewards if reward.scorer is None]
        scorers = [reward for reward in self.rewards if reward.scorer is not None]
        num_workers = self.scoring.num_workers or num_workers_here()
        scoring = sum(reward.timeout or self.scoring.batch_timeout for reward in batch_functions)
        scoring += sum(getattr(reward.function, "outage_seconds", 0.0) for reward in batch_functions)
        scoring += math.ceil(num_prompts * config.num_generations / num_workers) * sum(
            reward.timeout or self.scoring.timeout for reward in scorers
        )
        return USUAL_DDP_TIMEOUT + (1 + config.dynamic_sampling_rounds) * (sampling + scoring)

    def make_sampler(self, policy: Policy) -> Sampler:
        """Make the in-process sampler with the settings of this run."""
        if self.config.cast_lm_head_to_fp32:
            compute_head_in_float32(policy)
        return Sampler(
            policy,
            self.tokenizer,
            max_completion_length=self.config.max_completion_length,
            temperature=self.config.temperature,
            batch_size=self.config.per_device_generation_batch_size,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            reasoning_budget=self.config.reasoning_budget,
            dtype=torch.bfloat16 if self.config.bf16 or self.config.rollout_dtype else None,
        )


def make_best(config: RLOOConfig, held_out: HeldOut | None) -> BestModel:
    """Return the best evaluation of a run that has not begun; InputError for a metric that its evaluations lack."""
    best = BestModel(
        metric=config.metric_for_best_model,
        greater_is_better=config.greater_is_better,
        patience=config.early_stopping_patience,
    )
    if held_out is not None:
        best.check_metric("rloo.metric_for_best_model", metric_names(held_out))
    return best


def prepare(recipe: Recipe) -> RunSetup:
    """Check the recipe against its data, its rewards and its model's config; raise InputError for what is wrong."""
    config = RLOOConfig(**recipe.rloo)
    check_mixed_precision(recipe.stage, bf16=config.bf16)
    rewards = build_reward_functions(recipe.rewards)
    tokenizer = load_model_tokenizer(recipe)
    model_config = check_model(recipe, tokenizer)
    check_attention(model_config)
    check_sequence_parallel(read_sequence_parallel(), read_launch().num_processes, model_config)
    if recipe.model.get("attn_implementation") is not None:
        raise InputError(
            f"model.attn_implementation is {recipe.model['attn_implementation']!r}, but stage rloo brings its own "
            "attention: take the key out"
        )
    _check_no_dropout(recipe, model_config)
    if config.fused_lm_head and recipe.lora is not None:
        check_head_targets(recipe.lora)
    prompts = load_prompts(recipe.dataset, tokenizer, model_config, config.max_completion_length)
    check_source_columns(rewards, {prompt.row.source.name: prompt.row.source for prompt in prompts}.values())
    gradable = keep_gradable(rewards, [prompt.row for prompt in prompts])
    prompts = [prompt for prompt, is_kept in zip(prompts, gradable, strict=True) if is_kept]
    is_evaluated = config.eval_steps is not None
    held_out = prepare_held_out(recipe, tokenizer, model_config, all_rewards=False) if is_evaluated else None
    if held_out is not None and held_out.config.base_url is not None:
        raise InputError(
            "evaluate.base_url names another model, but rloo.eval_steps evaluates the policy in training: give the "
            "server to rekatrain evaluate on the command line"
        )
    make_best(config, held_out)  # checks the metric
    return RunSetup(
        config=config,
        tokenizer=tokenizer,
        prompts=prompts,
        rewards=rewards,
        scoring=ScoringConfig(**recipe.scoring),
        seed=recipe.seed,
        is_shuffled=is_shuffled(recipe.dataset),
        held_out=held_out,
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
