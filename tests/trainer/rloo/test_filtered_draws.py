"""Draws from the likeliest tokens: scored over the same tokens, and trained as the policy that draws so."""

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
    make_task,
    perturb,
    reference_of,
    run_step,
    token_logprobs,
)


def support(logits_TV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Which tokens can be drawn at each place, [T, V]: of the top k, the fewest whose share of them reaches top p.

    Tokens that are as likely as the last of them, up to 1e-5, stay too.
    """
    is_in = torch.zeros_like(logits_TV, dtype=torch.bool)
    for row, logits in zip(is_in, logits_TV, strict=True):
        order = logits.argsort(descending=True)[:top_k]
        shares = torch.softmax(logits[order], dim=0)
        totals = itertools.accumulate(shares.tolist())
        last = next((token for token, total in zip(order, totals, strict=True) if total >= top_p), order[-1])
        row[logits >= logits[last] - 1e-5] = True
    return is_in


def filtered_logprobs(policy: Policy, task: RunSetup, record: RolloutRecord) -> Tensor:
    """log pi among the tokens that could be drawn, their choice held fixed, with gradient -> [T]."""
    prompt, completion = encode_text(record["prompt"], task.tokenizer), record["completion_ids"]
    logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits = logits[:, : len(task.tokenizer)] / task.config.temperature
    is_in = support(logits.detach(), task.config.top_p, task.config.top_k)
    assert is_in[range(len(completion)), completion].all()
    return logits.masked_fill(~is_in, -torch.inf).log_softmax(dim=1)[range(len(completion)), completion]


@pytest.mark.parametrize("at_once", [3, 2048], ids=["pieces", "whole"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, None), (1.0, 5), (0.8, 20), (1.0, 1), (0.01, None)])
def test_filtered_draws_are_scored_and_trained_alike(
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
    task = make_task(tokenizer, top_p=top_p, top_k=top_k, beta=beta, micro_batch_tokens=150)
    initial = exact_copy(policy)
    reference = reference_of(policy, task) if beta else None
    perturb(policy)
    records, gradient = run_step(policy, task, reference)
    exact = exact_copy(policy)
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, beta), abs=1e-5)
    for record in records:
        logprobs_T = filtered_logprobs(exact, task, record)
        assert record["sampler_logprob"] == pytest.approx(logprobs_T.sum().item(), abs=1e-4)
        assert record["logprob"] is None or record["logprob"] == pytest.approx(logprobs_T.sum().item(), abs=1e-4)
        if beta:  # the reference has all its tokens
            kl = (logprobs_T - token_logprobs(initial, task, record)).sum().item()
            assert record["kl"] == pytest.approx(kl, abs=1e-4)
        if record["advantage"]:
            (-record["advantage"] / 20 * logprobs_T.sum()).backward()
    if is_greedy:  # one token has probability 1 and no gradient
        assert all(torch.count_nonzero(value) == 0 for value in gradient.values())
    else:
        assert_gradients_close(gradient, gradient_of(exact))


def test_draws_from_the_likeliest_tokens_have_their_distribution(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    num_samples = 2000
    task = make_task(tokenizer, top_p=0.9, top_k=8, per_device_generation_batch_size=num_samples)
    prompt = task.prompts[0].ids
    sampler = task.make_sampler(policy)
    sampler.max_completion_length = 1
    [group] = sampler.sample([prompt], [(3,)], num_samples)
    logits = policy(torch.tensor([prompt])).logits[0, -1:, : len(tokenizer)].detach() / task.config.temperature
    is_in = support(logits, 0.9, 8)[0]
    expected = num_samples * torch.softmax(logits[0].masked_fill(~is_in, -torch.inf), dim=0)
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in group]), minlength=len(tokenizer))
    assert counts[~is_in].sum() == 0
    chi_squared = ((counts - expected)[is_in] ** 2 / expected[is_in]).sum().item()
    num_tokens = int(is_in.sum())
    assert 3 <= num_tokens <= 8
    assert chi_squared < num_tokens - 1 + 4 * (2 * (num_tokens - 1)) ** 0.5  # mean and deviation; the draws are seeded


@pytest.mark.parametrize("top_k", [5, 6])
def test_tokens_that_are_equally_likely_are_kept_alike_by_sampler_and_trainer(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, top_k: int
) -> None:
    with torch.no_grad():  # every token has a twin
        policy.lm_head.weight[1::2] = policy.lm_head.weight[::2]
    records, _ = run_step(policy, make_task(tokenizer, top_k=top_k, max_completion_length=20))
    for record in records:
        assert record["logprob"] is None or record["sampler_logprob"] == pytest.approx(record["logprob"], abs=1e-4)
