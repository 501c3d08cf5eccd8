"""Tests of trainer/rloo/kernels/cpu.py: the cost rule, and weights prepared for decoding.

Its attention is tested with the other layouts in test_grouped_attention.py.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.kernels.cpu import PassCost, decoding_weights
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions

COSTS = st.builds(PassCost, token=st.floats(0, 100), pair=st.floats(0, 10), join=st.floats(0, 10))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_inputs", [1, 16, 64])
def test_decoding_weights_multiply_any_number_of_inputs(num_inputs: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 160, bias=has_bias)
    inputs = torch.randn(150, 96)
    exact = copy.deepcopy(layer).double()(inputs.double())
    with torch.no_grad(), decoding_weights(layer, num_inputs):
        assert "forward" in vars(layer)
        for size in (*range(1, 70), 128, 150):
            torch.testing.assert_close(layer(inputs[:size]).double(), exact[:size], rtol=0, atol=5e-6)
        assert torch.equal(layer(inputs.view(50, 3, 96)), layer(inputs).view(50, 3, 160))


def test_decoding_weights_keep_a_model_with_an_adapter_equal() -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    inputs = torch.randn(10, 24)
    with torch.no_grad():
        before = model(inputs)
        with decoding_weights(model, 10):
            torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-6)
        assert torch.equal(model(inputs), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_decoding_weights_in_another_dtype_equal_autocast(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    score = CompletionLogprobs(model, temperature=1.0, num_tokens=len(tokenizer))
    packed = pack_completions([[5, 6, 7], [8]], [[[9, 10], [11]], [[12, 13, 14], [15]]], torch.device("cpu"))
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = score(packed)
        with decoding_weights(model, 4, torch.bfloat16):
            assert torch.equal(score(packed), expected)
        assert (score(packed) - expected).abs().max() > 1e-3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_decoding_weights_leave_bfloat16_layers_as_they_are(model: LlamaForCausalLM) -> None:
    model.bfloat16()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        with decoding_weights(model, 4):
            assert torch.equal(model(ids).logits, before)


def test_decoding_weights_are_removed_after_an_error() -> None:
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError), decoding_weights(layer, 4):
        raise ZeroDivisionError
    assert "forward" not in vars(layer)


# The cost rule


@pytest.mark.parametrize(
    ("prompt", "completions", "is_shared"),
    [
        # Run again, the prompt costs 100 * 50 + 50^2 / 2 = 6250; joining costs 10 for each of 20 tokens.
        (50, [10, 10], True),
        # With one completion there is nothing to save.
        (50, [10], False),
        # The prompt once more costs 100.5, joining 20,000.
        (1, [1000, 1000], False),
    ],
)
def test_pass_cost_shares_a_prompt_where_that_costs_less(prompt: int, completions: list[int], is_shared: bool) -> None:
    assert PassCost(token=100.0, pair=1.0, join=10.0).shares_prompt(prompt, completions) == is_shared


@given(st.integers(1, 100), st.lists(st.integers(0, 100), min_size=1, max_size=6), st.floats(0, 100), st.floats(0, 10))
def test_pass_cost_shares_a_prompt_where_joining_is_free(
    prompt: int, completions: list[int], token: float, pair: float
) -> None:
    assert PassCost(token=token, pair=pair, join=0.0).shares_prompt(prompt, completions)


@given(st.integers(1, 50), st.lists(st.integers(0, 50), min_size=1, max_size=5), COSTS)
def test_pass_cost_shares_a_prompt_by_the_whole_costs(prompt: int, completions: list[int], cost: PassCost) -> None:
    def pairs(first: int, last: int) -> float:
        """Count the pairs of tokens first to last with all tokens up to their own, which counts half."""
        return (last**2 - first**2) / 2

    shared = cost.token * (prompt + sum(completions)) + cost.join * sum(completions)
    shared += cost.pair * (pairs(0, prompt) + sum(pairs(prompt, prompt + own) for own in completions))
    plain = sum(cost.token * (prompt + own) + cost.pair * pairs(0, prompt + own) for own in completions)
    if shared != pytest.approx(plain):
        assert cost.shares_prompt(prompt, completions) == (shared < plain)


def test_pass_cost_counts_weights_and_heads(model: LlamaForCausalLM) -> None:
    cost = PassCost.of(model.model)
    per_layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48  # q, k and v, o, and three layers of the MLP
    assert cost == PassCost(token=2 * per_layer, pair=2 * 2 * 4 * 8, join=64 * 2 * 4 * 8)


def test_pass_cost_of_a_sharded_decoder_equals_the_whole_ones(model: LlamaForCausalLM) -> None:
    whole = PassCost.of(model.model)
    for parameter in model.parameters():  # as ZeRO-3 leaves them between passes
        parameter.data = torch.empty(0)
    assert PassCost.of(model.model) == whole


@given(COSTS, st.integers(1, 100), st.integers(2, 8), st.integers(1, 200))
def test_pass_cost_describes_the_longest_shared_length(cost: PassCost, prompt: int, num: int, cap: int) -> None:
    longest = cost.longest_shared(prompt, num, cap)
    is_shared = [cost.shares_prompt(prompt, [length] * num) for length in range(1, cap + 1)]
    assert is_shared == [True] * longest + [False] * (cap - longest)
    assert f"up to {longest}" in cost.describe(prompt, num, cap)
