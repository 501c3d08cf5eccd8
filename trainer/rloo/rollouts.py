"""Rollouts: the groups of one step, sampled and scored. A completion is scored as soon as it has ended."""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from rekatrain.data.rows import Row
from rekatrain.data.stop import decode_completion
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.models.outage import ServerAway
from rekatrain.rewards.progress import Progress
from rekatrain.rewards.workers.pool import Job
from rekatrain.trainer.processes.interruption import INTERRUPTION, Abandoned, Phase
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.rloo.distributed import whole_weights, zero_stage
from rekatrain.trainer.rloo.group import Group, shape_rewards
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.setup import RunSetup

Result = TypeVar("Result")

# Called with the name of a phase of a step that has just ended.
Lap = Callable[[str], None]


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
            return abandonable(self._accelerator, rollouts)


def abandonable(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Return the function's result; raise Abandoned on every rank if the run is interrupted meanwhile, on any rank.

    Every rank must call this. The function must contain no collective, and must leave no trace but random states, which
    are restored.
    """
    states, results = _random_states(), []
    try:
        try:
            INTERRUPTION.phase = Phase.SAMPLING
            if INTERRUPTION.cause is not None:
                raise Abandoned
            results.append(function())
        finally:
            INTERRUPTION.phase = Phase.TRAINING
    except ServerAway as error:  # as an interruption: the step is abandoned, and what has been trained is saved
        INTERRUPTION.cause = INTERRUPTION.cause or error.cause
    except Abandoned:  # a signal's handler raises it anywhere, after the last line of `try` too
        pass
    num_abandoned = accelerator.reduce(torch.tensor([not results], dtype=torch.int, device=accelerator.device), "sum")
    if num_abandoned.item():
        _set_random_states(states)
        raise Abandoned
    return results[0]


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
            progress=Progress(step=step, max_steps=config.max_steps),
            lap=lap,
        )
        shapes = config.overlong_buffer is not None or config.truncated_completions != "keep"
        if shapes or config.advantage_scaling == "per_reward":
            sampled = [shape_rewards(group, config) for group in sampled]
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
    progress: Progress | None = None,
    lap: Lap = lambda phase: None,
) -> list[Group]:
    """Sample and score a group for each prompt; draws follow from (seed, step, prompt index, index in group) alone.

    progress: of the run, for rewards whose weight depends on it
    """
    rows = [prompt.row for prompt in prompts for _ in range(num_generations)]
    columns, judges = reward_columns(rows), [row.source.rewards for row in rows]
    texts: dict[int, str] = {}
    jobs: dict[int, list[Job | None]] = {}

    def start_scoring(index: int, completion: Completion) -> None:
        texts[index] = decode_completion(completion.ids, tokenizer)
        of_row = {name: values[index] for name, values in columns.items()}
        jobs[index] = grader.submit(texts[index], of_row, judges[index])

    keys = [(1, seed, step, index) for index in prompt_indices]  # 1: not the streams that order the prompts
    sampled = sampler.sample([prompt.ids for prompt in prompts], keys, num_generations, start_scoring)
    flat = [completion for completions in sampled for completion in completions]
    for index, completion in enumerate(flat):
        if index not in texts:
            texts[index] = decode_completion(completion.ids, tokenizer)
    lap("sample")

    with grader.turn:  # batches may be sampled at the same time, with max_staleness
        scores = grader.score(
            prompts=[prompt.text for prompt in prompts for _ in range(num_generations)],
            completions=[texts[index] for index in range(len(flat))],
            completion_ids=[completion.ids for completion in flat],
            columns=columns,
            judges=judges,
            submitted=jobs,
            progress=progress,
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
            reward_terms=scores.terms[members],
            reward_metrics=scores.metrics[members],
            reward_notes=scores.notes[members],
        )
        groups.append(group)
    lap("reward")
    return groups


def count_informative(accelerator: Accelerator, groups: Sequence[Group]) -> int:
    """Count the groups that have advantages other than 0 without a KL, over all processes."""
    count = torch.tensor([sum(not group.is_idle for group in groups)], device=accelerator.device)
    return int(accelerator.reduce(count, "sum").item())


def reward_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns of the rows as reward functions take them: one list per column, None where a row lacks it."""
    names = sorted({name for row in rows for name in row.columns})
    return {name: [row.columns.get(name) for row in rows] for name in names}


def _random_states() -> tuple[Any, ...]:  # as each library has them
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])
