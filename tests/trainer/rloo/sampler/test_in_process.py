"""The sampler draws exactly from the policy's distribution and records the log-probs that it drew with."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.chat import FinishReason, encode_text
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions
from rekatrain.trainer.rloo.sampler.in_process import Completion, Sampler

CPU = torch.device("cpu")

TEXTS = ["human: What is 2+2? <sep> assistant:", "human: 17 + 25 = <sep> assistant:", "Be brief.", "a"]
KEYS = [(3, 0, prompt_index) for prompt_index in range(len(TEXTS))]


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [encode_text(text, tokenizer) for text in TEXTS]


@pytest.fixture
def policy(ending_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A policy in float64, so that no draw depends on rounding."""
    return ending_model.double()


def make_sampler(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    max_completion_length: int = 12,
    temperature: float = 0.8,
    batch_size: int = 64,
) -> Sampler:
    return Sampler(
        model,
        tokenizer,
        max_completion_length=max_completion_length,
        temperature=temperature,
        batch_size=batch_size,
    )


def ids_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in groups]


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_sampler_records_the_logprobs_that_training_scores(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], is_lora: bool
) -> None:
    if is_lora:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        policy = get_peft_model(policy, config).double()
    groups = make_sampler(policy, tokenizer, temperature=0.7).sample(prompts, KEYS, 5)
    recorded = [logprob for group in groups for completion in group for logprob in completion.logprobs]
    scored = CompletionLogprobs(policy, temperature=0.7, num_tokens=len(tokenizer))
    logprobs_T = scored(pack_completions(prompts, ids_of(groups), CPU))
    torch.testing.assert_close(torch.tensor(recorded), logprobs_T.detach(), rtol=0, atol=1e-5)
    assert len({len(completion.ids) for group in groups for completion in group}) > 2


def test_completion_is_independent_of_its_batch(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    together = make_sampler(policy, tokenizer).sample(prompts, KEYS, 3)
    assert {completion.finish_reason for group in together for completion in group} == {
        FinishReason.EOS,
        FinishReason.LENGTH,
    }
    assert len({tuple(completion.ids) for group in together for completion in group}) > 6

    for batch_size in (3, 5, 6, 12):
        again = make_sampler(policy, tokenizer, batch_size=batch_size).sample(prompts, KEYS, 3)
        assert ids_of(again) == ids_of(together)
    alone = [
        make_sampler(policy, tokenizer).sample([prompt], [key], 3)[0] for prompt, key in zip(prompts, KEYS, strict=True)
    ]
    assert ids_of(alone) == ids_of(together)
    for one, other in zip(sum(alone, []), sum(together, []), strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    backwards = make_sampler(policy, tokenizer).sample(prompts[::-1], KEYS[::-1], 3)
    assert ids_of(backwards[::-1]) == ids_of(together)


def test_sampler_draws_other_completions_for_other_keys(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    sampler = make_sampler(policy, tokenizer)
    keys = [(3, 0, 0), (3, 0, 1), (3, 1, 0), (4, 0, 0)]
    groups = ids_of(sampler.sample([prompts[0]] * 4, keys, 4))
    assert len({tuple(ids) for group in groups for ids in group}) > 12


def test_sampler_draws_a_group_as_in_separate_calls(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    # numpy pads a short seed with zeros, so number 0 of key (7, n) draws with the uniforms of number n of key (7,).
    assert np.random.default_rng([7, 2, 0]).random() == np.random.default_rng([7, 2]).random()
    sampler = make_sampler(policy, tokenizer)
    for prompt in prompts[:2]:
        [group] = sampler.sample([prompt], [(7,)], 6)
        separate = [sampler.sample([prompt], [(7, number)], 1)[0][0] for number in range(6)]
        assert [completion.ids for completion in group] == [completion.ids for completion in separate]
        assert [completion.finish_reason for completion in group] == [
            completion.finish_reason for completion in separate
        ]


def test_sampler_follows_the_policys_distribution(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    num_samples = 4000
    sampler = make_sampler(policy, tokenizer, max_completion_length=1, batch_size=num_samples)
    [group] = sampler.sample(prompts[:1], KEYS[:1], num_samples)
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in group]), minlength=len(tokenizer))
    logits = policy(torch.tensor(prompts[:1])).logits[0, -1, : len(tokenizer)]
    expected = num_samples * torch.softmax(logits / 0.8, dim=0)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    # Mean 299 and deviation 24 under the null hypothesis; the draws are seeded.
    assert chi_squared < 299 + 4 * 24.5


def test_sampler_at_temperature_0_equals_generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    model.double()
    groups = make_sampler(model, tokenizer, temperature=0).sample(prompts, KEYS, 1)
    for prompt, [completion] in zip(prompts, groups, strict=True):
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=tokenizer.eos_token_id,
            suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)),
        )
        assert completion.ids == generated[0, len(prompt) :].tolist()
        logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        expected = torch.log_softmax(logits, dim=1).amax(dim=1).tolist()
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_sampler_never_draws_ids_beyond_the_tokenizer(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    expected = make_sampler(policy, tokenizer).sample(prompts, KEYS, 4)
    with torch.no_grad():
        policy.lm_head.weight[len(tokenizer) :] = 0.0
        policy.lm_head.weight[len(tokenizer), 1] = 1e6
        policy.lm_head.weight[len(tokenizer) + 1, 1] = -1e6
    assert policy(torch.tensor(prompts[:1])).logits[0, -1].argmax() >= len(tokenizer)
    for temperature in (0.8, 0):
        groups = make_sampler(policy, tokenizer, temperature=temperature).sample(prompts, KEYS, 4)
        assert max(token for group in ids_of(groups) for ids in group for token in ids) < len(tokenizer)
    assert ids_of(make_sampler(policy, tokenizer).sample(prompts, KEYS, 4)) == ids_of(expected)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampler_leaves_the_model_as_it_was(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    is_training: bool,
    dtype: torch.dtype,
) -> None:
    model.to(dtype).train(is_training)
    before = copy.deepcopy(model.state_dict())
    make_sampler(model, tokenizer).sample(prompts, KEYS, 2)
    assert all(module.training == is_training for module in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], weight)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampler_restores_the_model_after_an_error(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    model.to(dtype).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IndexError):
        make_sampler(model, tokenizer).sample([[10**6]], KEYS[:1], 2)

    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("rekatrain.trainer.rloo.sampler.in_process.draw", broken)
        make_sampler(model, tokenizer).sample(prompts, KEYS, 2)
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
    for name, weight in model.state_dict().items():
        assert weight.dtype == dtype
        assert torch.equal(weight, before[name])
    assert torch.is_grad_enabled()
    loss = model(torch.tensor(prompts[:1]), labels=torch.tensor(prompts[:1])).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == dtype for parameter in model.parameters())


def test_sampler_ignores_training_mode_and_checkpointing(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    expected = make_sampler(policy, tokenizer).sample(prompts, KEYS, 2)
    policy.activation_checkpointing_enable()
    assert ids_of(make_sampler(policy.train(), tokenizer).sample(prompts, KEYS, 2)) == ids_of(expected)
