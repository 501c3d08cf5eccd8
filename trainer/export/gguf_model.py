"""A Llama's weights as one GGUF file.

The layout is llama.cpp's `llama` architecture. Two things differ from the transformers model:

- The outputs of the query and key projections are permuted. Rotary embeddings rotate the two halves of a head against
  each other in transformers, and neighboring pairs in llama.cpp.
- K-quants need an input size that blocks of 256 divide. Reka's intermediate size is 19,648, so its down projection
  would fall back to a larger type. It is padded to 19,712 with zeros in gate, up and down: the new units compute
  silu(0) * 0 = 0 and have zero weights, so the function is the same.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.trainer.export.gguf_tokenizer import add_tokenizer
from rekatrain.trainer.export.gguf_types import llama_file_type, quantize, tensor_type
from rekatrain.trainer.export.lazy_weights import LazyWeights

K_QUANT_BLOCK = 256


def check_architecture(config: PretrainedConfig) -> None:
    """Raise InputError for a model that is not a plain Llama: its file would compute another function."""
    if config.model_type != "llama":
        raise InputError(f"--as gguf: the model is of type {config.model_type!r}; only llama can be converted")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        raise InputError(f"--as gguf: rope_type {rope_type!r} cannot be converted, only 'default'")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise InputError(f"--as gguf: the model's config.json has {key}, which cannot be converted")
    if config.hidden_act != "silu":
        raise InputError(f"--as gguf: hidden_act {config.hidden_act!r} cannot be converted, only silu")


def padded_size(intermediate_size: int) -> int:
    """Return the next multiple of 256.

    >>> padded_size(19_648)
    19712
    """
    return -(-intermediate_size // K_QUANT_BLOCK) * K_QUANT_BLOCK


def write_gguf(
    file: Path,
    weights: LazyWeights,
    tokenizer: PreTrainedTokenizerBase,
    *,
    file_type: str,
    name: str,
    intermediate_size: int,
) -> None:
    """Write the weights to `file`, reading and converting one tensor at a time.

    file_type:         one of GGUF_TYPES
    name:              the model's name, which servers show
    intermediate_size: the model's or larger; the difference is filled with zeros
    """
    config = weights.model.config
    writer = GGUFWriter(file, "llama")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(llama_file_type(file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer, tokenizer, config.vocab_size)

    # Two passes, because the header holds all shapes and a whole 21B model would not fit in memory.
    kinds = {}
    for key, tensor in _converted(weights.without_data(), config, intermediate_size):
        shape = tuple(tensor.shape)
        kinds[key] = kind = tensor_type(
            key, shape, file_type, num_layers=config.num_hidden_layers, is_tied=config.tie_word_embeddings
        )
        block, block_bytes = GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(key, shape, np.dtype(np.float32), tensor.numel() // block * block_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, tensor in _converted(weights, config, intermediate_size):
        writer.write_tensor_data(quantize(tensor.float().cpu().numpy(), kinds[key]))
    writer.close()


def _converted(
    state: Mapping[str, Tensor], config: PretrainedConfig, intermediate_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield llama.cpp's name and value of each tensor, always in the same order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    num_padded = intermediate_size - config.intermediate_size
    for key, tensor in state.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp uses the embeddings if there is no output tensor
        name = names.get_name(key, try_suffixes=(".weight",))
        if name is None:
            raise InputError(f"--as gguf: llama.cpp's llama architecture has no tensor for the model's {key!r}")
        if key.endswith("q_proj.weight"):
            tensor = _pair_neighbors(tensor, config.num_attention_heads)
        elif key.endswith("k_proj.weight"):
            tensor = _pair_neighbors(tensor, config.num_key_value_heads)
        elif key.endswith("down_proj.weight"):
            tensor = pad(tensor, (0, num_padded))
        elif key.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor = pad(tensor, (0, 0, 0, num_padded))
        yield name, tensor


def _pair_neighbors(weight: Tensor, num_heads: int) -> Tensor:
    """Make outputs i and i + d/2 of each head neighbors: [heads * d, hidden] -> [heads * d, hidden]."""
    num_outputs, hidden = weight.shape
    halves = weight.reshape(num_heads, 2, num_outputs // num_heads // 2, hidden)
    return halves.transpose(1, 2).reshape(num_outputs, hidden)
