"""Rollouts: the groups of one step, sampled, scored, and laid out for the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from data.stop import decode_completion
from rewards.compose import RewardFunction, score_completions
from trainer.prompts import Prompt, reward_columns
from trainer.rloo.logprobs import Rows, make_rows
from trainer.rloo.sampler import Completion, Sampler


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """One prompt of a step with its scored completions.

    slot:            the prompt's place in the step
    rewards:         weighted sum for each completion, nan where it cannot be scored
    rewards_by_name: what each reward function gave, None where it does not apply
    """

    slot: int
    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    rewards: list[float]
    rewards_by_name: dict[str, list[float | None]]

    @property
    def is_idle(self) -> bool:
        """Whether all scorable rewards are equal, so that without a KL every advantage is 0."""
        return len({reward for reward in self.rewards if not math.isnan(reward)}) <= 1

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of prompt and completion, for each completion."""
        return [len(self.prompt.ids) + len(completion.ids) for completion in self.completions]


def sample_groups(
    sampler: Sampler, prompts: Sequence[Prompt], slots: Sequence[int], *, seed: int, step: int, num_generations: int
) -> list[list[Completion]]:
    """Sample a group for each prompt; the draws follow from (seed, step, slot, place in the group) alone."""
    keys = [(1, seed, step, slot) for slot in slots]  # 1: not the streams that order the prompts
    return sampler.sample([prompt.ids for prompt in prompts], keys, num_generations)


def score_groups(
    functions: Sequence[RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    slots: Sequence[int],
    sampled: Sequence[list[Completion]],
) -> list[Group]:
    """Score every completion of a step in one call of each reward function."""
    flat = [(prompt, completion) for prompt, group in zip(prompts, sampled, strict=True) for completion in group]
    texts = [decode_completion(completion.ids, tokenizer) for _, completion in flat]
    scores = score_completions(
        functions,
        prompts=[prompt.text for prompt, _ in flat],
        completions=texts,
        completion_ids=[completion.ids for _, completion in flat],
        columns=reward_columns([prompt.row for prompt, _ in flat]),
    )
    groups = []
    first = 0
    for slot, prompt, completions in zip(slots, prompts, sampled, strict=True):
        members = slice(first, first + len(completions))
        groups.append(
            Group(
                slot=slot,
                prompt=prompt,
                completions=completions,
                texts=texts[members],
                rewards=scores.total[members],
                rewards_by_name={name: values[members] for name, values in scores.by_name.items()},
            )
        )
        first = members.stop
    return groups


def group_rows(groups: Sequence[Group], device: torch.device) -> Rows:
    """The groups laid out for the model, in order."""
    completions = [[completion.ids for completion in group.completions] for group in groups]
    return make_rows([group.prompt.ids for group in groups], completions, device)
