"""Tests of trainer/rloo/step.py with top_p and top_k: the loss uses the filtered distribution of the sampler."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text
from rekatrain.trainer.rloo.metrics import RolloutRecord
from rekatrain.trainer.rloo.setup import RunSetup
from tests.helpers.rloo import (
    Policy,
    advantages_by_hand,
    assert_gradients_close,
    exact_copy,
    gradient_of,
    make_setup,
    perturb,
    reference_of,
    run_step,
    run_updates,
    token_logprobs,
)


def kept_tokens(logits_TV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Mark the kept tokens of each distribution -> [T, V]: among the top k, the fewest whose sum reaches top p.

    Tokens that are as likely as the last kept token, up to 1e-5, are kept too.
    """
    is_kept_TV = torch.zeros_like(logits_TV, dtype=torch.bool)
    for is_kept, logits in zip(is_kept_TV, logits_TV, strict=True):
        order = logits.argsort(descending=True)[:top_k]
        probabilities = torch.softmax(logits[order], dim=0)
        totals = itertools.accumulate(probabilities.tolist())
        last = next((token for token, total in zip(order, totals, strict=True) if total >= top_p), order[-1])
        is_kept[logits >= logits[last] - 1e-5] = True
    return is_kept_TV


def filtered_logprobs(policy: Policy, setup: RunSetup, record: RolloutRecord) -> Tensor:
    """Compute log pi over the kept tokens, with their set held fixed, with gradient -> [T]."""
    prompt, completion = encode_text(record["prompt"], setup.tokenizer), record["completion_ids"]
    logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits = logits[:, : len(setup.tokenizer)] / setup.config.temperature
    is_kept = kept_tokens(logits.detach(), setup.config.top_p, setup.config.top_k)
    assert is_kept[range(len(completion)), completion].all()
    return logits.masked_fill(~is_kept, -torch.inf).log_softmax(dim=1)[range(len(completion)), completion]


@pytest.mark.parametrize("at_once", [3, 2048], ids=["chunks", "whole"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, None), (1.0, 5), (0.8, 20), (1.0, 1), (0.01, None)])
def test_take_step_trains_the_filtered_policy(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    top_p: float,
    top_k: int | None,
    beta: float,
    at_once: int,
) -> None:
    monkeypatch.setattr("rekatrain.trainer.rloo.logprobs.TOKENS_PER_CHUNK", at_once)
    if at_once == 3:
        policy.activation_checkpointing_enable()
    is_greedy = top_k == 1 or top_p == 0.01
    setup = make_setup(tokenizer, top_p=top_p, top_k=top_k, beta=beta, micro_batch_tokens=150)
    initial = exact_copy(policy)
    reference = reference_of(policy, setup) if beta else None
    perturb(policy)
    records, gradients = run_updates(policy, setup, reference)
    exact = exact_copy(policy)
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, beta), abs=1e-5)
    for record in records:
        logprobs_T = filtered_logprobs(exact, setup, record)
        assert record["sampler_logprob"] == pytest.approx(logprobs_T.sum().item(), abs=1e-4)
        assert record["logprob"] is None or record["logprob"] == pytest.approx(logprobs_T.sum().item(), abs=1e-4)
        if beta:  # the reference is not filtered
            kl = (logprobs_T - token_logprobs(initial, setup, record)).sum().item()
            assert record["kl"] == pytest.approx(kl, abs=1e-4)
        if record["advantage"]:
            (-record["advantage"] / 20 * logprobs_T.sum()).backward()
    if is_greedy:  # one token has probability 1 and no gradient; without a KL the equal rewards make no update at all
        assert len(gradients) == (beta > 0)
        assert all(torch.count_nonzero(value) == 0 for gradient in gradients for value in gradient.values())
    else:
        assert_gradients_close(gradients[0], gradient_of(exact))


def test_sampler_with_filters_follows_their_distribution(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    num_samples = 2000
    setup = make_setup(tokenizer, top_p=0.9, top_k=8, per_device_generation_batch_size=num_samples)
    prompt = setup.prompts[0].ids
    sampler = setup.make_sampler(policy)
    sampler.max_completion_length = 1
    [group] = sampler.sample([prompt], [(3,)], num_samples)
    logits = policy(torch.tensor([prompt])).logits[0, -1:, : len(tokenizer)].detach() / setup.config.temperature
    is_kept = kept_tokens(logits, 0.9, 8)[0]
    expected = num_samples * torch.softmax(logits[0].masked_fill(~is_kept, -torch.inf), dim=0)
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in group]), minlength=len(tokenizer))
    assert counts[~is_kept].sum() == 0
    chi_squared = ((counts - expected)[is_kept] ** 2 / expected[is_kept]).sum().item()
    num_tokens = int(is_kept.sum())
    assert 3 <= num_tokens <= 8
    assert chi_squared < num_tokens - 1 + 4 * (2 * (num_tokens - 1)) ** 0.5  # mean + 4 deviations; the draws are seeded


@pytest.mark.parametrize("top_k", [5, 6])
def test_take_step_keeps_ties_as_the_sampler_does(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, top_k: int
) -> None:
    with torch.no_grad():  # every token has a twin
        policy.lm_head.weight[1::2] = policy.lm_head.weight[::2]
    records, _ = run_step(policy, make_setup(tokenizer, top_k=top_k, max_completion_length=20))
    for record in records:
        assert record["logprob"] is None or record["sampler_logprob"] == pytest.approx(record["logprob"], abs=1e-4)
