"""Every key of a recipe's `rloo:` section. Imports no torch."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import FiniteFloat

from rekatrain.data.errors import InputError
from rekatrain.data.ranges import (
    Count,
    CountOrZero,
    FractionBelowOne,
    LearningRate,
    PositiveFraction,
    PositiveWeight,
    Seconds,
    Temperature,
    Weight,
)
from rekatrain.trainer.recipe.optimizers import DEFAULT, Optim
from rekatrain.trainer.run.best import check_best


@dataclass(frozen=True, kw_only=True)
class RLOOConfig:
    """Settings of the RLOO stage. One step is `prompts_per_step * num_generations` completions and one update.

    Counts are those of the whole run, not of one process: a recipe takes the same steps on any number of processes.

    max_steps:                          number of steps
    prompts_per_step:                   prompts per step, divided among the processes
    num_generations:                    completions per prompt: the group size, k in the paper
    max_completion_length:              tokens after which a completion is truncated
    temperature:                        divides the logits, in sampling and in the loss alike
    beta:                               weight of the KL to the reference; 0 loads no reference
    learning_rate:                      the peak rate; about ten times higher for LoRA than for full fine-tuning
    optim:                              adamw_torch_fused, adamw_torch, adamw_8bit (adamw_bnb_8bit) or muon, see
                                        ../recipe/optimizers.py
    lr_scheduler_type, warmup_steps:    as in `transformers.get_scheduler`, but the first update has a rate above 0:
                                        update s of a warm-up, from 0, has (s + 1) / (warmup_steps + 1) of the peak
    weight_decay:                       AdamW's and Muon's, of all trained weights
    adam_beta1, adam_beta2, adam_epsilon:  AdamW's other settings
    max_grad_norm:                      the gradient is scaled down to this norm
    max_unscorable_steps:               stop after so many steps in a row in which no completion has a reward
    micro_batch_tokens:                 tokens in one forward and backward pass, of all processes that split them; a
                                        larger group is split, a larger completion is run alone
    per_device_generation_batch_size:   completions that one process samples at the same time
    gradient_checkpointing:             recompute activations in the backward pass
    bf16:                               bfloat16 arithmetic over float32 weights
    rollout_dtype:                      bfloat16: the in-process sampler computes its linear layers in it, from a copy
                                        of the weights, and importance weights correct for the difference; null: as in
                                        training
    full_determinism:                   use deterministic GPU kernels alone, which are slower: equal runs, equal bits
    cast_lm_head_to_fp32:               compute the logits in float32, in trainer, reference and sampler; `rekatrain
                                        serve-rollouts` starts vLLM so, too
    fused_lm_head:                      LM head and log-probabilities in one function of TRL, which keeps no logits; see
                                        kernels/fused_head.py. Without top_k and top_p
    eval_steps, eval_on_start:          steps between evaluations of `eval_dataset` with the settings of `evaluate:`
                                        (there is one at the end, too); evaluate before the first step
    log_completions_steps:              steps between two tables of completions with their rewards, in the terminal and
                                        the trackers; null: none
    metric_for_best_model:              metric of the evaluations, such as eval/accuracy: the best checkpoint is saved
                                        and kept
    greater_is_better:                  null: True, except for a metric whose name ends in loss
    early_stopping_patience:            evaluations in a row without a better one after which the run stops
    save_steps, save_total_limit:       steps between checkpoints (there is one at the end, too); checkpoints to keep
    ddp_timeout:                        seconds that a process waits for the others in an exchange, after which the run
                                        ends; null: longer than the run's own limits, see `RunSetup.ddp_timeout`
    restart_optimizer:                  resume under another launch with a fresh optimizer, not a converted one

    Options beyond the paper, all off by default; formulas are in loss.py unless given here:

    num_iterations:                     updates per batch; from the second on, ratios to the sampling policy are clipped
    importance_sampling_level, epsilon: take the ratio and its clip per sequence or per token; width of the clip
    importance_sampling_correction:     weights for a sampler whose probabilities differ, per token or per sequence;
                                        truncate: at most the cap; mask: 0 above the cap
    importance_sampling_cap:            upper limit of those weights
    loss_type:                          sequence_sum (the paper's), sequence_mean or token_mean, over the whole step
    kl_placement:                       reward: the k1 estimate, detached, in the reward and its baseline; loss: the k2
                                        estimate in the loss. Only these two have the gradient of the KL
    truncated_completions:              treatment of completions that reach max_completion_length. keep: as any other;
                                        penalize: reward - truncation_penalty; drop_from_loss: no term in the loss and
                                        its denominator, but counted in the baseline; drop_from_group: neither
    overlong_buffer, overlong_penalty:  over the last overlong_buffer tokens before the cap, the reward falls linearly
                                        by up to overlong_penalty
    advantage_scaling:                  per_reward: normalize each reward within its group before they are added up
                                        (GDPO), see `scale_per_reward` in group.py; penalties are added as they are
    dynamic_sampling_rounds:            number of times that a prompt whose rewards (with penalties) are all equal is
                                        replaced by a new one
    grad_norm_quantile, grad_norm_window:  clip at this quantile of the gradient norms of so many recent updates, if
                                        that is below max_grad_norm
    top_p, top_k:                       top-k, then top-p sampling. The loss uses the same filtered distribution. With
                                        vLLM servers top_p needs top_k, too: a server returns at most top_k logprobs
    reasoning_budget:                   tokens after which an open `<reasoning>` is closed; the closing tokens are not
                                        trained. Servers get two requests per completion
    vllm_server_base_url:               vLLM servers that sample instead of the training processes; one URL or a list
    vllm_server_timeout:                seconds without any server after which the run stops
    vllm_request_timeout:               seconds until the complete response to one request, for a group or its rest
    vllm_weight_transfer:               how a full model reaches the servers. folder: through output_dir, which they
                                        must see; nccl: between GPUs. An adapter always goes through output_dir
    vllm_enable_sleep_mode:             the servers use the GPUs that train, by turns: they sleep while it trains
    max_staleness:                      updates that the weights which drew a token may lie back. 1: the servers sample
                                        the next batch while this one trains. 2 or more: up to so many batches are
                                        queued, and weights are updated while completions are in flight
    """

    max_steps: Count
    prompts_per_step: Count = 8
    num_generations: Annotated[int, Ge(2), Le(10**6)] = 8
    max_completion_length: Count = 512
    temperature: Temperature = 1.0
    beta: Weight = 0.05
    learning_rate: LearningRate = 1e-6
    optim: Optim = DEFAULT
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: CountOrZero = 0
    weight_decay: FractionBelowOne = 0.0
    adam_beta1: FractionBelowOne = 0.9
    adam_beta2: FractionBelowOne = 0.999
    adam_epsilon: PositiveFraction = 1e-8
    max_grad_norm: PositiveWeight = 1.0
    max_unscorable_steps: Count = 10
    micro_batch_tokens: Count = 8192
    per_device_generation_batch_size: Count = 64
    gradient_checkpointing: bool = False
    bf16: bool = False
    rollout_dtype: Literal["bfloat16"] | None = None
    full_determinism: bool = False
    cast_lm_head_to_fp32: bool = False
    fused_lm_head: bool = False
    eval_steps: Count | None = None
    eval_on_start: bool = False
    log_completions_steps: Count | None = None
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: Count | None = None
    save_steps: Count = 50
    save_total_limit: Count | None = None
    ddp_timeout: Count | None = None
    restart_optimizer: bool = False

    num_iterations: Count = 1
    importance_sampling_level: Literal["sequence", "token"] = "sequence"
    epsilon: Annotated[FiniteFloat, Gt(0), Lt(1)] = 0.2
    importance_sampling_correction: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    importance_sampling_cap: PositiveWeight = 2.0
    loss_type: Literal["sequence_sum", "sequence_mean", "token_mean"] = "sequence_sum"
    kl_placement: Literal["reward", "loss"] = "reward"
    truncated_completions: Literal["keep", "penalize", "drop_from_loss", "drop_from_group"] = "keep"
    truncation_penalty: PositiveWeight = 1.0
    overlong_buffer: Count | None = None
    overlong_penalty: PositiveWeight = 1.0
    advantage_scaling: Literal["none", "per_reward"] = "none"
    dynamic_sampling_rounds: CountOrZero = 0
    grad_norm_quantile: PositiveFraction | None = None
    grad_norm_window: Count = 100
    top_p: PositiveFraction = 1.0
    top_k: Count | None = None
    reasoning_budget: Count | None = None
    vllm_server_base_url: str | list[str] | None = None
    vllm_server_timeout: Seconds = 600.0
    vllm_request_timeout: Seconds = 1800.0
    vllm_weight_transfer: Literal["folder", "nccl"] = "folder"
    vllm_enable_sleep_mode: bool = False
    max_staleness: CountOrZero = 0

    def __post_init__(self) -> None:
        if self.per_device_generation_batch_size < self.num_generations:
            raise InputError(
                f"rloo.per_device_generation_batch_size ({self.per_device_generation_batch_size}) must hold at least "
                f"one group of rloo.num_generations ({self.num_generations}) completions"
            )
        if self.kl_placement == "loss" and self.num_iterations > 1:
            raise InputError(
                f"rloo.kl_placement loss is exact only on policy, and rloo.num_iterations is {self.num_iterations}: "
                "set num_iterations to 1, or kl_placement to reward"
            )
        correction = self.importance_sampling_correction or ""
        if correction.startswith("token") and self.importance_sampling_level == "sequence":
            raise InputError(
                f"rloo.importance_sampling_correction {correction} weights each token, but importance_sampling_level "
                "sequence has one ratio per sequence: set importance_sampling_level to token, or the correction to "
                f"{correction.replace('token', 'sequence')}"
            )
        for key in ("overlong_buffer", "reasoning_budget"):
            value = getattr(self, key)
            if value is not None and value >= self.max_completion_length:
                raise InputError(
                    f"rloo.{key} ({value}) must be smaller than rloo.max_completion_length "
                    f"({self.max_completion_length})"
                )
        if (self.num_iterations > 1 or self.max_staleness) and (self.top_p < 1 or self.top_k is not None):
            raise InputError(
                "rloo.top_p and rloo.top_k need num_iterations 1 and max_staleness 0: after an update the policy's "
                "most likely tokens are no longer the set that was sampled from"
            )
        if self.rollout_dtype and (self.importance_sampling_correction is None or self.vllm_server_urls):
            raise InputError(
                "rloo.rollout_dtype bfloat16 samples in process with other probabilities than training has: set "
                "importance_sampling_correction, such as sequence_truncate, and no vllm_server_base_url"
            )
        if self.fused_lm_head and (self.top_p < 1 or self.top_k is not None):
            raise InputError(
                "rloo.fused_lm_head computes log-probabilities over every token, and rloo.top_p or rloo.top_k leaves "
                "some out: set fused_lm_head to false, or top_p to 1 and top_k to null"
            )
        if self.eval_on_start and self.eval_steps is None:
            raise InputError("rloo.eval_on_start needs rloo.eval_steps, the steps between two evaluations: set it")
        check_best("rloo", vars(self), evaluates=self.eval_steps is not None, key="rloo.eval_steps")
        self._check_servers()

    @property
    def vllm_server_urls(self) -> list[str]:
        """URLs of the servers that sample; none where the training processes sample."""
        urls = self.vllm_server_base_url or []
        return [urls] if isinstance(urls, str) else urls

    def _check_servers(self) -> None:
        if self.vllm_server_base_url is not None and not self.vllm_server_urls:
            raise InputError("rloo.vllm_server_base_url names no server: write its URL, or remove the key")
        for url in self.vllm_server_urls:
            if not re.match(r"https?://[^/]", url):
                raise InputError(
                    f"rloo.vllm_server_base_url is {url!r}; it should be a URL such as http://localhost:8000"
                )
        if self.vllm_enable_sleep_mode and (self.max_staleness or self.vllm_weight_transfer == "nccl"):
            raise InputError(
                "rloo.vllm_enable_sleep_mode has servers sleep while the policy trains: set max_staleness to 0 and "
                "vllm_weight_transfer to folder, or use other GPUs for the servers"
            )
        if self.vllm_enable_sleep_mode and not self.vllm_server_urls:
            raise InputError("rloo.vllm_enable_sleep_mode needs vLLM servers: set vllm_server_base_url, or remove it")
        if self.max_staleness and not self.vllm_server_urls:
            raise InputError(
                f"rloo.max_staleness {self.max_staleness} needs vLLM servers that sample during training: set "
                "vllm_server_base_url"
            )
        if self.max_staleness and (self.importance_sampling_correction is None or self.kl_placement == "loss"):
            raise InputError(
                f"rloo.max_staleness {self.max_staleness} trains on completions of older weights: set "
                "importance_sampling_correction, such as token_truncate with importance_sampling_level token, and "
                "kl_placement to reward"
            )
        if self.vllm_server_urls and self.top_p < 1 and self.top_k is None:
            raise InputError(
                f"rloo.top_p {self.top_p} with vllm_server_base_url needs rloo.top_k, too, such as 100: a server "
                "returns at most top_k log-probabilities per token, and all kept tokens must be among them"
            )

    def prompts_per_process(self, num_processes: int) -> int:
        """Number of prompts per step that one process samples."""
        if self.prompts_per_step % num_processes:
            raise InputError(
                f"rloo.prompts_per_step ({self.prompts_per_step}) cannot be divided evenly among {num_processes} "
                f"processes: make it a multiple of {num_processes}"
            )
        return self.prompts_per_step // num_processes
