"""A group: one prompt with its completions and their rewards, and the penalties that length adds to those."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rekatrain.data.chat import FinishReason
from rekatrain.rewards.scorers.text import overlong_penalty
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.in_process import Completion


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """One prompt of a step with its scored completions.

    prompt_index:    index of the prompt in the step; a replacement's is `prompts_per_step` higher per round
    rewards:         weighted sum for each completion, nan where it cannot be scored
    rewards_by_name: values of each reward function, None where it does not apply or has failed
    reward_errors:   for each completion, the rewards that failed, with the error
    is_in_loss:      for each completion, True where it has a term in the loss
    """

    prompt_index: int
    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    rewards: list[float]
    rewards_by_name: Mapping[str, Sequence[float | None]]
    reward_errors: Sequence[Mapping[str, str]]
    is_in_loss: list[bool]

    @property
    def is_idle(self) -> bool:
        """True where all advantages are 0 without a KL: equal rewards (with penalties), or nothing in the loss."""
        return len({reward for reward in self.rewards if not math.isnan(reward)}) <= 1 or not any(self.is_in_loss)


def apply_length_penalties(group: Group, config: RLOOConfig) -> Group:
    """Add penalties on long and truncated completions to the rewards, each under its name, or drop the latter."""
    lengths = [len(completion.ids) for completion in group.completions]
    is_truncated = [completion.finish_reason is FinishReason.LENGTH for completion in group.completions]
    penalties: dict[str, list[float]] = {}
    if config.overlong_buffer is not None:
        penalties["overlong_penalty"] = [
            config.overlong_penalty
            * overlong_penalty(length, max_length=config.max_completion_length, buffer=config.overlong_buffer)
            for length in lengths
        ]
    if config.truncated_completions == "penalize":
        penalties["truncation_penalty"] = [-config.truncation_penalty if is_cut else 0.0 for is_cut in is_truncated]
    rewards = [math.fsum(parts) for parts in zip(group.rewards, *penalties.values(), strict=True)]
    if config.truncated_completions == "drop_from_group":
        rewards = [math.nan if is_cut else reward for reward, is_cut in zip(rewards, is_truncated, strict=True)]
    is_dropped = config.truncated_completions in ("drop_from_loss", "drop_from_group")
    return replace(
        group,
        rewards=rewards,
        rewards_by_name={**group.rewards_by_name, **penalties},
        is_in_loss=[
            not math.isnan(reward) and not (is_dropped and is_cut)
            for reward, is_cut in zip(rewards, is_truncated, strict=True)
        ],
    )
