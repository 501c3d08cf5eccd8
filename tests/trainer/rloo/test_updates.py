"""Tests of trainer/rloo/step.py with several updates per batch, clipped ratios, and importance weights."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.loss import clipped_surrogates
from rekatrain.trainer.rloo.metrics import RolloutRecord, step_metrics
from rekatrain.trainer.rloo.setup import RunSetup
from tests.helpers.rloo import (
    Policy,
    RecordingSampler,
    advantages_by_hand,
    assert_gradients_close,
    exact_copy,
    gradient_of_terms,
    make_setup,
    perturb,
    reference_of,
    run_step,
    run_updates,
    sometimes_none,
    token_logprobs,
    with_adapter,
)

LEVELS = ["sequence", "token"]
EPSILON = 0.05


@pytest.fixture
def log_ratios(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Log-ratios of each loss that is computed after this fixture."""
    seen: list[Tensor] = []

    def recorded(log_ratios_T: Tensor, *arguments: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        seen.append(log_ratios_T.detach())
        return clipped_surrogates(log_ratios_T, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("rekatrain.trainer.rloo.loss.clipped_surrogates", recorded)
    return seen


@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("budget", [40, 150, 10**6])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", LEVELS)
def test_take_step_at_learning_rate_zero_has_ratios_of_one(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    log_ratios: list[Tensor],
    level: str,
    beta: float,
    budget: int,
    is_checkpointing: bool,
) -> None:
    options = {"importance_sampling_level": level, "beta": beta, "micro_batch_tokens": budget}
    once = make_setup(tokenizer, **options)
    thrice = make_setup(tokenizer, num_iterations=3, epsilon=1e-9, **options)
    if is_checkpointing:
        policy.activation_checkpointing_enable()
    reference = reference_of(policy, once) if beta else None
    perturb(policy)
    _, expected = run_step(policy, once, reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    log_ratios.clear()
    records, gradients = run_updates(policy, thrice, reference, change=optimizer.step)

    assert len(gradients) == 3
    assert len(log_ratios) % 3 == 0 and (len(log_ratios) > 15) == (budget == 40)
    assert all(torch.count_nonzero(ratios_T) == 0 for ratios_T in log_ratios)
    assert [record["clip_ratio"] for record in records] == [0.0] * 20
    for gradient in gradients:
        assert all(torch.equal(gradient[name], value) for name, value in expected.items())


def clipped_by_hand(log_ratio: Tensor, advantage: float) -> tuple[Tensor, bool]:
    """Return the surrogate of one ratio, and True where the clip decides it."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    is_clipped = bool(ratio * advantage > clipped * advantage)
    return (clipped if is_clipped else ratio) * advantage, is_clipped


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", LEVELS)
def test_take_step_updates_by_the_clipped_objective(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, level: str, beta: float, is_lora: bool
) -> None:
    trained = with_adapter(policy) if is_lora else policy
    setup = make_setup(
        tokenizer,
        sometimes_none,
        num_iterations=3,
        importance_sampling_level=level,
        epsilon=EPSILON,
        beta=beta,
        micro_batch_tokens=150,
    )
    reference = reference_of(trained, setup) if beta else None
    perturb(trained)
    seeds = itertools.count(10)
    policies = [exact_copy(trained)]

    def change() -> None:
        perturb(trained, scale=0.01, seed=next(seeds))
        policies.append(exact_copy(trained))

    records, gradients = run_updates(trained, setup, reference, change=change)
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, beta), abs=1e-5)
    num_scorable = sum(record["reward"] is not None for record in records)
    old = {id(record): token_logprobs(policies[0], setup, record).detach() for record in records}

    for updated, gradient in zip(policies, gradients, strict=False):
        clip_ratios: list[float] = []

        def term(record: RolloutRecord, logprobs_T: Tensor, clip_ratios: list[float] = clip_ratios) -> Tensor:
            log_ratios_T = logprobs_T - old[id(record)]
            ratios = log_ratios_T if level == "token" else log_ratios_T.sum()[None]
            terms = [clipped_by_hand(ratio, record["advantage"]) for ratio in ratios]
            clip_ratios.append(sum(is_clipped for _, is_clipped in terms) / len(terms))
            return -sum(surrogate for surrogate, _ in terms) / num_scorable

        expected = gradient_of_terms(updated, setup, records, term)
        assert_gradients_close(gradient, expected)
    # The records have the ratios of the last update.
    is_trained = [record["logprob"] is not None for record in records]
    assert all(trained or record["advantage"] == 0 for record, trained in zip(records, is_trained, strict=True))
    of_trained = [ratio for ratio, trained in zip(clip_ratios, is_trained, strict=True) if trained]
    assert [record["clip_ratio"] for record in records if record["clip_ratio"] is not None] == pytest.approx(of_trained)
    assert 0.1 < step_metrics(records)["clip_ratio"] < 0.9


def test_take_step_makes_one_unclipped_update_by_default(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    setup = make_setup(tokenizer, epsilon=1e-6)
    records, gradients = run_updates(policy, setup, change=lambda: perturb(policy))
    assert len(gradients) == 1
    assert step_metrics(records)["clip_ratio"] == 0


# Importance weights


def mismatch(policy: Policy, setup: RunSetup, sampler: RecordingSampler, record: RolloutRecord) -> Tensor:
    """Return log pi - log sampler of each token -> [T]."""
    recorded = torch.tensor(sampler.completion(setup, record).logprobs, dtype=torch.float64)
    return token_logprobs(exact_copy(policy), setup, record).detach() - recorded


@pytest.mark.parametrize(
    ("level", "correction"),
    [
        *(("token", name) for name in ("token_truncate", "sequence_truncate", "token_mask", "sequence_mask")),
        *(("sequence", name) for name in ("sequence_truncate", "sequence_mask")),
    ],
)
@pytest.mark.parametrize("cap", [1.1, 2.0])
def test_take_step_corrects_for_a_sampler_that_differs(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, level: str, correction: str, cap: float
) -> None:
    setup = make_setup(
        tokenizer,
        importance_sampling_level=level,
        importance_sampling_correction=correction,
        importance_sampling_cap=cap,
        micro_batch_tokens=150,
    )
    sampler = RecordingSampler(setup.make_sampler(policy), noise=0.5)
    records, gradient = run_step(policy, setup, sampler=sampler)
    weights = []

    def term(record: RolloutRecord, logprobs_T: Tensor) -> Tensor:
        log_ratios_T = mismatch(policy, setup, sampler, record)
        log_ratios = log_ratios_T if correction.startswith("token") else log_ratios_T.sum()
        ratios = log_ratios.exp()
        weights.append(ratios.clamp(max=cap) if correction.endswith("truncate") else ratios * (ratios <= cap))
        return -(weights[-1] * record["advantage"] * logprobs_T).sum() / 20

    assert_gradients_close(gradient, gradient_of_terms(policy, setup, records, term))
    all_weights = torch.cat([weight.flatten() for weight in weights])
    assert all_weights.min() < 0.8 and (all_weights.max() == cap) == correction.endswith("truncate")
    assert (all_weights.min() == 0) == correction.endswith("mask")
    metrics = step_metrics(records)
    assert metrics["importance/mean_weight"] == pytest.approx(all_weights.mean().item(), rel=1e-4)
    expected = all_weights.sum() ** 2 / (len(all_weights) * all_weights.square().sum())
    assert metrics["importance/effective_sample_size"] == pytest.approx(expected.item(), rel=1e-4)


def test_take_step_without_correction_only_logs_the_mismatch(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    setup = make_setup(tokenizer)
    plain_records, plain = run_step(policy, setup)
    sampler = RecordingSampler(setup.make_sampler(policy), noise=0.3)
    records, gradient = run_step(policy, setup, sampler=sampler)
    assert all(torch.equal(gradient[name], value) for name, value in plain.items())
    assert step_metrics(plain_records)["mismatch_kl"] == pytest.approx(0, abs=1e-9)

    log_ratios = [mismatch(policy, setup, sampler, record) for record in records]
    by_token = torch.cat(log_ratios)
    metrics = step_metrics(records)
    assert metrics["mismatch_kl"] == pytest.approx((by_token.exp() - 1 - by_token).mean().item(), rel=1e-3)
    assert metrics["mismatch_logprob"] == pytest.approx(
        torch.stack([log_ratio.sum().abs() for log_ratio in log_ratios]).mean().item(), rel=1e-3
    )
    assert metrics["mismatch_kl"] > 0.01


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_truncate"])
def test_take_step_weights_an_equal_sampler_with_one(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, correction: str
) -> None:
    options = {"importance_sampling_level": "token", "importance_sampling_correction": correction}
    _, expected = run_step(policy, make_setup(tokenizer))
    _, gradient = run_step(policy, make_setup(tokenizer, **options))
    assert_gradients_close(gradient, expected, rtol=1e-5)
