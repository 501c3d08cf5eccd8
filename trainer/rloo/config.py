"""What a recipe's `rloo:` section can say. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RLOOConfig:
    """Settings of the RLOO stage. One step is `prompts_per_step * num_generations` completions and one update.

    Counts are of the whole run, not of one process: the same recipe takes the same steps on any number of processes.

    max_steps:                          updates in all
    prompts_per_step:                   prompts a step, shared out among the processes
    num_generations:                    completions a prompt: the group, k in the paper
    max_completion_length:              tokens after which a completion is cut off
    temperature:                        divides the logits in sampling and in scoring alike
    beta:                               weight of the KL to the reference inside the reward; 0 keeps no reference
    learning_rate:                      AdamW's peak rate; about ten times higher for LoRA than for full fine-tuning
    lr_scheduler_type, warmup_steps:    `transformers.get_scheduler`
    weight_decay, adam_beta1, adam_beta2, adam_epsilon:  AdamW's others
    max_grad_norm:                      the gradient is scaled down to this norm
    micro_batch_tokens:                 tokens in one forward and backward; a group is never split
    per_device_generation_batch_size:   completions that one process samples at the same time
    gradient_checkpointing:             recompute activations in the backward pass
    bf16:                               bfloat16 arithmetic over float32 weights
    save_steps, save_total_limit:       a checkpoint every so many steps and at the end, and how many are kept
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

    def __post_init__(self) -> None:
        if self.per_device_generation_batch_size < self.num_generations:
            raise InputError(
                f"rloo.per_device_generation_batch_size ({self.per_device_generation_batch_size}) must hold at least "
                f"one group of rloo.num_generations ({self.num_generations}) completions"
            )

    def prompts_per_process(self, num_processes: int) -> int:
        """Prompts of a step that one process samples."""
        if self.prompts_per_step % num_processes:
            raise InputError(
                f"rloo.prompts_per_step ({self.prompts_per_step}) cannot be shared out evenly among {num_processes} "
                "processes; make it a multiple"
            )
        return self.prompts_per_step // num_processes
