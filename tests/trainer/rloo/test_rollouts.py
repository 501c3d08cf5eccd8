"""Rollouts of a step: groups without variance are replaced, and nothing depends on batches or processes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.metrics import Clock, RolloutRecord, step_metrics
from rekatrain.trainer.rloo.rollouts import roll_out, step_prompts
from rekatrain.trainer.rloo.setup import RunSetup
from tests.helpers.rloo import (
    assert_gradients_close,
    by_completion,
    gradient_from_records,
    make_task,
    run_step,
)

MANY = [f"human: {number} <sep> assistant:" for number in range(40)]


def for_even_prompts(prompts: Sequence[str], completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    """Every completion of an odd prompt earns the same."""
    numbers = [int(prompt.split()[1]) for prompt in prompts]
    return [sum(ids) % 7 / 7 if n % 2 == 0 else 0.5 for n, ids in zip(numbers, completion_ids, strict=True)]


def dynamic_task(tokenizer: PreTrainedTokenizerFast, rounds: int, **settings: Any) -> RunSetup:
    return make_task(
        tokenizer, for_even_prompts, MANY, prompts_per_step=8, dynamic_sampling_rounds=rounds, beta=0.0, **settings
    )


def is_idle(records: Sequence[RolloutRecord]) -> bool:
    return len({record["reward"] for record in records}) == 1


def groups_of(records: Sequence[RolloutRecord]) -> dict[int, list[RolloutRecord]]:
    return {
        prompt_index: [r for r in records if r["prompt_index"] == prompt_index]
        for prompt_index in sorted({r["prompt_index"] for r in records})
    }


def test_without_rounds_nothing_is_replaced(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    records, _ = run_step(policy, dynamic_task(tokenizer, 0))
    assert list(groups_of(records)) == list(range(8))
    assert 0 < sum(is_idle(group) for group in groups_of(records).values()) < 8


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_groups_without_variance_are_replaced_up_to_the_budget(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rounds: int
) -> None:
    task = dynamic_task(tokenizer, rounds)
    records, gradient = run_step(policy, task)
    groups = groups_of(records)
    last_of_place: dict[int, int] = {}
    for prompt_index, group in groups.items():
        number, place = divmod(prompt_index, 8)
        assert number <= rounds and len(group) == 4
        if number:  # the place's group of the round before taught nothing
            assert last_of_place[place] == prompt_index - 8 and is_idle(groups[prompt_index - 8])
        last_of_place[place] = prompt_index
    for prompt_index in last_of_place.values():
        assert not is_idle(groups[prompt_index]) or prompt_index // 8 == rounds
    trained = [record for prompt_index in last_of_place.values() for record in groups[prompt_index]]
    assert len(trained) == 8 * 4 < len(records)

    # The loss is that of the groups that came out last, and they are its denominator.
    assert all(record["advantage"] == 0 for record in records if record not in trained)
    assert_gradients_close(gradient, gradient_from_records(policy, task, trained))
    prompts = [group[0]["prompt"] for group in groups.values()]
    assert len(set(prompts)) == len(prompts)
    assert step_metrics(records)["frac_reward_zero_std"] == sum(map(is_idle, groups.values())) / len(groups)


def test_a_replacement_depends_on_its_own_slot_alone(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    # In float64, so that no draw hangs on rounding: the batches differ.
    task = dynamic_task(tokenizer, 2)
    sampler = task.make_sampler(policy.double())

    def rolled_out(prompt_indices: Sequence[int]) -> dict[int, list[list[int]]]:
        kept, replaced = roll_out(sampler, replace(task, seed=5), prompt_indices, 0, Clock().lap)
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


def test_penalties_are_part_of_the_rewards_that_have_variance(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def constant(completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
        return [1.0] * len(completion_ids)

    task = make_task(tokenizer, constant, overlong_buffer=7, dynamic_sampling_rounds=1)
    records, gradient = run_step(policy, task)
    # Brevity is learned from a group whose completions are all right.
    groups = groups_of(records)
    assert sum(not is_idle(group) for group in groups.values()) >= 4
    assert all(prompt_index < 5 or is_idle(groups[prompt_index - 5]) for prompt_index in groups)
    trained = [r for r in records if r["prompt_index"] >= 5 or r["prompt_index"] + 5 not in groups]
    assert_gradients_close(gradient, gradient_from_records(policy, task, trained))


@given(
    num_prompts=st.integers(1, 40), prompts_per_step=st.integers(1, 10), seed=st.integers(0, 99), step=st.integers(0, 9)
)
def test_rounds_draw_fresh_prompts_as_long_as_there_are_any(
    num_prompts: int, prompts_per_step: int, seed: int, step: int
) -> None:
    def chosen(number: int) -> list[int]:
        return step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step, round_number=number)

    first = chosen(0)
    assert first == step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step)
    num_fresh = num_prompts - len(set(first))
    later = [place for number in range(1, 5) for place in chosen(number)]
    assert set(later) <= set(range(num_prompts))
    assert len(chosen(3)) == prompts_per_step
    if num_fresh:
        assert not set(later) & set(first)
        assert len(set(later[:num_fresh])) == min(num_fresh, len(later))


# What rollouts do not depend on


def test_rollouts_depend_neither_on_micro_batches_nor_on_how_many_are_sampled_at_once(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Micro-batches: exact. Rows sampled at once: up to rounding, which can move a draw only where its uniform lies
    # within rounding of the border between two tokens; in float64 none does here.
    policy.double()
    expected, _ = run_step(policy, make_task(tokenizer))
    by_place = [
        (r["prompt_index"], r["completion_ids"], r["finish_reason"], r["reward"]) for r in by_completion(expected)
    ]
    for budget in (1, 150):
        records, _ = run_step(policy, make_task(tokenizer, micro_batch_tokens=budget))
        assert [r["sampler_logprob"] for r in by_completion(records)] == [
            r["sampler_logprob"] for r in by_completion(expected)
        ]
        assert [
            (r["prompt_index"], r["completion_ids"], r["finish_reason"], r["reward"]) for r in by_completion(records)
        ] == by_place
    for batch_size in (4, 7, 8, 13):
        records, _ = run_step(policy, make_task(tokenizer, per_device_generation_batch_size=batch_size))
        assert [
            (r["prompt_index"], r["completion_ids"], r["finish_reason"], r["reward"]) for r in by_completion(records)
        ] == by_place
