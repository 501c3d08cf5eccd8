"""GGUF files: llama.cpp's blocks, types and names, and padding that does not change the function."""

from pathlib import Path

import gguf
import httpx2
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from rekatrain.data.chat import encode_text
from rekatrain.data.errors import InputError
from rekatrain.trainer.export.gguf_model import check_architecture, padded_size, write_gguf
from rekatrain.trainer.export.gguf_tokenizer import find_pre_tokenizer
from rekatrain.trainer.export.gguf_types import quantize, tensor_type
from rekatrain.trainer.export.lazy_weights import LazyWeights
from rekatrain.trainer.export.probe import probe_logprobs
from rekatrain.trainer.export.verify_gguf import start_server
from rekatrain.trainer.models.source import find_source
from tests.helpers.exports import servable_llama


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q5_0, Type.Q5_1])
def test_quantize_equals_the_gguf_package(kind: Type) -> None:
    values = np.random.default_rng(0).standard_normal((600, 512), dtype=np.float32)
    expected = gguf.quantize(values, kind).view(np.uint8).reshape(600, -1)
    blocks = quantize(values, kind)
    # One rounds halves to even and the other away from zero, so a few values differ.
    assert blocks.shape == expected.shape
    assert (blocks != expected).mean() < 1e-3


def test_quantize_halves_the_error_with_each_bit_of_a_k_quant() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (600, 512)).astype(np.float32)
    errors = [gguf.dequantize(quantize(values, kind), kind) - values for kind in (Type.Q6_K, Type.Q5_K, Type.Q4_K)]
    six, five, four = (np.sqrt((error**2).mean()) for error in errors)
    assert 0.4 < six / five < 0.6 and 0.4 < five / four < 0.6
    assert four < 0.5 * 2 / 2**4  # the step of four bits over [-1, 1] is 2 / 16


def test_tensor_type_gives_six_bits_where_llama_cpp_does() -> None:
    def kind(name: str, columns: int = 6144, *, is_tied: bool = False) -> Type:
        return tensor_type(name, (6144, columns), "q4_k_m", num_layers=44, is_tied=is_tied)

    # llama.cpp's rule for 44 layers: the first five, the last six, and every third between, from the eighth on.
    six_bits = [*range(5), *range(7, 38, 3), *range(38, 44)]
    for tensor in ("attn_v", "ffn_down"):
        assert [n for n in range(44) if kind(f"blk.{n}.{tensor}.weight") == Type.Q6_K] == six_bits
        assert kind(f"blk.5.{tensor}.weight") == Type.Q4_K
    assert kind("blk.0.attn_q.weight") == Type.Q4_K
    assert kind("output.weight") == kind("token_embd.weight", is_tied=True) == Type.Q6_K
    assert kind("token_embd.weight") == Type.Q4_K
    assert tensor_type("blk.0.attn_norm.weight", (6144,), "q4_k_m", num_layers=44, is_tied=False) == Type.F32
    # Reka's intermediate size: larger types without padding, K-quants with it.
    assert kind("blk.5.ffn_down.weight", 19_648) == Type.Q5_0 and kind("blk.0.ffn_down.weight", 19_648) == Type.Q8_0
    assert padded_size(19_648) == 19_712
    assert kind("blk.5.ffn_down.weight", 19_712) == Type.Q4_K
    assert tensor_type("blk.0.ffn_up.weight", (8, 48), "q8_0", num_layers=2, is_tied=False) == Type.F16


def test_write_gguf_pads_without_changing_the_function(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = servable_llama(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages }}")  # all tests share the tokenizer
    ids = encode_text("human: What is 2+2? <sep> assistant:", tokenizer)
    expected = probe_logprobs(model, torch.tensor([ids]))[-1]
    model.save_pretrained(tmp_path / "model")
    for size in (96, 256):
        file = tmp_path / f"{size}.gguf"
        weights = LazyWeights(find_source(str(tmp_path / "model")))
        write_gguf(file, weights, tokenizer, file_type="f32", name="tiny", intermediate_size=size)
        shapes = {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(file).tensors}
        assert shapes["blk.0.ffn_down.weight"] == [size, 128] and shapes["blk.1.ffn_up.weight"] == [128, size]
        server = start_server(file, n_ctx=64)
        options = {"prompt": ids, "n_predict": 1, "n_probs": len(expected), "temperature": 0}
        response = httpx2.post(server.listening_address + "/completion", json=options, timeout=60).json()
        candidates = response["completion_probabilities"][0]["top_logprobs"]
        logprobs = {candidate["id"]: candidate["logprob"] for candidate in candidates}
        assert len(logprobs) == len(expected)
        assert max(abs(logprobs[token_id] - value) for token_id, value in enumerate(expected.tolist())) < 1e-5


def byte_pair_tokenizer(
    *parts: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def test_find_pre_tokenizer_returns_llama_cpps_name(tokenizer: PreTrainedTokenizerFast) -> None:
    assert find_pre_tokenizer(tokenizer) == "gpt-2"
    assert find_pre_tokenizer(byte_pair_tokenizer(pre_tokenizers.Digits(individual_digits=True), BYTES)) == "smollm"


def test_find_pre_tokenizer_calls_rekas_dbrx(cl100k: PreTrainedTokenizerFast) -> None:
    assert find_pre_tokenizer(cl100k) == "dbrx"


@pytest.mark.parametrize(
    "parts",
    [
        [pre_tokenizers.Digits(individual_digits=False), BYTES],
        [pre_tokenizers.Whitespace()],
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
    ],
)
def test_find_pre_tokenizer_rejects_unknown_ones(parts: list[pre_tokenizers.PreTokenizer]) -> None:
    with pytest.raises(InputError, match="llama.cpp's name for the pre-tokenizer"):
        find_pre_tokenizer(byte_pair_tokenizer(*parts))


def test_check_architecture_and_tokenizer_reject_non_llamas() -> None:
    with pytest.raises(InputError, match="BPE with normalizer NFC"):
        find_pre_tokenizer(byte_pair_tokenizer(BYTES, normalizer=normalizers.NFC()))
    with pytest.raises(InputError, match="'qwen2'; only llama"):
        check_architecture(Qwen2Config())
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(InputError, match="rope_type 'linear'"):
        check_architecture(LlamaConfig(rope_parameters=scaled))
    with pytest.raises(InputError, match="attention_bias"):
        check_architecture(LlamaConfig(attention_bias=True))
    check_architecture(LlamaConfig())
