"""Tests of trainer/rloo/logprobs.py: packed, values and gradients equal those of one sequence at a time."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.models.load import add_adapter
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.kernels.grouped_attention import NAME, decoder_and_head
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, TokenLogprobs, make_reference, pack_completions
from tests.conftest import tiny_llama

CPU = torch.device("cpu")
# The logits of a float64 model are normalized in float32 too.
TOLERANCES = {torch.float64: 2e-6, torch.float32: 1e-5}

# Lengths of the prompts, and of their completions.
LAYOUTS = {
    "variable lengths": ([5, 1, 9], [[3, 7, 1], [2, 2, 6], [1, 4, 5]]),
    "single tokens": ([4, 7], [[1, 1], [1, 1]]),
    "one group": ([6], [[2, 5, 3, 1]]),
    "one sequence": ([3], [[4]]),
    "groups of one": ([2, 8, 5], [[3], [1], [6]]),
    "equal lengths": ([6, 6], [[4, 4], [4, 4]]),
}
# For each group: is its prompt run once, or with each completion?
SHARING = {"shared": itertools.repeat(True), "each": itertools.repeat(False), "mixed": itertools.cycle([True, False])}


def random_ids(lengths: list[int], num_tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Draw a list of token ids of each length."""
    return [torch.randint(num_tokens, (length,), generator=generator).tolist() for length in lengths]


def make_groups(layout: str, num_tokens: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Return prompts and their groups of completions, of random ids and the lengths of a layout."""
    generator = torch.Generator().manual_seed(1)
    prompt_lengths, completion_lengths = LAYOUTS[layout]
    prompts = random_ids(prompt_lengths, num_tokens, generator)
    return prompts, [random_ids(lengths, num_tokens, generator) for lengths in completion_lengths]


def brute_force(
    policy: torch.nn.Module,
    prompts: Sequence[list[int]],
    groups: Sequence[Sequence[list[int]]],
    *,
    temperature: float,
    num_tokens: int,
) -> Tensor:
    """Compute the log-probabilities of all completion tokens by one plain forward pass per sequence -> [T]."""
    parts = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits[:, :num_tokens] / temperature, dim=1)
            parts.append(logprobs[range(len(completion)), completion])
    return torch.cat(parts)


def gradients(policy: torch.nn.Module, logprobs_T: Tensor) -> dict[str, Tensor]:
    """Differentiate a sum that weights each token differently."""
    weights_T = torch.linspace(-1, 2, len(logprobs_T), dtype=torch.float64)
    policy.zero_grad()
    (logprobs_T.double() * weights_T).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float) -> None:
    """Check the gradient of each weight, up to `rtol` of the norm of the whole gradient."""
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert norm > 0.1
    assert actual.keys() == expected.keys()
    errors = {name: (actual[name] - gradient).norm().item() / norm for name, gradient in expected.items()}
    assert max(errors.values()) <= rtol, errors


def assert_equal_to_brute_force(
    policy: torch.nn.Module, layout: str, num_tokens: int, temperature: float = 1.0, sharing: str = "shared"
) -> None:
    """Compare with a float64 copy of the policy that scores one sequence at a time."""
    prompts, groups = make_groups(layout, num_tokens)
    is_shared = list(itertools.islice(copy.copy(SHARING[sharing]), len(prompts)))
    exact = copy.deepcopy(policy).double().eval()
    expected_T = brute_force(exact, prompts, groups, temperature=temperature, num_tokens=num_tokens)

    scored = CompletionLogprobs(policy, temperature=temperature, num_tokens=num_tokens)
    logprobs_T = scored(pack_completions(prompts, groups, CPU, is_shared=is_shared))
    tolerance = TOLERANCES[next(policy.parameters()).dtype]
    assert logprobs_T.dtype == torch.float32
    torch.testing.assert_close(logprobs_T.double(), expected_T, rtol=0, atol=tolerance)
    assert_gradients_close(gradients(policy, logprobs_T), gradients(exact, expected_T), rtol=tolerance)


def with_adapter(model: LlamaForCausalLM) -> PeftModel:
    """Add LoRA to every linear layer, away from its start, where it changes nothing."""
    torch.manual_seed(3)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return policy.to(model.dtype)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_completion_logprobs_equal_one_sequence_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str, sharing: str
) -> None:
    assert_equal_to_brute_force(model.double(), layout, len(tokenizer), sharing=sharing)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_completion_logprobs_ignore_the_loaded_attention(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, attention: str
) -> None:
    model.double().set_attn_implementation(attention)
    assert_equal_to_brute_force(model, "variable lengths", len(tokenizer))


@pytest.mark.parametrize("layout", ["variable lengths", "one sequence"])
def test_completion_logprobs_equal_those_of_a_padded_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    model.double()
    num_tokens = len(tokenizer)
    prompts, groups = make_groups(layout, num_tokens)
    pairs = [(prompt, completion) for prompt, group in zip(prompts, groups, strict=True) for completion in group]
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    padding = [longest - len(prompt) - len(completion) for prompt, completion in pairs]
    ids = torch.tensor([[0] * pad + prompt + own for pad, (prompt, own) in zip(padding, pairs, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits
    logprobs = torch.log_softmax(logits[:, :-1, :num_tokens], dim=2).gather(2, ids[:, 1:, None])[:, :, 0]
    padded_T = torch.cat([sequence[-len(own) :] for sequence, (_, own) in zip(logprobs, pairs, strict=True)])
    padded = gradients(model, padded_T)

    for is_shared in (True, False):
        packed_T = CompletionLogprobs(model, temperature=1.0, num_tokens=num_tokens)(
            pack_completions(prompts, groups, CPU, is_shared=[is_shared] * len(prompts))
        )
        torch.testing.assert_close(packed_T.double(), padded_T, rtol=0, atol=2e-6)
        assert_gradients_close(gradients(model, packed_T), padded, rtol=2e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_completion_logprobs_are_at_the_sampling_temperature(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    assert_equal_to_brute_force(model.double(), "variable lengths", len(tokenizer), temperature)


@pytest.mark.parametrize("sharing", ["shared", "each"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_completion_logprobs_are_equal_with_checkpointing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str, is_lora: bool, sharing: str
) -> None:
    policy = with_adapter(model.double()) if is_lora else model.double()
    policy.activation_checkpointing_enable()
    assert_equal_to_brute_force(policy.train(), layout, len(tokenizer), 0.7, sharing)


@pytest.mark.parametrize("is_on", [False, True])
def test_completion_logprobs_recompute_only_with_checkpointing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, is_on: bool
) -> None:
    if is_on:
        model.activation_checkpointing_enable()
    prompts, groups = make_groups("variable lengths", len(tokenizer))
    logprobs_T = CompletionLogprobs(model.train(), temperature=1.0, num_tokens=len(tokenizer))(
        pack_completions(prompts, groups, CPU)
    )
    num_calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: num_calls.append(1))
    logprobs_T.sum().backward()
    assert len(num_calls) == (1 if is_on else 0)


@pytest.mark.parametrize("num_at_once", [1, 4, 100])
@pytest.mark.parametrize("tokens_per_chunk", [*range(1, 12), 30, 100])
def test_completion_logprobs_are_equal_in_chunks_of_any_size(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tokens_per_chunk: int,
    num_at_once: int,
) -> None:
    monkeypatch.setattr("rekatrain.trainer.rloo.logprobs.TOKENS_PER_CHUNK", tokens_per_chunk)
    logit_bytes = num_at_once * 4 * model.config.vocab_size
    monkeypatch.setattr("rekatrain.trainer.rloo.logprobs.LOGIT_BYTES_AT_ONCE", {"cpu": logit_bytes})
    assert_equal_to_brute_force(model.double(), "variable lengths", len(tokenizer), temperature=0.7)


@pytest.mark.parametrize("has_cutoffs", [False, True])
def test_completion_logprobs_allow_empty_chunks(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, has_cutoffs: bool
) -> None:
    # As `equal_passes` sets it on a micro-batch with fewer tokens than another process has chunks.
    model.double()
    scored = CompletionLogprobs(model, temperature=0.7, num_tokens=len(tokenizer))
    packed = pack_completions([[5]], [[[6]]], CPU, cutoffs=[-0.5] if has_cutoffs else None)
    assert packed.num_chunks == 1
    expected_T = scored(packed)
    expected = gradients(model, expected_T)
    logprobs_T = scored(replace(packed, num_chunks=3))
    assert torch.equal(logprobs_T, expected_T)
    assert_gradients_close(gradients(model, logprobs_T), expected, rtol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_completion_logprobs_of_an_adapter_equal_brute_force(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    assert_equal_to_brute_force(with_adapter(model.double()), layout, len(tokenizer), 0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_completion_logprobs_in_float32_differ_by_rounding(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    assert_equal_to_brute_force(model, layout, len(tokenizer), 0.7)


def test_completion_logprobs_of_all_ids_sum_to_probability_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    num_tokens = len(tokenizer)
    every_id = pack_completions([[5, 6, 7]], [[[token] for token in range(num_tokens)]], CPU)
    logprobs_T = CompletionLogprobs(model, temperature=0.7, num_tokens=num_tokens)(every_id)
    assert logprobs_T.double().exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("sharing", [True, False])
def test_completion_logprobs_depend_on_prompt_and_completion(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sharing: bool
) -> None:
    model.double()
    scored = CompletionLogprobs(model, temperature=1.0, num_tokens=len(tokenizer))
    prompts, groups = make_groups("variable lengths", len(tokenizer))

    def second_of_first_group() -> Tensor:
        lengths = [len(completion) for completion in groups[0]]
        return scored(pack_completions(prompts, groups, CPU, is_shared=[sharing] * 3))[lengths[0] : sum(lengths[:2])]

    before = second_of_first_group()
    groups[0][0], groups[0][2], groups[1:], prompts[1:] = [17, 18, 19], [23], groups[:0:-1], prompts[:0:-1]
    assert torch.equal(second_of_first_group(), before)
    prompts[0][0] += 1
    assert not torch.allclose(second_of_first_group(), before)
    groups[0][1][0] += 1
    assert not torch.allclose(second_of_first_group()[1:], before[1:])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_gradient_of_sure_tokens_in_bfloat16(temperature: float) -> None:
    # A vocabulary of Reka's size, padded; p of the targets from 0.001 to 0.9999. Expected: float64 of the same logits.
    num_tokens, num_logits = 100_277, 100_352
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.001, 0.5, 0.9, 0.99, 0.995, 0.999, 0.9999], dtype=torch.float64)
    targets_T = torch.randint(num_tokens, (len(probabilities),), generator=generator)
    logits_TV = torch.randn(len(targets_T), num_logits, generator=generator).double()
    others_T = (logits_TV[:, :num_tokens] / temperature).logsumexp(dim=1)
    logits_TV[range(len(targets_T)), targets_T] = temperature * (others_T + probabilities.logit())
    logits_TV = logits_TV.bfloat16().requires_grad_()
    weights_T = torch.linspace(-1, 2, len(targets_T))

    # `apply` owns the logits that it gets: it writes the gradient over a copy.
    logprobs_T = TokenLogprobs.apply(logits_TV.clone(), targets_T, None, temperature, num_tokens, 3)
    (logprobs_T * weights_T).sum().backward()
    exact_TV = logits_TV.detach().double().requires_grad_()
    expected_T = torch.log_softmax(exact_TV[:, :num_tokens] / temperature, dim=1).gather(1, targets_T[:, None])[:, 0]
    (expected_T * weights_T).sum().backward()
    actual, expected = logits_TV.grad.double(), exact_TV.grad
    at_target, expected_at_target = (grad.gather(1, targets_T[:, None])[:, 0] for grad in (actual, expected))

    assert expected_T.exp().max() > 0.9998
    torch.testing.assert_close(logprobs_T.double(), expected_T, rtol=1e-3, atol=0)
    rounding = 2.0**-8  # of bfloat16
    torch.testing.assert_close(at_target, expected_at_target, rtol=rounding, atol=0)
    assert ((actual - expected).norm(dim=1) <= rounding * expected.norm(dim=1)).all()
    assert (actual.sum(dim=1).abs() <= rounding * expected_at_target.abs()).all()
    assert actual[:, num_tokens:].abs().max() == 0


def test_pack_completions_drops_the_last_tokens() -> None:
    packed = pack_completions([[5, 6], [4]], [[[7], [1, 2, 3]], [[8, 9], [2]]], CPU, is_shared=[True, False])
    assert packed.input_ids.tolist() == [[5, 6, 1, 2, 4, 8, 4]]
    assert packed.layout.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert packed.predictors.tolist() == [1, 1, 2, 3, 4, 5, 6]
    assert packed.targets.tolist() == [7, 1, 2, 3, 8, 9, 2]
    assert packed.lengths.tolist() == [1, 3, 2, 1]


def test_make_reference_without_beta_returns_none(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    scored = CompletionLogprobs(model, temperature=1.0, num_tokens=len(tokenizer))
    assert make_reference(Accelerator(cpu=True), scored, RLOOConfig(max_steps=1, beta=0.0)) is None


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_reference_of_an_adapter_is_the_first_policy(tokenizer: PreTrainedTokenizerFast, bias: str) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"], "bias": bias}
    policy = add_adapter(tiny_llama(tokenizer, attention_bias=True), lora)
    decoder, _ = decoder_and_head(policy)
    decoder.set_attn_implementation(NAME)
    model = CompletionLogprobs(policy, temperature=1.0, num_tokens=len(tokenizer))
    reference = make_reference(Accelerator(cpu=True), model, RLOOConfig(max_steps=1))
    packed = pack_completions([[5, 6, 7]], [[[11, 12], [13]]], CPU)
    with torch.no_grad():
        first = model(packed)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        assert reference is not None and torch.equal(reference(packed), first)
        assert (model(packed) - first).abs().max() > 0.1
