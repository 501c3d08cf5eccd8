"""Prepared copies of weights give the products of the plain weights and of autocast, and leave no trace."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.kernels.cpu import decoding_weights
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="weights are packed by MKL")


@needs_mkl
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_inputs", [1, 16, 64])
def test_decoding_weights_multiply_any_number_of_inputs(num_inputs: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 160, bias=has_bias)
    inputs = torch.randn(150, 96)
    exact = copy.deepcopy(layer).double()(inputs.double())
    with torch.no_grad(), decoding_weights(layer, num_inputs):
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
