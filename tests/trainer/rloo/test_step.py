"""Tests of trainer/rloo/step.py: the gradient of a step follows from its records, whatever the micro-batches."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.group import Group
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, PackedCompletions, make_reference
from rekatrain.trainer.rloo.metrics import Clock
from rekatrain.trainer.rloo.step import Run, take_step
from tests.helpers.rloo import (
    TEXTS,
    advantages_by_hand,
    assert_gradients_close,
    by_completion,
    distance,
    for_some_prompts,
    gradient_from_records,
    gradient_of,
    make_model,
    make_setup,
    never,
    perturb,
    reference_of,
    run_step,
    run_updates,
    sequence_logprob,
    sometimes_none,
    with_adapter,
)


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_take_step_has_the_gradient_of_its_records(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, is_lora: bool
) -> None:
    trained = with_adapter(policy) if is_lora else policy
    perturb(trained)
    setup = make_setup(tokenizer)
    records, gradient = run_step(trained, setup)
    assert_gradients_close(gradient, gradient_from_records(trained, setup, records))

    assert [record["prompt_index"] for record in by_completion(records)] == [
        prompt_index for prompt_index in range(5) for _ in range(4)
    ]
    assert {record["prompt"] for record in records} == set(TEXTS)
    assert len({len(record["completion_ids"]) for record in records}) > 1
    assert [record["reward"] for record in records] == [
        pytest.approx(2 * (sum(record["completion_ids"]) % 7 / 7)) for record in records
    ]
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, 0), abs=1e-6)
    for record in records:
        expected = sequence_logprob(trained, setup, record).item()
        assert record["sampler_logprob"] == pytest.approx(expected, abs=1e-4)
        assert record["kl"] is None
        assert record["logprob"] is None or record["logprob"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_take_step_has_the_kl_in_reward_and_baseline(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, is_lora: bool, is_checkpointing: bool
) -> None:
    beta = 0.3
    setup = make_setup(tokenizer, beta=beta, micro_batch_tokens=300)
    initial = copy.deepcopy(policy)
    trained = with_adapter(policy) if is_lora else policy
    if is_checkpointing:
        trained.activation_checkpointing_enable()
    reference = reference_of(trained, setup)
    perturb(trained)
    records, gradient = run_step(trained, setup, reference)

    kls = [record["kl"] for record in records]
    expected_kls = [
        (sequence_logprob(trained, setup, record) - sequence_logprob(initial, setup, record)).item()
        for record in records
    ]
    assert kls == pytest.approx(expected_kls, abs=1e-4)
    assert max(map(abs, kls)) > 0.1
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, beta), abs=1e-5)
    assert_gradients_close(gradient, gradient_from_records(trained, setup, records))


@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_take_step_has_a_kl_of_zero_before_the_first_update(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, is_lora: bool, is_checkpointing: bool
) -> None:
    trained = with_adapter(policy) if is_lora else policy
    if is_checkpointing:
        trained.activation_checkpointing_enable()
    setup = make_setup(tokenizer, beta=0.3)
    records, _ = run_step(trained, setup, reference_of(trained, setup))
    assert [record["kl"] for record in records] == [0.0] * 20
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, 0), abs=1e-6)


@pytest.fixture
def bf16_accelerator() -> Iterator[Accelerator]:
    """Accelerator with bfloat16 autocast."""
    AcceleratorState._reset_state(True)  # Accelerate allows one precision per process
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("is_sampler_bf16", [False, True], ids=["float32 sampler", "bfloat16 sampler"])
@pytest.mark.parametrize("budget", [100, 10**6])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_take_step_works_in_bfloat16_arithmetic(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    bf16_accelerator: Accelerator,
    is_lora: bool,
    budget: int,
    is_sampler_bf16: bool,
) -> None:
    trained = with_adapter(policy) if is_lora else policy
    setup = make_setup(tokenizer, beta=0.3, micro_batch_tokens=budget, bf16=is_sampler_bf16)
    model = make_model(trained, setup)
    reference = make_reference(bf16_accelerator, model, setup.config)
    model = bf16_accelerator.prepare(model)
    sampler = setup.make_sampler(trained)
    run = Run.in_process(bf16_accelerator, model, replace(setup, seed=5), sampler, lambda: None, reference)
    records = take_step(run, 0, Clock())
    assert [record["kl"] for record in records] == [0.0] * 20
    # Training was in bfloat16: its rounded log-probabilities differ from those of the sampler in any arithmetic.
    assert 1e-3 < max(abs(record["sampler_logprob"] - record["logprob"]) for record in records) < 0.5
    gradient = gradient_of(trained)
    assert {value.dtype for value in gradient.values()} == {torch.float32}
    expected = gradient_from_records(trained, setup, records)
    assert distance(gradient, expected) < 0.05


def test_take_step_samples_in_bfloat16_and_trains_in_float32(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    setup = make_setup(tokenizer, rollout_dtype="bfloat16", importance_sampling_correction="sequence_truncate")
    records, _ = run_step(policy, setup, None)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    for record in records:
        if record["logprob"] is not None:
            exact = sequence_logprob(policy, setup, record).item()
            assert record["logprob"] == pytest.approx(exact, abs=1e-4)
    trained = [record for record in records if record["mismatch_kl"] is not None]
    assert 1e-3 < max(abs(record["sampler_logprob"] - record["logprob"]) for record in trained) < 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = [sequence_logprob(policy, setup, record).item() for record in trained]
    assert [record["sampler_logprob"] for record in trained] == pytest.approx(rounded, abs=0.2)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_take_step_is_equal_with_micro_batches_of_any_size(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, beta: float
) -> None:
    policy.double()
    steps = []
    for budget in (1, 150, 400, 10**6):
        trained = copy.deepcopy(policy)
        setup = make_setup(tokenizer, sometimes_none, beta=beta, micro_batch_tokens=budget)
        reference = reference_of(trained, setup) if beta else None
        perturb(trained)
        records, gradient = run_step(trained, setup, reference)
        steps.append((by_completion(records), gradient))
    (expected_records, expected), *others = steps
    for records, gradient in others:
        assert [r["completion_ids"] for r in records] == [r["completion_ids"] for r in expected_records]
        assert [r["advantage"] for r in records] == pytest.approx([r["advantage"] for r in expected_records], abs=1e-5)
        assert_gradients_close(gradient, expected)


def test_take_step_excludes_unscorable_completions(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    setup = make_setup(tokenizer, sometimes_none)
    records, gradient = run_step(policy, setup)
    unscorable = [record for record in records if record["reward"] is None]
    assert 0 < len(unscorable) < len(records)
    assert all(record["advantage"] == 0 for record in unscorable)
    assert all((record["rewards"]["reward"] is None) == (record["reward"] is None) for record in records)
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, 0), abs=1e-6)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, records))


def test_take_step_excludes_unscorable_completions_from_the_kl(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    setup = make_setup(tokenizer, sometimes_none, beta=0.3)
    reference = reference_of(policy, setup)
    perturb(policy)
    records, gradient = run_step(policy, setup, reference)
    assert any(record["reward"] is None for record in records)
    assert all(record["advantage"] == 0 for record in records if record["reward"] is None)
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, 0.3), abs=1e-5)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, records))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_take_step_without_scores_makes_no_update(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, beta: float
) -> None:
    setup = make_setup(tokenizer, never, beta=beta)
    records, gradients = run_updates(policy, setup, reference_of(policy, setup) if beta else None)
    assert [record["advantage"] for record in records] == [0.0] * 20
    assert gradients == []


def count_scored_completions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each later forward pass, of policy or reference, adds its number of completions."""
    counts: list[int] = []
    forward = CompletionLogprobs.forward

    def counting(self: CompletionLogprobs, packed: PackedCompletions) -> Tensor:
        counts.append(len(packed.lengths))
        return forward(self, packed)

    monkeypatch.setattr(CompletionLogprobs, "forward", counting)
    return counts


@pytest.mark.parametrize("reward", [for_some_prompts, lambda prompts, **_: [0.7] * len(prompts)], ids=["some", "all"])
def test_take_step_skips_idle_groups_without_effect(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    reward: Callable[..., list[float | None]],
) -> None:
    counts = count_scored_completions(monkeypatch)
    setup = make_setup(tokenizer, reward)
    records, gradients = run_updates(policy, setup)
    monkeypatch.setattr(Group, "is_idle", False)
    all_records, expected = run_step(policy, setup)
    is_idle_group = [len({r["reward"] for r in records if r["prompt_index"] == index}) == 1 for index in range(5)]
    idle_indices = {index for index in range(5) if is_idle_group[index]}
    assert len(idle_indices) >= 2
    assert counts == [*([(5 - len(idle_indices)) * 4] if gradients else []), 5 * 4]
    assert len(gradients) == (not all(is_idle_group))
    for name, value in expected.items():
        actual = gradients[0][name] if gradients else torch.zeros_like(value)
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-5)

    for record, other in zip(by_completion(records), by_completion(all_records), strict=True):
        is_idle = record["prompt_index"] in idle_indices
        assert (record["logprob"] is None) == is_idle
        assert other["advantage"] == pytest.approx(record["advantage"], abs=1e-6)
        unlike = {"logprob": None, "advantage": None, "mismatch_kl": None, "clip_ratio": None}
        assert record | unlike == other | unlike


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_take_step_scores_split_groups_in_an_earlier_pass(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    setups = [make_setup(tokenizer, beta=beta, micro_batch_tokens=budget) for budget in (10**6, 20)]
    reference = reference_of(policy, setups[0]) if beta else None
    perturb(policy)
    counts = count_scored_completions(monkeypatch)
    single_records, single = run_step(policy, setups[0], reference)
    # One pass over each completion, and one of the reference where there is one.
    assert sum(counts) == (40 if beta else 20)
    counts.clear()
    records, gradient = run_step(policy, setups[1], reference)
    # The KL of groups that no micro-batch holds whole needs one more pass before the training pass.
    assert sum(counts) == (60 if beta else 20)
    for record, other in zip(by_completion(records), by_completion(single_records), strict=True):
        assert record["completion_ids"] == other["completion_ids"]
        assert record["advantage"] == pytest.approx(other["advantage"], abs=1e-5)
    assert_gradients_close(gradient, single)


def test_take_step_with_a_kl_penalty_skips_no_group(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(tokenizer, for_some_prompts, beta=0.3)
    reference = reference_of(policy, setup)
    perturb(policy)
    counts = count_scored_completions(monkeypatch)
    records, gradient = run_step(policy, setup, reference)
    assert counts == [20, 20]  # the reference and the policy
    assert all(record["advantage"] != 0 for record in records)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, records))


def test_take_step_samples_anew_for_each_step_and_seed(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    setup = make_setup(tokenizer)

    def sampled(seed: int, step: int) -> list[tuple[str | int, ...]]:
        records, _ = run_updates(policy, setup, seed=seed, step=step)
        assert {record["step"] for record in records} == {step + 1}
        return [(record["prompt"], *record["completion_ids"]) for record in records]

    assert sampled(5, 0) == sampled(5, 0)
    assert len({tuple(sampled(seed, step)) for seed, step in [(5, 0), (5, 1), (6, 0)]}) == 3
