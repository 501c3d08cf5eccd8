"""`rloo.cast_lm_head_to_fp32`: logits in float32 for trainer, reference and sampler; nothing changes in float32."""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.rloo.kernels.cpu import decoding_weights
from rekatrain.trainer.rloo.kernels.float32_head import compute_head_in_float32
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, make_reference, pack_completions
from tests.conftest import tiny_llama
from tests.helpers.rloo import by_ids, make_setup, with_adapter

PACKED = pack_completions([[5, 6, 7], [4]], [[[9, 10], [11, 2]], [[12, 13, 14], [15]]], torch.device("cpu"))


def scores(policy: Policy, num_tokens: int, *, autocasts: bool = False) -> Tensor:
    scored = CompletionLogprobs(policy, temperature=1.0, num_tokens=num_tokens)
    with torch.autocast("cpu", torch.bfloat16) if autocasts else nullcontext():
        return scored(PACKED)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("autocasts", [False, True], ids=["bfloat16 weights", "autocast"])
def test_float32_head_gives_logits_of_unrounded_products(
    tokenizer: PreTrainedTokenizerFast, is_tied: bool, autocasts: bool
) -> None:
    # Large logits, which bfloat16 rounds to steps of 1/8.
    model = tiny_llama(tokenizer, tie_word_embeddings=is_tied)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model = model if autocasts else model.bfloat16()
    hidden: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].detach()))
    rounded_T = scores(model, len(tokenizer), autocasts=autocasts)
    compute_head_in_float32(model)
    logprobs_T = scores(model, len(tokenizer), autocasts=autocasts)
    handle.remove()
    # Expected: float64 of the same hidden states and weights.
    logits_TV = hidden[1].double() @ model.lm_head.weight.double().T
    expected_T = logits_TV[:, : len(tokenizer)].log_softmax(1).gather(1, PACKED.targets[:, None])[:, 0]
    assert logits_TV.abs().max() > 16
    torch.testing.assert_close(logprobs_T.double(), expected_T, rtol=0, atol=1e-4)
    assert (rounded_T - expected_T).abs().max() > 0.01
    logprobs_T.sum().backward()
    assert model.lm_head.weight.grad.dtype == model.lm_head.weight.dtype


def test_float32_head_changes_no_bit_in_float32(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    expected_T = scores(model, len(tokenizer))
    compute_head_in_float32(model)
    assert torch.equal(scores(model, len(tokenizer)), expected_T)
    with torch.no_grad(), decoding_weights(model, 4):
        torch.testing.assert_close(scores(model, len(tokenizer)), expected_T.detach(), rtol=0, atol=1e-5)


def test_float32_head_is_that_of_reference_and_sampler(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    setup = make_setup(tokenizer, by_ids, beta=0.1, cast_lm_head_to_fp32=True, temperature=1.0)
    policy = with_adapter(model.bfloat16())
    sampler = setup.make_sampler(policy)
    ids = [5, 6, 7]
    (group,) = sampler.sample([ids], [(0,)], 4)
    scored = CompletionLogprobs(policy, temperature=1.0, num_tokens=len(tokenizer))
    packed = pack_completions([ids], [[completion.ids for completion in group]], torch.device("cpu"))
    sampled_T = torch.tensor([logprob for completion in group for logprob in completion.logprobs])
    reference = make_reference(Accelerator(cpu=True), scored, setup.config)
    with torch.no_grad():
        expected_T = scored(packed)
        assert torch.equal(reference(packed), expected_T)
    rounded = copy.deepcopy(policy)
    rounded.get_base_model().lm_head.__class__ = torch.nn.Linear
    with torch.no_grad():
        rounded_T = CompletionLogprobs(rounded, temperature=1.0, num_tokens=len(tokenizer))(packed)
    # Decoding and training add hidden states up in another order, in bfloat16: the head adds no rounding to that.
    assert (sampled_T - expected_T).abs().mean() < (sampled_T - rounded_T).abs().mean()
