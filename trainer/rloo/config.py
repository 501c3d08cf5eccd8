"""What a recipe's `rloo:` section can say. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from rekatrain.data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RLOOConfig:
    """Settings of the RLOO stage. One step is `prompts_per_step * num_generations` completions and one update.

    Counts are of the whole run, not of one process: the same recipe takes the same steps on any number of processes.

    max_steps:                          batches of rollouts in all
    prompts_per_step:                   prompts a step, shared out among the processes
    num_generations:                    completions a prompt: the group, k in the paper
    max_completion_length:              tokens after which a completion is cut off
    temperature:                        divides the logits in sampling and in scoring alike
    beta:                               weight of the KL to the reference; 0 keeps no reference
    learning_rate:                      AdamW's peak rate; about ten times higher for LoRA than for full fine-tuning
    lr_scheduler_type, warmup_steps:    `transformers.get_scheduler`
    weight_decay, adam_beta1, adam_beta2, adam_epsilon:  AdamW's others
    max_grad_norm:                      the gradient is scaled down to this norm
    micro_batch_tokens:                 tokens in one forward and backward; a group above it is split, a row above it is
                                        run alone
    per_device_generation_batch_size:   completions that one process samples at the same time
    gradient_checkpointing:             recompute activations in the backward pass
    bf16:                               bfloat16 arithmetic over float32 weights
    save_steps, save_total_limit:       a checkpoint every so many steps and at the end, and how many are kept
    restart_optimizer:                  --resume under another number of ZeRO shards goes on with a fresh optimizer

    Beyond the paper, all off by default; formulas in objective.py unless said here:

    num_iterations:                     updates a batch; from the second on the ratio to the sampling policy is clipped
    importance_sampling_level, epsilon: ratio and clip of the sequence or of each token; the clip's width
    importance_sampling_correction:     weights for a sampler whose arithmetic differs, of tokens or of sequences
    importance_sampling_cap:            where those weights are cut off
    loss_type:                          sequence_sum (the paper's), sequence_mean or token_mean, over the whole step
    kl_placement:                       reward: the k1 estimate, detached, in the reward and its baseline; loss: the k2
                                        estimate in the loss. Only these two have the gradient of the KL
    truncated_completions:              what a completion that met max_completion_length does. keep: as any other;
                                        penalize: reward - truncation_penalty; drop_from_loss: no term in the loss and
                                        its denominator, but a part in its siblings' baseline; drop_from_group: neither
    overlong_buffer, overlong_penalty:  reward + overlong_penalty * (0 falling to -1 over the last tokens of the cap)
    dynamic_sampling_rounds:            times that a prompt whose rewards, penalties included, are all equal is replaced
                                        by a fresh one
    grad_norm_quantile, grad_norm_window:  the gradient is scaled down to this quantile of the norms of recent updates,
                                        or to max_grad_norm where that is lower
    top_p, top_k:                       sampling from the top_k likeliest tokens, and of these from the likeliest that
                                        reach top_p together, those as likely as the last included; scored over the same
                                        tokens, up to the rounding that sampler_kl shows. vLLM servers want top_k with
                                        top_p, for they list top_k tokens with each that is drawn
    reasoning_budget:                   tokens after which an open `<reasoning>` is closed for the policy, which is
                                        not trained on the closing; servers are then asked twice a completion
    vllm_server_base_url:               vLLM servers that sample in the place of the training processes, one or a list
    vllm_server_timeout:                seconds without any of them after which the run stops
    vllm_request_timeout:               seconds for a group of completions, or the rest of one, to the whole answer
    vllm_weight_transfer:               how a whole model reaches the servers: in output_dir, which they must see too,
                                        or sent between GPUs; an adapter always goes by that folder
    max_staleness:                      1: the servers sample the next batch while this one trains, from the weights of
                                        one update ago
    """

    max_steps: Annotated[int, Ge(1)]
    prompts_per_step: Annotated[int, Ge(1)] = 8
    num_generations: Annotated[int, Ge(2)] = 8
    max_completion_length: Annotated[int, Ge(1)] = 512
    temperature: Annotated[float, Gt(0)] = 1.0
    beta: Annotated[float, Ge(0)] = 0.05
    learning_rate: Annotated[float, Ge(0)] = 1e-6
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: Annotated[int, Ge(0)] = 0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    adam_beta1: Annotated[float, Ge(0)] = 0.9
    adam_beta2: Annotated[float, Ge(0)] = 0.999
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    micro_batch_tokens: Annotated[int, Ge(1)] = 8192
    per_device_generation_batch_size: Annotated[int, Ge(1)] = 64
    gradient_checkpointing: bool = False
    bf16: bool = False
    save_steps: Annotated[int, Ge(1)] = 50
    save_total_limit: Annotated[int, Ge(1)] | None = None
    restart_optimizer: bool = False

    num_iterations: Annotated[int, Ge(1)] = 1
    importance_sampling_level: Literal["sequence", "token"] = "sequence"
    epsilon: Annotated[float, Gt(0), Lt(1)] = 0.2
    importance_sampling_correction: Literal["token_truncate", "sequence_truncate"] | None = None
    importance_sampling_cap: Annotated[float, Gt(0)] = 2.0
    loss_type: Literal["sequence_sum", "sequence_mean", "token_mean"] = "sequence_sum"
    kl_placement: Literal["reward", "loss"] = "reward"
    truncated_completions: Literal["keep", "penalize", "drop_from_loss", "drop_from_group"] = "keep"
    truncation_penalty: Annotated[float, Gt(0)] = 1.0
    overlong_buffer: Annotated[int, Ge(1)] | None = None
    overlong_penalty: Annotated[float, Gt(0)] = 1.0
    dynamic_sampling_rounds: Annotated[int, Ge(0)] = 0
    grad_norm_quantile: Annotated[float, Gt(0), Le(1)] | None = None
    grad_norm_window: Annotated[int, Ge(1)] = 100
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(1)] | None = None
    reasoning_budget: Annotated[int, Ge(1)] | None = None
    vllm_server_base_url: str | list[str] | None = None
    vllm_server_timeout: Annotated[float, Gt(0)] = 600.0
    vllm_request_timeout: Annotated[float, Gt(0)] = 1800.0
    vllm_weight_transfer: Literal["folder", "nccl"] = "folder"
    max_staleness: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        if self.per_device_generation_batch_size < self.num_generations:
            raise InputError(
                f"rloo.per_device_generation_batch_size ({self.per_device_generation_batch_size}) must hold at least "
                f"one group of rloo.num_generations ({self.num_generations}) completions"
            )
        self._check_kl()
        if self.importance_sampling_correction == "token_truncate" and self.importance_sampling_level == "sequence":
            raise InputError(
                "rloo.importance_sampling_correction token_truncate weighs tokens and importance_sampling_level "
                "sequence has one ratio a sequence: set importance_sampling_level to token, or correct by "
                "sequence_truncate"
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
                "rloo.top_p and rloo.top_k go with num_iterations 1 and max_staleness 0: after an update the policy's "
                "likeliest tokens are no longer those that were sampled from"
            )
        self._check_servers()

    @property
    def vllm_server_urls(self) -> list[str]:
        """The servers that sample; none where the training processes do."""
        urls = self.vllm_server_base_url or []
        return [urls] if isinstance(urls, str) else urls

    def _check_servers(self) -> None:
        if self.max_staleness and not self.vllm_server_urls:
            raise InputError("rloo.max_staleness 1 needs servers that sample beside the training: vllm_server_base_url")
        if self.max_staleness and (self.importance_sampling_correction is None or self.kl_placement == "loss"):
            raise InputError(
                "rloo.max_staleness 1 trains on what older weights have sampled: set importance_sampling_correction "
                "(sequence_truncate), and kl_placement to reward"
            )
        if self.vllm_server_urls and self.top_p < 1 and self.top_k is None:
            raise InputError(
                f"rloo.top_p {self.top_p} with vllm_server_base_url needs rloo.top_k as well, such as 100: a server "
                "lists so many tokens at most, and those that it draws from must be among them"
            )

    def _check_kl(self) -> None:
        if self.kl_placement == "loss" and self.num_iterations > 1:
            raise InputError(
                "rloo.kl_placement loss is exact only on policy: set num_iterations to 1, or kl_placement to reward"
            )

    def prompts_per_process(self, num_processes: int) -> int:
        """Prompts of a step that one process samples."""
        if self.prompts_per_step % num_processes:
            raise InputError(
                f"rloo.prompts_per_step ({self.prompts_per_step}) cannot be shared out evenly among {num_processes} "
                "processes; make it a multiple"
            )
        return self.prompts_per_step // num_processes
