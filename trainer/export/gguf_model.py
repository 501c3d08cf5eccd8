"""A Llama's weights as one GGUF file.

The layout is llama.cpp's `llama` architecture. Two things differ from the transformers model:

- Rows of the query and key projections are permuted: transformers rotates a head's two halves against each other,
  llama.cpp neighbouring pairs.
- K-quants cut rows into blocks of 256. Reka's intermediate size is 19,648, so that the down projection would fall back
  to a larger type. Zero columns there, behind zero rows of gate and up, make it 19,712: silu(0) * 0 = 0 meets a zero
  weight, and the function is the same.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from rekatrain.data.errors import InputError
from rekatrain.trainer.export.gguf_tokenizer import add_tokenizer
from rekatrain.trainer.export.gguf_types import FILE_TYPES, quantize, tensor_type
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

K_QUANT_BLOCK = 256


def check_architecture(config: PretrainedConfig) -> None:
    """Raise InputError for a model that is more than a plain Llama: the file would be of another function."""
    if config.model_type != "llama":
        raise InputError(f"--as gguf: the model is of type {config.model_type!r}; only llama can be converted")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        raise InputError(f"--as gguf: rope_type {rope_type!r} cannot be converted, only the default one")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise InputError(f"--as gguf: the model's config.json has {key}, which cannot be converted")
    if config.hidden_act != "silu":
        raise InputError(f"--as gguf: hidden_act {config.hidden_act!r} cannot be converted, only silu")


def padded_size(intermediate_size: int) -> int:
    """The next multiple of 256.

    >>> padded_size(19_648)
    19712
    """
    return -(-intermediate_size // K_QUANT_BLOCK) * K_QUANT_BLOCK


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    file_type: str,
    name: str,
    intermediate_size: int,
) -> None:
    """Write the model with one tensor in memory at a time.

    file_type:         a key of FILE_TYPES
    intermediate_size: the model's, or more: the rest is zeros
    """
    config = model.config
    writer = GGUFWriter(file, "llama")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[file_type][1])
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

    # Twice over the tensors: the header holds all shapes, and a second copy of a 21B model would not fit in memory.
    state = model.state_dict()
    shapes = {key: tensor.to("meta") for key, tensor in state.items()}
    kinds = {}
    for key, tensor in _converted(shapes, config, intermediate_size):
        shape = tuple(tensor.shape)
        kinds[key] = kind = tensor_type(
            key, shape, file_type, num_layers=config.num_hidden_layers, is_tied=config.tie_word_embeddings
        )
        block, block_bytes = GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(key, shape, np.dtype(np.float32), tensor.numel() // block * block_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, tensor in _converted(state, config, intermediate_size):
        writer.write_tensor_data(quantize(tensor.float().cpu().numpy(), kinds[key]))
    writer.close()


def _converted(
    state: dict[str, Tensor], config: PretrainedConfig, intermediate_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and values as llama.cpp has them, always in the same order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    missing = intermediate_size - config.intermediate_size
    for key, tensor in state.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings where there is no output tensor
        name = names.get_name(key, try_suffixes=(".weight",))
        if name is None:
            raise InputError(f"--as gguf: the model's tensor {key!r} has no place in llama.cpp's llama architecture")
        if key.endswith("q_proj.weight"):
            tensor = _pair_neighbours(tensor, config.num_attention_heads)
        elif key.endswith("k_proj.weight"):
            tensor = _pair_neighbours(tensor, config.num_key_value_heads)
        elif key.endswith("down_proj.weight"):
            tensor = pad(tensor, (0, missing))
        elif key.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor = pad(tensor, (0, 0, 0, missing))
        yield name, tensor


def _pair_neighbours(weight: Tensor, num_heads: int) -> Tensor:
    """Rows (i, i + d/2) of each head become neighbours: [heads * d, hidden] -> the same shape."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)
