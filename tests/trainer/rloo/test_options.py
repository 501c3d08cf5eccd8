"""Tests of trainer/rloo/step.py with options that are off by default, against their formulas in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.metrics import RolloutRecord
from tests.helpers.rloo import (
    advantages_by_hand,
    assert_gradients_close,
    exact_copy,
    gradient_from_records,
    gradient_of_terms,
    make_setup,
    perturb,
    reference_of,
    run_step,
    run_updates,
    sequence_logprob,
    sometimes_none,
    with_adapter,
)

# Denominators of the loss


def loss_weights(loss_type: str, records: list[RolloutRecord]) -> Callable[[RolloutRecord], float]:
    """Return a function from a record to the weight of its sum over tokens; `records` are all that are in the loss."""
    num_completions, num_tokens = len(records), sum(len(record["completion_ids"]) for record in records)
    return {
        "sequence_sum": lambda _: 1 / num_completions,
        "sequence_mean": lambda record: 1 / num_completions / len(record["completion_ids"]),
        "token_mean": lambda _: 1 / num_tokens,
    }[loss_type]


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("budget", [1, 150, 10**6])
@pytest.mark.parametrize("loss_type", ["sequence_sum", "sequence_mean", "token_mean"])
def test_take_step_divides_by_the_counts_of_the_whole_step(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_type: str, budget: int, level: str
) -> None:
    setup = make_setup(
        tokenizer,
        sometimes_none,
        loss_type=loss_type,
        micro_batch_tokens=budget,
        importance_sampling_level=level,
    )
    records, gradient = run_step(policy, setup)
    weight = loss_weights(loss_type, [record for record in records if record["reward"] is not None])
    expected = gradient_of_terms(
        policy, setup, records, lambda record, logprobs_T: -record["advantage"] * weight(record) * logprobs_T.sum()
    )
    assert_gradients_close(gradient, {name: value for name, value in expected.items()})


# Truncated and long completions


def is_truncated(record: RolloutRecord) -> bool:
    """Return True for a completion that reached the length limit."""
    return record["finish_reason"] == "length"


def full_reward(record: RolloutRecord) -> float:
    """Return the reward of `by_ids` at its weight of 2, without penalties."""
    return 2 * (sum(record["completion_ids"]) % 7 / 7)


def test_take_step_keeps_truncated_completions_by_default(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    records, gradient = run_step(policy, make_setup(tokenizer))
    assert 3 < sum(map(is_truncated, records)) < 17
    assert [record["reward"] for record in records] == pytest.approx([full_reward(record) for record in records])
    assert list(records[0]["rewards"]) == ["reward"]
    assert_gradients_close(gradient, gradient_from_records(policy, make_setup(tokenizer), records))


def test_take_step_penalizes_truncated_completions(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    setup = make_setup(tokenizer, truncated_completions="penalize", truncation_penalty=0.3)
    records, gradient = run_step(policy, setup)
    assert [record["reward"] for record in records] == pytest.approx(
        [full_reward(record) - 0.3 * is_truncated(record) for record in records]
    )
    assert [record["rewards"]["truncation_penalty"] for record in records] == [
        -0.3 if is_truncated(record) else 0.0 for record in records
    ]
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records), abs=1e-6)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, records))


@pytest.mark.parametrize("loss_type", ["sequence_sum", "token_mean"])
def test_take_step_drops_truncated_completions_from_the_loss(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_type: str
) -> None:
    setup = make_setup(tokenizer, truncated_completions="drop_from_loss", loss_type=loss_type)
    records, gradient = run_step(policy, setup)
    assert [record["reward"] for record in records] == pytest.approx([full_reward(record) for record in records])
    expected = [
        0.0 if is_truncated(record) else advantage
        for record, advantage in zip(records, advantages_by_hand(records), strict=True)
    ]
    assert [record["advantage"] for record in records] == pytest.approx(expected, abs=1e-6)
    weight = loss_weights(loss_type, [record for record in records if not is_truncated(record)])
    term = gradient_of_terms(
        policy, setup, records, lambda record, logprobs_T: -record["advantage"] * weight(record) * logprobs_T.sum()
    )
    assert_gradients_close(gradient, term)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_take_step_drops_truncated_completions_from_the_group(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, beta: float
) -> None:
    setup = make_setup(tokenizer, truncated_completions="drop_from_group", beta=beta)
    reference = reference_of(policy, setup) if beta else None
    perturb(policy)
    records, gradient = run_step(policy, setup, reference)
    assert [record["reward"] is None for record in records] == [is_truncated(record) for record in records]
    assert [record["rewards"]["reward"] for record in records] == pytest.approx(
        [full_reward(record) / 2 for record in records]
    )
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, beta), abs=1e-5)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, records))


def test_take_step_skips_groups_of_truncated_completions(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    for how in ("drop_from_loss", "drop_from_group"):
        setup = make_setup(tokenizer, truncated_completions=how, max_completion_length=1)
        records, gradients = run_updates(policy, setup)
        truncated_indices = [
            prompt_index
            for prompt_index in range(1, 5)
            if all(is_truncated(r) for r in records if r["prompt_index"] == prompt_index)
        ]
        assert len(truncated_indices) > 1
        assert all(record["logprob"] is None for record in records if record["prompt_index"] in truncated_indices)
        assert all(torch.isfinite(value).all() for gradient in gradients for value in gradient.values())


def test_take_step_adds_the_overlong_penalty(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    setup = make_setup(tokenizer, overlong_buffer=4, overlong_penalty=0.5)
    records, gradient = run_step(policy, setup)
    penalties = {length: 0.0 for length in range(1, 5)} | {5: -0.125, 6: -0.25, 7: -0.375, 8: -0.5}
    assert [record["rewards"]["overlong_penalty"] for record in records] == [
        penalties[len(record["completion_ids"])] for record in records
    ]
    assert [record["reward"] for record in records] == pytest.approx(
        [full_reward(record) + record["rewards"]["overlong_penalty"] for record in records]
    )
    assert len({record["rewards"]["overlong_penalty"] for record in records}) > 2
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records), abs=1e-6)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, records))


# The KL in the loss


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("budget", [40, 10**6])
def test_take_step_with_kl_in_the_loss_adds_the_k2_term(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, budget: int, is_lora: bool
) -> None:
    beta = 0.3
    initial = exact_copy(policy)
    trained = with_adapter(policy) if is_lora else policy
    setup = make_setup(tokenizer, sometimes_none, beta=beta, kl_placement="loss", micro_batch_tokens=budget)
    reference = reference_of(trained, setup)
    perturb(trained)
    records, gradient = run_step(trained, setup, reference)
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records), abs=1e-6)
    num_scorable = sum(record["reward"] is not None for record in records)
    kls = []

    def term(record: RolloutRecord, logprobs_T: Tensor) -> Tensor:
        log_ratio = logprobs_T.sum() - sequence_logprob(initial, setup, record).detach()
        kls.append(log_ratio.item())
        penalty = beta / 2 * log_ratio**2 if record["reward"] is not None else 0.0
        return (-record["advantage"] * logprobs_T.sum() + penalty) / num_scorable

    assert_gradients_close(gradient, gradient_of_terms(trained, setup, records, term))
    assert [record["kl"] for record in records] == pytest.approx(kls, abs=1e-4)
    assert max(map(abs, kls)) > 0.1
    assert math.isfinite(sum(kls))
