"""Rollouts: the groups of one step, sampled and scored. A completion goes to its graders as soon as it has ended."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from rekatrain.data.chat import FinishReason
from rekatrain.data.stop import decode_completion
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.workers.pool import Job
from rekatrain.trainer.prompts import Prompt, reward_columns
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.loss import overlong_penalty
from rekatrain.trainer.rloo.sampler.in_process import Completion
from transformers import PreTrainedTokenizerBase


class GroupSampler(Protocol):
    """What samples: the in-process `Sampler`, or `VLLMSampler` on servers."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample a group of completions for each prompt, as `Sampler.sample` does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """One prompt of a step with its scored completions.

    prompt_index:    the prompt's index in the step; a replacement adds `prompts_per_step` for each round
    rewards:         weighted sum for each completion, nan where it cannot be scored
    rewards_by_name: what each reward function gave, None where it does not apply or has failed
    reward_errors:   for each completion, the rewards that failed, with why
    is_in_loss:      whether each completion has a term in the loss
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
        """Whether its advantages are all 0 without a KL: equal rewards, penalties included, or nothing in the loss."""
        return len({reward for reward in self.rewards if not math.isnan(reward)}) <= 1 or not any(self.is_in_loss)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampled:
    """Groups that have been sampled; `jobs` has the scoring that has begun, by the completion's place in all groups."""

    prompts: Sequence[Prompt]
    prompt_indices: Sequence[int]
    groups: list[list[Completion]]
    jobs: dict[int, list[Job]] = field(default_factory=dict)


def sample_groups(
    sampler: GroupSampler,
    grader: Grader,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    prompt_indices: Sequence[int],
    *,
    seed: int,
    step: int,
    num_generations: int,
) -> Sampled:
    """Sample a group for each prompt; the draws follow from (seed, step, prompt_index, place in the group) alone."""
    jobs: dict[int, list[Job]] = {}
    columns = reward_columns([prompt.row for prompt in prompts])

    def start_scoring(place: int, completion: Completion) -> None:
        of_row = {name: values[place // num_generations] for name, values in columns.items()}
        jobs[place] = grader.submit(decode_completion(completion.ids, tokenizer), of_row)

    keys = [
        (1, seed, step, prompt_index) for prompt_index in prompt_indices
    ]  # 1: not the streams that order the prompts
    groups = sampler.sample([prompt.ids for prompt in prompts], keys, num_generations, start_scoring)
    return Sampled(prompts=prompts, prompt_indices=prompt_indices, groups=groups, jobs=jobs)


def score_groups(
    grader: Grader, tokenizer: PreTrainedTokenizerBase, sampled: Sampled, config: RLOOConfig | None = None
) -> list[Group]:
    """Score every completion of a step by every reward, and treat its length as `config` says."""
    flat = [
        (prompt, completion)
        for prompt, group in zip(sampled.prompts, sampled.groups, strict=True)
        for completion in group
    ]
    texts = [decode_completion(completion.ids, tokenizer) for _, completion in flat]
    scores = grader.score(
        prompts=[prompt.text for prompt, _ in flat],
        completions=texts,
        completion_ids=[completion.ids for _, completion in flat],
        columns=reward_columns([prompt.row for prompt, _ in flat]),
        submitted=sampled.jobs,
    )
    groups = []
    first = 0
    for prompt_index, prompt, completions in zip(sampled.prompt_indices, sampled.prompts, sampled.groups, strict=True):
        members = slice(first, first + len(completions))
        rewards = scores.total[members]
        group = Group(
            prompt_index=prompt_index,
            prompt=prompt,
            completions=completions,
            texts=texts[members],
            rewards=rewards,
            rewards_by_name={name: values[members] for name, values in scores.by_name.items()},
            reward_errors=scores.errors[members],
            is_in_loss=[not math.isnan(reward) for reward in rewards],
        )
        groups.append(group if config is None else apply_length_penalties(group, config))
        first = members.stop
    return groups


def apply_length_penalties(group: Group, config: RLOOConfig) -> Group:
    """Add the penalties on long and truncated completions to the rewards, each under its name, or drop the latter."""
    lengths = [len(completion.ids) for completion in group.completions]
    is_truncated = [completion.finish_reason is FinishReason.LENGTH for completion in group.completions]
    penalties: dict[str, list[float]] = {}
    if config.overlong_buffer is not None:
        penalties["overlong_penalty"] = [
            config.overlong_penalty
            * overlong_penalty(
                length, max_completion_length=config.max_completion_length, buffer=config.overlong_buffer
            )
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
