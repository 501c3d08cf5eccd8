"""While sampling, LoRA layers add their adapter in one fused product: the same function, fewer kernels, no merging."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions
from rekatrain.trainer.rloo.sampler.adapters import decoding_adapters
from rekatrain.trainer.rloo.sampler.in_process import Sampler
from tests.conftest import tiny_llama
from tests.helpers.recorded_calls import Recording

IDS = torch.arange(5, 45)[None]


def adapted(tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, **options: Any) -> PeftModel:
    """Return a model with an adapter that changes its logits; PEFT keeps adapters of a bfloat16 model in float32."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(tokenizer).to(dtype), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model.double() if dtype == torch.float64 else model.eval()


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"use_dora": True}])
def test_fused_adapters_compute_the_same_function(tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> None:
    model = adapted(tokenizer, torch.float64, **options).eval()
    expected = logits(model)
    with decoding_adapters(model):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.01


def test_fused_adapters_follow_the_switches_of_peft(tokenizer: PreTrainedTokenizerFast) -> None:
    model = adapted(tokenizer, torch.float64).eval()
    with model.disable_adapter():
        base = logits(model)
        with decoding_adapters(model):
            assert torch.equal(logits(model), base)
    with decoding_adapters(model):
        assert (logits(model) - base).abs().max() > 0.01
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    merged = logits(model)
    with decoding_adapters(model):
        assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name])
    assert all("forward" not in vars(module) for module in model.modules())


def test_fused_adapters_are_restored_after_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    model = adapted(tokenizer, torch.float32)
    with pytest.raises(KeyError), decoding_adapters(model):
        raise KeyError
    assert all("forward" not in vars(module) for module in model.modules())
    model(IDS).logits.sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "lora_" in name)


def test_fused_adapters_are_no_further_from_exact_in_bfloat16(tokenizer: PreTrainedTokenizerFast) -> None:
    model = adapted(tokenizer, torch.bfloat16)
    assert model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32
    exact = logits(copy.deepcopy(model).double())
    plain = logits(model).double()
    with decoding_adapters(model):
        fused = logits(model).double()
    errors = [(each - exact).norm() / exact.norm() for each in (fused, plain)]
    assert 0 < errors[0] < 1.2 * errors[1]


def test_sampler_with_bfloat16_weights_scores_as_training(tokenizer: PreTrainedTokenizerFast) -> None:
    model = adapted(tokenizer, torch.bfloat16)
    prompts = [encode_text(text, tokenizer) for text in ("human: What is 2+2? <sep> assistant:", "a")]
    groups = Sampler(model, tokenizer, max_completion_length=40, temperature=1.0, batch_size=16).sample(
        prompts, [(0,), (1,)], 8
    )
    sampled = torch.tensor([logprob for group in groups for one in group for logprob in one.logprobs])
    packed = pack_completions(prompts, [[one.ids for one in group] for group in groups], torch.device("cpu"))
    with torch.no_grad():
        scored, exact = (
            CompletionLogprobs(each, temperature=1.0, num_tokens=len(tokenizer))(packed)
            for each in (model, copy.deepcopy(model).double())
        )
    # The sampler is as close to the exact log-probs as training is, so what lies between them is rounding.
    assert (sampled - exact).abs().mean() < 1.2 * (scored - exact).abs().mean()


def test_fused_adapters_take_three_products_and_no_cast(tokenizer: PreTrainedTokenizerFast) -> None:
    model = adapted(tokenizer, torch.bfloat16)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    inputs = torch.randn(3, 1, 32, dtype=torch.bfloat16)
    with torch.no_grad(), decoding_adapters(model):
        layer(inputs)  # makes the copies
        with Recording() as recording:
            layer(inputs)
    names = [func._schema.name for func, *_ in recording.operators]
    assert names == ["aten::mm", "aten::mm", "aten::addmm_"]
