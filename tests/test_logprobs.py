"""Log-probabilities and gradients with shared prompts, padding and checkpointing are those of one row at a time."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.rloo.logprobs import CompletionLogprobs, left_padded, make_rows, micro_batches, positions

CPU = torch.device("cpu")
# Eager attention takes its softmax in float32, where the float64 mask of a padded query overflows to nan.
DTYPES = {"sdpa": torch.float64, "eager": torch.float32}
# Also a float64 model's logits are normalised in float32.
TOLERANCES = {torch.float64: 2e-6, torch.float32: 1e-5}

# Prompts' and completions' lengths.
LAYOUTS = {
    "variable lengths": ([5, 1, 9], [[3, 7, 1], [2, 2, 6], [1, 4, 5]]),
    "single tokens": ([4, 7], [[1, 1], [1, 1]]),
    "one group": ([6], [[2, 5, 3, 1]]),
    "one row": ([3], [[4]]),
    "groups of one": ([2, 8, 5], [[3], [1], [6]]),
    "no padding": ([6, 6], [[4, 4], [4, 4]]),
}


def random_ids(lengths: list[int], num_tokens: int, generator: torch.Generator) -> list[list[int]]:
    return [torch.randint(num_tokens, (length,), generator=generator).tolist() for length in lengths]


def laid_out(layout: str, num_tokens: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    generator = torch.Generator().manual_seed(1)
    prompt_lengths, completion_lengths = LAYOUTS[layout]
    prompts = random_ids(prompt_lengths, num_tokens, generator)
    return prompts, [random_ids(lengths, num_tokens, generator) for lengths in completion_lengths]


def brute_force(policy: torch.nn.Module, prompts: list, groups: list, *, temperature: float, num_tokens: int) -> Tensor:
    """Log-probabilities of all completion tokens, [T], from one plain forward for each row."""
    rows = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits[:, :num_tokens] / temperature, dim=1)
            rows.append(logprobs[range(len(completion)), completion])
    return torch.cat(rows)


def gradients(policy: torch.nn.Module, logprobs_T: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum that weighs each token differently."""
    weights_T = torch.linspace(-1, 2, len(logprobs_T), dtype=torch.float64)
    policy.zero_grad()
    (logprobs_T.double() * weights_T).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float) -> None:
    """Each weight's gradient is right, up to `rtol` of the norm of the whole gradient."""
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert norm > 0.1
    assert found.keys() == expected.keys()
    errors = {name: (found[name] - gradient).norm().item() / norm for name, gradient in expected.items()}
    assert max(errors.values()) <= rtol, errors


def assert_equal_to_brute_force(policy: torch.nn.Module, layout: str, num_tokens: int, temperature: float = 1.0):
    """Compare with a float64 copy of the policy that scores one row at a time."""
    prompts, groups = laid_out(layout, num_tokens)
    exact = copy.deepcopy(policy).double().eval()
    expected_T = brute_force(exact, prompts, groups, temperature=temperature, num_tokens=num_tokens)

    scored = CompletionLogprobs(policy, temperature=temperature, num_tokens=num_tokens)
    logprobs_T = scored(make_rows(prompts, groups, CPU))
    tolerance = TOLERANCES[next(policy.parameters()).dtype]
    assert logprobs_T.dtype == torch.float32
    torch.testing.assert_close(logprobs_T.double(), expected_T, rtol=0, atol=tolerance)
    assert_gradients_close(gradients(policy, logprobs_T), gradients(exact, expected_T), rtol=tolerance)


def with_adapter(model: LlamaForCausalLM) -> PeftModel:
    """LoRA on every linear layer, moved away from its start, where it changes nothing."""
    torch.manual_seed(3)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return policy.to(model.dtype)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_gradients_equal_those_of_one_row_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str, attention: str
) -> None:
    model.to(DTYPES[attention]).set_attn_implementation(attention)
    assert_equal_to_brute_force(model, layout, len(tokenizer))


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_logprobs_are_those_at_the_sampling_temperature(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    assert_equal_to_brute_force(model.double(), "variable lengths", len(tokenizer), temperature)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_checkpointing_changes_no_value_and_no_gradient(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str, is_lora: bool, attention: str
) -> None:
    model.to(DTYPES[attention]).set_attn_implementation(attention)
    policy = with_adapter(model) if is_lora else model
    policy.activation_checkpointing_enable()
    assert_equal_to_brute_force(policy.train(), layout, len(tokenizer), 0.7)


@pytest.mark.parametrize("is_on", [False, True])
def test_activation_checkpointing_recomputes_each_layer_in_the_backward_pass(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, is_on: bool
) -> None:
    if is_on:
        model.activation_checkpointing_enable()
    prompts, groups = laid_out("variable lengths", len(tokenizer))
    logprobs_T = CompletionLogprobs(model.train(), temperature=1.0, num_tokens=len(tokenizer))(
        make_rows(prompts, groups, CPU)
    )
    num_calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: num_calls.append(1))
    logprobs_T.sum().backward()
    assert len(num_calls) == (1 if is_on else 0)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_logits_in_pieces_of_any_size_give_the_same_values_and_gradients(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("trainer.rloo.logprobs.LOGITS_AT_ONCE", at_once)
    assert_equal_to_brute_force(model.double(), "variable lengths", len(tokenizer), temperature=0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_is_scored_and_trained_as_one_row_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    assert_equal_to_brute_force(with_adapter(model.double()), layout, len(tokenizer), 0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_differs_by_rounding_only(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    assert_equal_to_brute_force(model, layout, len(tokenizer), 0.7)


def test_probabilities_of_the_tokenizers_ids_sum_to_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    num_tokens = len(tokenizer)
    every_id = make_rows([[5, 6, 7]], [[[token] for token in range(num_tokens)]], CPU)
    logprobs_T = CompletionLogprobs(model, temperature=0.7, num_tokens=num_tokens)(every_id)
    assert logprobs_T.double().exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_what_stands_in_the_padding_is_never_seen(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = make_rows(*laid_out("variable lengths", len(tokenizer)), CPU)
    scored = CompletionLogprobs(model.double(), temperature=1.0, num_tokens=len(tokenizer))
    before = scored(rows)
    rows.prompts[rows.prompt_mask == 0] = 17
    rows.completions[~rows.is_token] = 23
    torch.testing.assert_close(scored(rows), before, rtol=0, atol=0)


def test_rows_meet_between_prompt_and_completion() -> None:
    rows = make_rows([[5, 6], [4]], [[[7], [1, 2, 3]], [[8, 9], [2]]], CPU)
    assert rows.prompts.tolist() == [[5, 6], [0, 4]]
    assert rows.prompt_mask.tolist() == [[1, 1], [0, 1]]
    assert rows.completions.tolist() == [[7, 0, 0], [1, 2, 3], [8, 9, 0], [2, 0, 0]]
    assert rows.lengths.tolist() == [1, 3, 2, 1]
    assert rows.is_token.tolist() == [[True, False, False], [True] * 3, [True, True, False], [True, False, False]]


def test_positions_count_real_tokens_only() -> None:
    mask, ids = left_padded([[7], [1, 2, 3]], CPU)
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert ids.tolist() == [[0, 0, 7], [1, 2, 3]]
    assert positions(mask).tolist() == [[0, 0, 0], [0, 1, 2]]


row_lengths = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), max_size=12)


def num_padded_tokens(groups: list[list[int]]) -> int:
    return sum(map(len, groups)) * max(map(max, groups))


@given(row_lengths, st.integers(1, 300))
def test_micro_batches_hold_each_group_once_within_the_budget(lengths: list[list[int]], budget: int) -> None:
    batches = list(micro_batches(lengths, budget))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or num_padded_tokens([lengths[place] for place in batch]) <= budget


@given(row_lengths, st.integers(1, 300))
def test_micro_batches_are_ordered_by_length_and_full(lengths: list[list[int]], budget: int) -> None:
    batches = list(micro_batches(lengths, budget))
    longest = [max(lengths[place]) for place in itertools.chain(*batches)]
    assert longest == sorted(longest, reverse=True)
    for batch, following in itertools.pairwise(batches):
        assert num_padded_tokens([lengths[place] for place in [*batch, following[0]]]) > budget
