"""Which type each tensor of a GGUF file gets, and its blocks as llama.cpp's own quantiser makes them.

A name such as q4_k_m stands for a mixture, and the one here is llama.cpp's (src/llama-quant.cpp) for dense Llamas: the
output and, in the layers that lose most by rounding, the value and down projections get six bits.
"""

import ctypes
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

# llama.cpp's names: type of the bulk of the weights, file type.
FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (GGMLQuantizationType.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (GGMLQuantizationType.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": (GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}
# For rows that blocks of 256 do not divide: the next larger type with blocks of 32.
FALLBACK = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}
CHUNK_ROWS = 512


def tensor_type(
    name: str, shape: tuple[int, ...], file_type: str, *, num_layers: int, is_tied: bool
) -> GGMLQuantizationType:
    """The type of one tensor, by its name in llama.cpp and its shape (rows, columns)."""
    bulk, _ = FILE_TYPES[file_type]
    if len(shape) == 1:
        return GGMLQuantizationType.F32  # norms, which llama.cpp computes in float32
    kind = bulk
    if bulk in FALLBACK:
        is_output = name == "output.weight" or (is_tied and name == "token_embd.weight")
        layer = re.fullmatch(r"blk\.(\d+)\.(?:attn_v|ffn_down)\.weight", name)
        if is_output or (layer and _takes_more_bits(int(layer[1]), num_layers)):
            kind = GGMLQuantizationType.Q6_K
    if shape[-1] % _block(kind):
        kind = FALLBACK.get(kind, GGMLQuantizationType.F16)
    return kind if shape[-1] % _block(kind) == 0 else GGMLQuantizationType.F16


def quantize(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Blocks of a float32 matrix [rows, columns] (or vector): [rows, bytes of a row]."""
    rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1])
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.empty((rows.shape[0], rows.shape[1] // block * block_bytes), dtype=np.uint8)
    library = _ggml()

    def convert(first: int) -> None:
        here = rows[first : first + CHUNK_ROWS]
        written = library.ggml_quantize_chunk(
            int(kind), here.ctypes.data, blocks[first:].ctypes.data, 0, len(here), here.shape[1], None
        )
        assert written == here.shape[0] * blocks.shape[1], (kind, values.shape, written)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # ctypes lets go of the interpreter's lock
        list(pool.map(convert, range(0, len(rows), CHUNK_ROWS)))
    return blocks.reshape(*values.shape[:-1], -1)


def _takes_more_bits(layer: int, num_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between: llama.cpp's `use_more_bits`."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _block(kind: GGMLQuantizationType) -> int:
    return GGML_QUANT_SIZES[kind][0]


def _ggml() -> ctypes.CDLL:
    """ggml, as it is linked into xllamacpp, by the one function of its C interface that is needed here (ggml.h)."""
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # source, float32
        ctypes.c_void_p,  # destination
        ctypes.c_int64,  # first value
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # values of a row
        ctypes.c_void_p,  # importance of each value, none
    ]
    return library
