"""Tests of trainer/rloo/rollouts.py: prompts, dynamic sampling and penalties; nothing depends on batch sizes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.rewards.scorers.text import overlong_penalty
from rekatrain.trainer.rloo.metrics import Clock, RolloutRecord, step_metrics
from rekatrain.trainer.rloo.rollouts import roll_out, step_prompts
from rekatrain.trainer.rloo.setup import RunSetup
from tests.helpers.rloo import (
    assert_gradients_close,
    by_completion,
    gradient_from_records,
    make_setup,
    run_step,
)

MANY = [f"human: {number} <sep> assistant:" for number in range(40)]


def for_even_prompts(prompts: Sequence[str], completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    """Return rewards that vary for even prompts and are equal for all completions of an odd prompt."""
    numbers = [int(prompt.split()[1]) for prompt in prompts]
    return [sum(ids) % 7 / 7 if n % 2 == 0 else 0.5 for n, ids in zip(numbers, completion_ids, strict=True)]


def dynamic_setup(tokenizer: PreTrainedTokenizerFast, rounds: int, **options: Any) -> RunSetup:
    """Set up a step of 8 of 40 prompts, of which half give equal rewards."""
    return make_setup(
        tokenizer, for_even_prompts, MANY, prompts_per_step=8, dynamic_sampling_rounds=rounds, beta=0.0, **options
    )


def is_idle(records: Sequence[RolloutRecord]) -> bool:
    """Return True for a group of equal rewards."""
    return len({record["reward"] for record in records}) == 1


def groups_of(records: Sequence[RolloutRecord]) -> dict[int, list[RolloutRecord]]:
    """Return the records of each prompt index."""
    return {
        prompt_index: [r for r in records if r["prompt_index"] == prompt_index]
        for prompt_index in sorted({r["prompt_index"] for r in records})
    }


def test_dynamic_sampling_without_rounds_replaces_nothing(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    records, _ = run_step(policy, dynamic_setup(tokenizer, 0))
    assert list(groups_of(records)) == list(range(8))
    assert 0 < sum(is_idle(group) for group in groups_of(records).values()) < 8


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_dynamic_sampling_replaces_groups_of_equal_rewards(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rounds: int
) -> None:
    setup = dynamic_setup(tokenizer, rounds)
    records, gradient = run_step(policy, setup)
    groups = groups_of(records)
    last_index: dict[int, int] = {}  # of each prompt of the step, that of its last replacement
    for prompt_index, group in groups.items():
        round_number, first_index = divmod(prompt_index, 8)
        assert round_number <= rounds and len(group) == 4
        if round_number:  # the group that it replaces was idle
            assert last_index[first_index] == prompt_index - 8 and is_idle(groups[prompt_index - 8])
        last_index[first_index] = prompt_index
    for prompt_index in last_index.values():
        assert not is_idle(groups[prompt_index]) or prompt_index // 8 == rounds
    trained = [record for prompt_index in last_index.values() for record in groups[prompt_index]]
    assert len(trained) == 8 * 4 < len(records)

    # The loss and its denominators are those of the last groups.
    assert all(record["advantage"] == 0 for record in records if record not in trained)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, trained))
    prompts = [group[0]["prompt"] for group in groups.values()]
    assert len(set(prompts)) == len(prompts)
    assert step_metrics(records)["frac_reward_zero_std"] == sum(map(is_idle, groups.values())) / len(groups)


def test_roll_out_draws_by_the_prompt_index_alone(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    # In float64, so that no draw depends on rounding: the batches differ.
    setup = dynamic_setup(tokenizer, 2)
    sampler = setup.make_sampler(policy.double())

    def rolled_out(prompt_indices: Sequence[int]) -> dict[int, list[list[int]]]:
        kept, replaced = roll_out(sampler, replace(setup, seed=5), prompt_indices, 0, Clock().lap)
        return {
            group.prompt_index: [completion.ids for completion in group.completions] for group in [*kept, *replaced]
        }

    together = rolled_out(range(8))
    assert len(together) > 8
    assert rolled_out(range(8)) == together
    apart = {}
    for prompt_indices in ([0, 1, 2], [3], [4, 5, 6, 7]):
        apart |= rolled_out(prompt_indices)
    assert apart == together


def test_dynamic_sampling_compares_rewards_with_penalties(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def constant(completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
        return [1.0] * len(completion_ids)

    setup = make_setup(tokenizer, constant, overlong_buffer=7, dynamic_sampling_rounds=1)
    records, gradient = run_step(policy, setup)
    # A group whose completions are all right is trained to be shorter.
    groups = groups_of(records)
    assert sum(not is_idle(group) for group in groups.values()) >= 4
    assert all(prompt_index < 5 or is_idle(groups[prompt_index - 5]) for prompt_index in groups)
    trained = [r for r in records if r["prompt_index"] >= 5 or r["prompt_index"] + 5 not in groups]
    assert_gradients_close(gradient, gradient_from_records(policy, setup, trained))


@given(
    num_prompts=st.integers(1, 40), prompts_per_step=st.integers(1, 10), seed=st.integers(0, 99), step=st.integers(0, 9)
)
def test_step_prompts_of_later_rounds_are_fresh_prompts(
    num_prompts: int, prompts_per_step: int, seed: int, step: int
) -> None:
    def chosen(number: int) -> list[int]:
        return step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step, round_number=number)

    first = chosen(0)
    assert first == step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step)
    num_fresh = num_prompts - len(set(first))
    later = [index for number in range(1, 5) for index in chosen(number)]
    assert set(later) <= set(range(num_prompts))
    assert len(chosen(3)) == prompts_per_step
    if num_fresh:
        assert not set(later) & set(first)
        assert len(set(later[:num_fresh])) == min(num_fresh, len(later))


# The order of the prompts


@given(num_prompts=st.integers(1, 20), prompts_per_step=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_step_prompts_hold_every_prompt_once_per_pass(num_prompts: int, prompts_per_step: int, seed: int) -> None:
    num_steps = -(-3 * num_prompts // prompts_per_step)
    steps = [
        step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step) for step in range(num_steps)
    ]
    assert all(len(chosen) == prompts_per_step for chosen in steps)
    stream = [prompt for chosen in steps for prompt in chosen]
    for first in range(0, 3 * num_prompts, num_prompts):
        assert sorted(stream[first : first + num_prompts]) == list(range(num_prompts))
    # A resumed run begins at a later step, and may repeat a step.
    for step in reversed(range(num_steps)):
        assert step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step) == steps[step]


def test_step_prompts_have_one_order_for_any_step_size() -> None:
    def stream(prompts_per_step: int) -> list[int]:
        return [
            prompt
            for step in range(60 // prompts_per_step)
            for prompt in step_prompts(7, seed=3, step=step, prompts_per_step=prompts_per_step)
        ]

    assert stream(1) == stream(4) == stream(10) == stream(60)


def test_step_prompts_keep_the_order_of_the_data() -> None:
    steps = [step_prompts(5, seed=3, step=step, prompts_per_step=3, is_shuffled=False) for step in range(4)]
    assert steps == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    fresh = step_prompts(5, seed=3, step=1, prompts_per_step=2, round_number=1, is_shuffled=False)
    assert set(fresh) <= {0, 1, 4}


def test_step_prompts_have_a_new_order_per_pass_and_seed() -> None:
    passes = [step_prompts(50, seed=seed, step=step, prompts_per_step=50) for seed in (0, 1) for step in range(3)]
    assert len({tuple(order) for order in passes}) == 6
    assert list(range(50)) not in passes


# Penalties


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0)]
)
def test_overlong_penalty_worked_out_by_hand(length: int, penalty: float) -> None:
    assert overlong_penalty(length, max_length=100, buffer=20) == pytest.approx(penalty)


# Independence of batch sizes


def test_roll_out_is_independent_of_batch_sizes(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    # Micro-batches: exact. Completions sampled at once: up to rounding, which can move a draw only where its uniform
    # lies within rounding of the border between two tokens; in float64 none does here.
    policy.double()
    expected, _ = run_step(policy, make_setup(tokenizer))

    def outcomes(records: list[RolloutRecord]) -> list[tuple]:
        return [
            (r["prompt_index"], r["completion_ids"], r["finish_reason"], r["reward"]) for r in by_completion(records)
        ]

    for budget in (1, 150):
        records, _ = run_step(policy, make_setup(tokenizer, micro_batch_tokens=budget))
        assert [r["sampler_logprob"] for r in by_completion(records)] == [
            r["sampler_logprob"] for r in by_completion(expected)
        ]
        assert outcomes(records) == outcomes(expected)
    for batch_size in (4, 7, 8, 13):
        records, _ = run_step(policy, make_setup(tokenizer, per_device_generation_batch_size=batch_size))
        assert outcomes(records) == outcomes(expected)
