"""The sizes of a recipe's largest passes on one process: micro-batches, sampler batch, KV cache."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from transformers import PretrainedConfig

from rekatrain.data.errors import InputError
from rekatrain.trainer.plan.machine import PlannedLaunch
from rekatrain.trainer.plan.model_size import ModelShape, attention_sizes, build
from rekatrain.trainer.plan.states import is_bfloat16
from rekatrain.trainer.recipe.load import Recipe, Section
from rekatrain.trainer.recipe.shipped import shipped_file
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.kernels.cpu import PassCost, num_tokens
from rekatrain.trainer.rloo.kernels.grouped_attention import FIRST_ROOM, decoder_and_head
from rekatrain.trainer.rloo.microbatch import GroupPart, pack
from rekatrain.trainer.rloo.sampler.in_process import MAX_GROUPS
from rekatrain.trainer.rloo.sequence_parallel import check_sequence_parallel


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """The passes of one process at the largest size that the recipe allows.

    Workloads with equal fields are equal, so that plans that differ only in the ZeRO stage or the number of GPUs share
    the cached peaks of passes.py.

    num_layers:          decoder layers
    num_prompts:         prompts per step of this process (stage rloo)
    prompt_tokens:       tokens per prompt (stage rloo)
    sequence_tokens:     tokens per sequence that this process holds (stages sft and reward)
    sequence_parallel:   number of processes that split the tokens of each micro-batch (stage rloo)
    autocasts:           True if matrix products are in bfloat16 over weights of another dtype
    reduces_in_backward: True if each gradient is reduced and freed as soon as it is computed (ZeRO 1 to 3)
    is_cpu:              True if attention and the LM head work as on a CPU
    """

    recipe: Recipe
    config: PretrainedConfig
    num_layers: int
    num_prompts: int = 1
    prompt_tokens: int = 256
    sequence_tokens: int = 1024
    sequence_parallel: int = 1
    autocasts: bool = False
    reduces_in_backward: bool = False
    is_cpu: bool = False

    @cached_property
    def _key(self) -> str:
        recipe = {name: getattr(self.recipe, name) for name in ("stage", "model", "lora", "rloo", "sft", "reward")}
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("recipe", "config")}
        return json.dumps([recipe, self.config.to_dict(), others], default=str, sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Workload) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @cached_property
    def rloo(self) -> RLOOConfig:
        """The recipe's section `rloo`."""
        return RLOOConfig(**self.recipe.rloo)

    @property
    def num_micro_batches(self) -> int:
        """Number of forward and backward passes per update."""
        if self.recipe.stage == "rloo":
            return len(self._micro_batches)
        return int(trl_section(self.recipe).get("gradient_accumulation_steps", 1))

    @property
    def keeps_gradients(self) -> bool:
        """True if the gradients of earlier micro-batches are in memory during a later one."""
        return self.num_micro_batches > 1 and not self.reduces_in_backward

    @property
    def num_sequences(self) -> int:
        """Number of sequences per micro-batch (stages sft and reward; a preference pair is two sequences)."""
        batch_size = int(trl_section(self.recipe).get("per_device_train_batch_size", 8))
        return 2 * batch_size if self.recipe.stage == "reward" else batch_size

    @property
    def has_mask(self) -> bool:
        """True if torch's attention needs a mask of token pairs: in batches with padding, and of packed conversations.

        Stages sft and reward.
        """
        is_flash = "flash" in str(self.recipe.model.get("attn_implementation"))
        return not is_flash and (self.num_sequences > 1 or bool(trl_section(self.recipe).get("packing")))

    @cached_property
    def largest_micro_batch(self) -> list[GroupPart]:
        """The micro-batch with the most tokens (stage rloo)."""
        return max(self._micro_batches, key=self._count_tokens)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the largest micro-batch that the model runs on, on all processes that split it."""
        if self.recipe.stage != "rloo":
            return self.num_sequences * self.sequence_tokens
        return self._count_tokens(self.largest_micro_batch)

    @property
    def sampler_batch_size(self) -> int:
        """Completions in the largest batch of the in-process sampler (stage rloo)."""
        at_once = max(1, self.rloo.per_device_generation_batch_size // self.rloo.num_generations)
        return min(self.num_prompts, at_once) * self.rloo.num_generations

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the KV cache per token, over all layers."""
        size = 2 if self.autocasts or is_bfloat16(self.recipe) else 4
        return self.num_layers * size * attention_sizes(self.config)[1]

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the in-process sampler's KV cache when its longest completion ends (stage rloo)."""
        longest = self.rloo.max_completion_length
        room = min(FIRST_ROOM, longest)
        while room < longest - 1:
            room = min(2 * room, longest)
        completions = self.sampler_batch_size
        prompts = min(self.num_prompts, MAX_GROUPS * completions // self.rloo.num_generations)
        # The cache grows layer by layer: one layer at a time exists twice.
        one_layer = self.kv_bytes_per_token // self.num_layers
        return self.kv_bytes_per_token * (prompts * self.prompt_tokens + completions * room) + (
            one_layer * completions * room
        )

    @cached_property
    def _micro_batches(self) -> list[list[GroupPart]]:
        with torch.device("meta"):
            decoder, _ = decoder_and_head(build(self.config, self.recipe, 1))  # one layer: only ratios of costs count
        cost = PassCost.of(decoder)
        cost = cost if self.is_cpu else replace(cost, join=0.0)  # a GPU's kernel reads prompt and completion together
        return pack(
            [(self.prompt_tokens, self._run_lengths(self.rloo.num_generations))]
            * self.num_prompts
            * self.sequence_parallel,
            self.rloo.micro_batch_tokens,
            cost,
        )

    def _run_lengths(self, num_completions: int) -> list[int]:
        return [self.rloo.max_completion_length - 1] * num_completions  # the model is not run on the last token

    def _count_tokens(self, micro_batch: Sequence[GroupPart]) -> int:
        return sum(
            num_tokens(self.prompt_tokens, self._run_lengths(len(part.members)), part.is_shared) for part in micro_batch
        )


def make_workload(
    recipe: Recipe, launch: PlannedLaunch, config: PretrainedConfig, shape: ModelShape, prompt_tokens: int
) -> Workload:
    """Return the workload of one process of a launch.

    Raise InputError for sequences that are longer than the model's context, and for processes that cannot split them.
    """
    is_rloo = recipe.stage == "rloo"
    if is_rloo:
        check_sequence_parallel(launch.sequence_parallel, launch.num_gpus, config)
    elif launch.sequence_parallel > 1 and launch.engine != "deepspeed":
        raise InputError(
            f"parallelism_config_sp_size is {launch.sequence_parallel}, but stage {recipe.stage} splits sequences "
            "under DeepSpeed only: add parallelism_config to a copy of "
            f"{shipped_file('accelerate/zero3.yaml')}"
        )
    bf16, is_deepspeed = uses_bf16(recipe, launch), launch.engine == "deepspeed"
    if is_deepspeed and bf16:  # DeepSpeed converts the model to bfloat16, so that no weight is cast in a pass
        recipe = replace(recipe, model={**recipe.model, "dtype": "bfloat16"})
    return Workload(
        recipe=recipe,
        config=config,
        num_layers=shape.num_layers,
        num_prompts=RLOOConfig(**recipe.rloo).prompts_per_process(launch.num_gpus) if is_rloo else 1,
        prompt_tokens=prompt_tokens,
        sequence_tokens=1 if is_rloo else count_sequence_tokens(recipe, launch, shape.context),
        sequence_parallel=launch.sequence_parallel if is_rloo else 1,
        autocasts=bf16 and not is_deepspeed,
        reduces_in_backward=is_deepspeed,
        is_cpu=launch.is_cpu,
    )


def trl_section(recipe: Recipe) -> Section:
    """Return the section of a stage that TRL's trainers run, sft or reward."""
    return recipe.sft if recipe.stage == "sft" else recipe.reward


def uses_bf16(recipe: Recipe, launch: PlannedLaunch) -> bool:
    """Return True if the stage computes in bfloat16, whatever the dtype of the weights is."""
    if recipe.stage == "rloo":
        return bool(recipe.rloo.get("bf16", False))
    return bool(trl_section(recipe).get("bf16", not launch.is_cpu))


def checkpoints_activations(recipe: Recipe) -> bool:
    """Return True if the backward pass recomputes activations, which is TRL's default."""
    if recipe.stage == "rloo":
        return bool(recipe.rloo.get("gradient_checkpointing", False))
    return bool(trl_section(recipe).get("gradient_checkpointing", True))


def count_sequence_tokens(recipe: Recipe, launch: PlannedLaunch, context: int) -> int:
    """Return the tokens of the longest sequence of stage sft or reward that one process holds.

    context: the model's maximum sequence length; InputError if the recipe's `max_length` is longer
    """
    # TRL's default is 1024, whatever the model's context is.
    length = int(trl_section(recipe).get("max_length", min(1024, context)) or context)
    if length > context:
        raise InputError(f"{recipe.stage}.max_length ({length}) exceeds the model's context of {context} tokens")
    return math.ceil(length / launch.sequence_parallel)
