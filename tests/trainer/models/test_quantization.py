"""QLoRA's parts on a CPU, where bitsandbytes' four-bit layers compute too, only slowly; training them needs a GPU."""

from pathlib import Path

import pytest
import torch

from rekatrain.data.chat import encode_text
from rekatrain.trainer.models.load import add_adapter, load_model

QUANTIZATION = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def test_qlora_adapter_learns_on_a_frozen_four_bit_base(model_folder: Path, tokenizer) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    base = load_model(str(model_folder), dtype="float32", quantization_config=QUANTIZATION)
    plain = load_model(str(model_folder), dtype="float32")
    layers = [module for module in base.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7 and all(layer.compute_dtype == torch.float32 for layer in layers)
    four_bits = bitsandbytes.functional
    for name, module in base.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = plain.get_submodule(name).weight.detach()
            options = {"quant_type": "nf4", "compress_statistics": True}
            expected = four_bits.dequantize_4bit(*four_bits.quantize_4bit(weight, **options))
            assert torch.equal(four_bits.dequantize_4bit(module.weight, module.weight.quant_state), expected)
            assert not torch.equal(expected, weight)

    ids = torch.tensor([encode_text("human: 17 + 25 = <sep> assistant: 42 <sep>", tokenizer)])
    policy = add_adapter(base, {"r": 4, "target_modules": "all-linear"}).train()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 3_712  # as on the plain model
    before = [layer.weight.clone() for layer in layers]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(10):
        loss = policy(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
