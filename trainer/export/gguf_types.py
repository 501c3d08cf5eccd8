"""The type of each tensor in a GGUF file, and its quantized blocks, made by llama.cpp's own quantizer.

A name such as q4_k_m stands for a mixture of types. The mixture here is llama.cpp's (src/llama-quant.cpp) for dense
Llamas: the output gets six bits, and so do the value and down projections of the layers that lose most by rounding.
"""

import ctypes
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

# For a last dimension that blocks of 256 do not divide: the next larger type with blocks of 32.
FALLBACK = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}
CHUNK_SIZE = 512


def llama_file_type(file_type: str) -> LlamaFileType:
    """Return llama.cpp's number for one of GGUF_TYPES.

    >>> llama_file_type("q4_k_m").name
    'MOSTLY_Q4_K_M'
    """
    return LlamaFileType["ALL_F32" if file_type == "f32" else f"MOSTLY_{file_type.upper()}"]


def tensor_type(
    name: str, shape: tuple[int, ...], file_type: str, *, num_layers: int, is_tied: bool
) -> GGMLQuantizationType:
    """Return the type of one tensor, from its name in llama.cpp and its shape (outputs, inputs)."""
    bulk = GGMLQuantizationType[file_type.upper().removesuffix("_M")]  # q4_k_m is mostly Q4_K
    if len(shape) == 1:
        return GGMLQuantizationType.F32  # norms, which llama.cpp computes in float32
    kind = bulk
    if bulk in FALLBACK:
        is_output = name == "output.weight" or (is_tied and name == "token_embd.weight")
        layer = re.fullmatch(r"blk\.(\d+)\.(?:attn_v|ffn_down)\.weight", name)
        if is_output or (layer and _gets_more_bits(int(layer[1]), num_layers)):
            kind = GGMLQuantizationType.Q6_K
    if shape[-1] % _block(kind):
        kind = FALLBACK.get(kind, GGMLQuantizationType.F16)
    return kind if shape[-1] % _block(kind) == 0 else GGMLQuantizationType.F16


def quantize(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Quantize a float32 matrix [outputs, inputs] (or a vector) -> blocks [outputs, bytes per output]."""
    matrix = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1])
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.empty((matrix.shape[0], matrix.shape[1] // block * block_bytes), dtype=np.uint8)
    library = _ggml()

    def convert(first: int) -> None:
        chunk = matrix[first : first + CHUNK_SIZE]
        written = library.ggml_quantize_chunk(
            int(kind), chunk.ctypes.data, blocks[first:].ctypes.data, 0, len(chunk), chunk.shape[1], None
        )
        assert written == len(chunk) * blocks.shape[1], (kind, values.shape, written)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # ctypes releases the GIL
        list(pool.map(convert, range(0, len(matrix), CHUNK_SIZE)))
    return blocks.reshape(*values.shape[:-1], -1)


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """Return True for the first and last eighth of the layers and every third between: llama.cpp's `use_more_bits`."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _block(kind: GGMLQuantizationType) -> int:
    return GGML_QUANT_SIZES[kind][0]


def _ggml() -> ctypes.CDLL:
    """Load the ggml that is linked into xllamacpp, with the signature of the one function used here (ggml.h)."""
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # source, float32
        ctypes.c_void_p,  # destination
        ctypes.c_int64,  # first value
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # values per row
        ctypes.c_void_p,  # importance of each value: none
    ]
    return library
