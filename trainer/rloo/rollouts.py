"""Rollouts: the groups of one step, sampled and scored. A completion is scored as soon as it has ended."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import FinishReason
from rekatrain.data.rows import Row
from rekatrain.data.stop import decode_completion
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scorers.text import overlong_penalty
from rekatrain.rewards.workers.pool import Job
from rekatrain.trainer.interruption import INTERRUPTION
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.distributed import whole_weights, zero_stage
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.setup import RunSetup

# Called with the name of a phase of a step that has just ended.
Lap = Callable[[str], None]


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


class GroupSampler(Protocol):
    """A sampler of groups: the in-process `Sampler`, or `VLLMSampler` on servers."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample a group of completions for each prompt, as `Sampler.sample` does."""


class RolloutSource(Protocol):
    """A source of a step's groups: `InProcessRollouts` here, `ServerRollouts` on vLLM servers."""

    def __call__(self, step: int, lap: Lap) -> tuple[list[Group], list[Group]]:
        """Return this process's groups to train on, and those that dynamic sampling replaced."""


class InProcessRollouts:
    """Groups sampled by the training processes from the weights that they train."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        sampler: GroupSampler,
        setup: RunSetup,
        prompt_indices: Sequence[int],
    ) -> None:
        self._accelerator = accelerator
        self._sampler, self._setup, self._prompt_indices = sampler, setup, prompt_indices
        self._weights = partial(whole_weights, model) if zero_stage(accelerator) == 3 else nullcontext

    def __call__(self, step: int, lap: Lap) -> tuple[list[Group], list[Group]]:
        """Sample and score this process's groups of `step`; raise Abandoned if the run is interrupted meanwhile."""
        rollouts = partial(roll_out, self._sampler, self._setup, self._prompt_indices, step, lap)
        with self._weights():
            return INTERRUPTION.abandonable(self._accelerator, rollouts)


def roll_out(
    sampler: GroupSampler, setup: RunSetup, prompt_indices: Sequence[int], step: int, lap: Lap
) -> tuple[list[Group], list[Group]]:
    """Sample and score a group for each prompt index -> those to train on, and those that dynamic sampling replaced.

    Dynamic sampling (DAPO, arXiv 2503.14476) replaces a prompt whose rewards are all equal, at most
    `dynamic_sampling_rounds` times. Each round adds `prompts_per_step` to the index; prompt and draws follow from the
    index alone, so they depend neither on the other prompts nor on the number of processes.
    """
    config, seed = setup.config, setup.seed
    groups: dict[int, Group] = {}
    replaced = []
    for round_number in range(1 + config.dynamic_sampling_rounds):
        indices = [index for index in prompt_indices if index not in groups or groups[index].is_idle]
        if not indices:
            break
        replaced += [groups[index] for index in indices if index in groups]
        # 1. Choose the prompts.
        chosen = step_prompts(
            len(setup.prompts),
            seed=seed,
            step=step,
            prompts_per_step=config.prompts_per_step,
            round_number=round_number,
            is_shuffled=setup.is_shuffled,
        )
        # 2, 3. Sample a group of completions for each, and score them.
        sampled = sample_groups(
            sampler,
            setup.grader,
            setup.tokenizer,
            [setup.prompts[chosen[index]] for index in indices],
            [index + round_number * config.prompts_per_step for index in indices],
            seed=seed,
            step=step,
            num_generations=config.num_generations,
            lap=lap,
        )
        if config.overlong_buffer is not None or config.truncated_completions != "keep":
            sampled = [apply_length_penalties(group, config) for group in sampled]
        groups.update(zip(indices, sampled, strict=True))
    return list(groups.values()), replaced


def step_prompts(
    num_prompts: int,
    *,
    seed: int,
    step: int,
    prompts_per_step: int,
    round_number: int = 0,
    is_shuffled: bool = True,
) -> list[int]:
    """Indices of the prompts of step `step` (from 0), in an order that is shuffled anew for each pass over the data.

    Without `is_shuffled` each pass goes in the order of the data.

    They are a function of the arguments alone, so that a resumed run neither repeats nor skips a prompt. A round above
    0 gives the replacements of a step's prompts, drawn from the whole data set; none of them is a prompt of an earlier
    round as long as there are others.
    """
    if round_number:
        first = step_prompts(
            num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step, is_shuffled=is_shuffled
        )
        order = [int(index) for index in np.random.default_rng([2, seed, step]).permutation(num_prompts)]
        fresh = [index for index in order if index not in set(first)] or order
        start = (round_number - 1) * prompts_per_step
        return [fresh[position % len(fresh)] for position in range(start, start + prompts_per_step)]
    positions = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    if not is_shuffled:
        return [position % num_prompts for position in positions]
    orders = {
        # The 0 keeps this stream apart from those of the draws, which begin with 1, and of the replacements, with 2.
        epoch: np.random.default_rng([0, seed, epoch]).permutation(num_prompts)
        for epoch in {position // num_prompts for position in positions}
    }
    return [int(orders[position // num_prompts][position % num_prompts]) for position in positions]


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
    lap: Lap = lambda phase: None,
) -> list[Group]:
    """Sample and score a group for each prompt; draws follow from (seed, step, prompt index, index in group) alone."""
    rows = [prompt.row for prompt in prompts for _ in range(num_generations)]
    columns, judges = reward_columns(rows), [row.source.rewards for row in rows]
    texts: dict[int, str] = {}
    jobs: dict[int, list[Job | None]] = {}

    def start_scoring(index: int, completion: Completion) -> None:
        with INTERRUPTION.unbroken():  # the queue of the workers has threads of its own
            texts[index] = decode_completion(completion.ids, tokenizer)
            jobs[index] = grader.submit(
                texts[index], {name: values[index] for name, values in columns.items()}, judges[index]
            )

    keys = [(1, seed, step, index) for index in prompt_indices]  # 1: not the streams that order the prompts
    sampled = sampler.sample([prompt.ids for prompt in prompts], keys, num_generations, start_scoring)
    flat = [completion for completions in sampled for completion in completions]
    for index, completion in enumerate(flat):
        if index not in jobs:
            start_scoring(index, completion)
    lap("sample")

    scores = grader.score(
        prompts=[prompt.text for prompt in prompts for _ in range(num_generations)],
        completions=[texts[index] for index in range(len(flat))],
        completion_ids=[completion.ids for completion in flat],
        columns=columns,
        judges=judges,
        submitted=jobs,
    )
    groups = []
    for number, (prompt_index, prompt, completions) in enumerate(zip(prompt_indices, prompts, sampled, strict=True)):
        members = slice(number * num_generations, (number + 1) * num_generations)
        rewards = scores.total[members]
        group = Group(
            prompt_index=prompt_index,
            prompt=prompt,
            completions=completions,
            texts=[texts[index] for index in range(members.start, members.stop)],
            rewards=rewards,
            rewards_by_name={name: values[members] for name, values in scores.by_name.items()},
            reward_errors=scores.errors[members],
            is_in_loss=[not math.isnan(reward) for reward in rewards],
        )
        groups.append(group)
    lap("reward")
    return groups


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


def count_informative(accelerator: Accelerator, groups: Sequence[Group]) -> int:
    """Count the groups that have advantages other than 0 without a KL, over all processes."""
    count = torch.tensor([sum(not group.is_idle for group in groups)], device=accelerator.device)
    return int(accelerator.reduce(count, "sum").item())


def reward_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns of the rows as reward functions take them: one list per column, None where a row lacks it."""
    names = sorted({name for row in rows for name in row.columns})
    return {name: [row.columns.get(name) for row in rows] for name in names}
