"""A group: one prompt with its completions and their rewards, and what options make of those: scaling, penalties."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from rekatrain.data.chat import FinishReason
from rekatrain.rewards.scorers.text import overlong_penalty
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.in_process import Completion

SCALING_EPSILON = 1e-4  # TRL's


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """One prompt of a step with its scored completions.

    prompt_index:    index of the prompt in the step; a replacement's is `prompts_per_step` higher per round
    rewards:         weighted sum for each completion, nan where it cannot be scored
    rewards_by_name: values of each reward function, None where it does not apply or has failed
    reward_errors:   for each completion, the rewards that failed, with the error
    is_in_loss:      for each completion, True where it has a term in the loss
    reward_terms:    for each completion, the weight and value of each reward that counts; None if it is not scorable
    reward_metrics, reward_notes: for each completion, what its rewards report beside their values, by their names
    scaled_rewards:  what the advantages are made of in place of `rewards`; None without `advantage_scaling`
    """

    prompt_index: int
    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    rewards: list[float]
    rewards_by_name: Mapping[str, Sequence[float | None]]
    reward_errors: Sequence[Mapping[str, str]]
    is_in_loss: list[bool]
    reward_terms: Sequence[Mapping[str, tuple[float, float]] | None] = ()
    reward_metrics: Sequence[Mapping[str, Mapping[str, float]]] = ()
    reward_notes: Sequence[Mapping[str, Any]] = ()
    scaled_rewards: list[float] | None = None

    @property
    def compared_rewards(self) -> list[float]:
        """The rewards that are compared within the group for the advantages."""
        return self.rewards if self.scaled_rewards is None else self.scaled_rewards

    @property
    def is_idle(self) -> bool:
        """True where all advantages are 0 without a KL: equal rewards (with penalties), or nothing in the loss."""
        return len({reward for reward in self.compared_rewards if not math.isnan(reward)}) <= 1 or not any(
            self.is_in_loss
        )


def shape_rewards(group: Group, config: RLOOConfig) -> Group:
    """Return the group with the rewards that the options of the recipe ask for: scaled each, and with penalties."""
    if config.advantage_scaling == "per_reward":
        group = replace(group, scaled_rewards=scale_per_reward(group.reward_terms))
    if config.overlong_buffer is not None or config.truncated_completions != "keep":
        group = apply_length_penalties(group, config)
    return group


def scale_per_reward(terms: Sequence[Mapping[str, tuple[float, float]] | None]) -> list[float]:
    """Return for each completion the weighted sum of its rewards, each of which is first normalized within the group.

    With r_im the value of reward m for completion i, w_m its weight, and mean and std (with Bessel's correction) over
    the completions of the group to which m applies,

        R_i = sum over m of w_m * (r_im - mean_m) / (std_m + 1e-4)

    so that a reward with small differences counts as much as one with large ones. Otherwise different combinations of
    rewards may have the same sum, and so the same advantage. A reward that is equal for all completions adds 0. The
    leave-one-out baseline is taken of R; without None and errors, its mean is 0 and A_i = G / (G - 1) * R_i.

    Source: GDPO (arXiv 2601.05242), as TRL's GRPOTrainer has it (`multi_objective_aggregation: normalize_then_sum`).
    Both then divide by the deviation over the whole step. That is left out: it is one factor for all advantages.

    >>> [round(reward, 2) for reward in scale_per_reward([{"a": (1.0, 9.0)}, {"a": (1.0, 5.0)}, {"a": (1.0, 1.0)}])]
    [1.0, 0.0, -1.0]
    """
    scalable = [of_completion for of_completion in terms if of_completion is not None]
    moments = {}
    for name in {name for of_completion in scalable for name in of_completion}:
        values = [of_completion[name][1] for of_completion in scalable if name in of_completion]
        moments[name] = (fmean(values), stdev(values) if len(values) > 1 else 0.0)
    return [
        math.nan
        if of_completion is None
        else math.fsum(
            weight * (value - moments[name][0]) / (moments[name][1] + SCALING_EPSILON)
            for name, (weight, value) in of_completion.items()
        )
        for of_completion in terms
    ]


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

    def penalize(rewards: Sequence[float]) -> list[float]:
        penalized = [math.fsum(parts) for parts in zip(rewards, *penalties.values(), strict=True)]
        if config.truncated_completions != "drop_from_group":
            return penalized
        return [math.nan if is_cut else reward for reward, is_cut in zip(penalized, is_truncated, strict=True)]

    rewards = penalize(group.rewards)
    is_dropped = config.truncated_completions in ("drop_from_loss", "drop_from_group")
    return replace(
        group,
        rewards=rewards,
        scaled_rewards=None if group.scaled_rewards is None else penalize(group.scaled_rewards),
        rewards_by_name={**group.rewards_by_name, **penalties},
        is_in_loss=[
            not math.isnan(reward) and not (is_dropped and is_cut)
            for reward, is_cut in zip(rewards, is_truncated, strict=True)
        ],
    )
