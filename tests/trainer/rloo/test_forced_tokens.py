"""Tests of trainer/rloo/step.py with forced tokens: tokens that the policy did not draw are in no term of a step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.metrics import step_metrics
from rekatrain.trainer.rloo.rollouts import GroupSampler
from rekatrain.trainer.rloo.sampler.in_process import Completion
from tests.helpers.rloo import (
    RecordingSampler,
    advantages_by_hand,
    assert_gradients_close,
    by_ids,
    exact_copy,
    gradient_of,
    make_setup,
    perturb,
    reference_of,
    run_step,
    run_updates,
    token_logprobs,
)


class ForcingSampler:
    """Sampler that marks some tokens of every second completion as forced."""

    def __init__(self, sampler: GroupSampler) -> None:
        self._sampler = sampler

    def sample(
        self, prompts: Sequence[list[int]], keys: Sequence[tuple[int, ...]], num_generations: int, *_: object
    ) -> list[list[Completion]]:
        """Sample with the other sampler, then mark."""
        groups = self._sampler.sample(prompts, keys, num_generations)
        return [[self._forced(completion, number) for number, completion in enumerate(group)] for group in groups]

    def _forced(self, completion: Completion, number: int) -> Completion:
        if number % 2 or len(completion.ids) < 4:
            return completion
        forced = range(1, min(4, len(completion.ids)))
        logprobs = [0.0 if index in forced else value for index, value in enumerate(completion.logprobs)]
        return replace(completion, forced=forced, logprobs=logprobs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.3},
        {"loss_type": "token_mean"},
        {"loss_type": "sequence_mean", "importance_sampling_level": "token"},
        {"importance_sampling_level": "token", "importance_sampling_correction": "token_truncate"},
        {"importance_sampling_correction": "sequence_truncate"},
        {"beta": 0.3, "kl_placement": "loss"},
    ],
    ids=["default", "kl", "token mean", "sequence mean", "token weights", "sequence weights", "k2"],
)
def test_take_step_has_forced_tokens_in_no_term(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> None:
    setup = make_setup(tokenizer, micro_batch_tokens=150, **options)
    config = setup.config
    initial = exact_copy(policy)
    reference = reference_of(policy, setup) if config.beta else None
    perturb(policy)
    sampler = RecordingSampler(ForcingSampler(setup.make_sampler(policy)))
    records, gradient = run_step(policy, setup, reference, sampler)
    assert 0 < sum(record["num_forced"] > 0 for record in records) < 20

    exact = exact_copy(policy)
    num_drawn = {id(r): len(r["completion_ids"]) - r["num_forced"] for r in records}
    weights = {
        "sequence_sum": lambda record: 1 / 20,
        "sequence_mean": lambda record: 1 / 20 / num_drawn[id(record)],
        "token_mean": lambda record: 1 / sum(num_drawn.values()),
    }[config.loss_type]
    in_reward = config.beta if config.kl_placement == "reward" else 0.0
    assert [r["advantage"] for r in records] == pytest.approx(advantages_by_hand(records, in_reward), abs=1e-5)
    for record in records:
        forced = sampler.completion(setup, record).forced
        loss_mask = torch.tensor([index not in forced for index in range(len(record["completion_ids"]))])
        logprobs_T = token_logprobs(exact, setup, record)[loss_mask]
        assert record["logprob"] == pytest.approx(logprobs_T.sum().item(), abs=1e-4)
        assert record["sampler_logprob"] == pytest.approx(record["logprob"], abs=1e-4)
        assert record["mismatch_kl"] == pytest.approx(0, abs=1e-8)
        loss = -record["advantage"] * weights(record) * logprobs_T.sum()
        if config.beta:
            log_ratio = logprobs_T.sum() - token_logprobs(initial, setup, record).detach()[loss_mask].sum()
            assert record["kl"] == pytest.approx(log_ratio.item(), abs=1e-4)
            loss = loss + (config.beta / 2 * log_ratio**2 / 20 if config.kl_placement == "loss" else 0.0)
        loss.backward()
    assert_gradients_close(gradient, gradient_of(exact))
    assert step_metrics(records)["completions/forced_ratio"] == sum(r["num_forced"] > 0 for r in records) / 20


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_take_step_has_forced_tokens_in_no_ratio(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, level: str
) -> None:
    # The clip range is so wide that nothing is clipped.
    setup = make_setup(tokenizer, by_ids, num_iterations=2, importance_sampling_level=level, epsilon=0.9)
    sampler = RecordingSampler(ForcingSampler(setup.make_sampler(policy)))
    policies = [exact_copy(policy)]

    def change() -> None:
        perturb(policy, scale=0.005)
        policies.append(exact_copy(policy))

    records, gradients = run_updates(policy, setup, None, sampler, change=change)
    before, updated, _ = policies
    for record in records:
        forced = sampler.completion(setup, record).forced
        loss_mask = torch.tensor([index not in forced for index in range(len(record["completion_ids"]))])
        new, old = (token_logprobs(each, setup, record)[loss_mask] for each in (updated, before))
        log_ratios = new - old.detach()
        ratios = log_ratios.exp().sum() if level == "token" else log_ratios.sum().exp()
        (-record["advantage"] / 20 * ratios).backward()
    assert step_metrics(records)["clip_ratio"] == 0
    assert_gradients_close(gradients[1], gradient_of(updated))
