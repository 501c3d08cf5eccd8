"""The types of GGUF files that an export writes, under llama.cpp's names. No imports: the command line lists them."""

# Type -> the largest KL from the trained model, in nats per token, with which a file passes its verification. For f32,
# bf16 and f16 the KL is rounding. For the others the limit is several times the loss of SmolLM2-135M (q8_0 6e-3, q5_k_m
# 0.1), which as a small model loses much: the limit separates broken files from coarse ones. SmolLM2 loses more with
# q5_k_m than with q4_k_m because its weights were converted from a Q4_1 file and have only 16 levels per block.
MAX_KL = {"f32": 1e-8, "bf16": 1e-3, "f16": 1e-3, "q8_0": 3e-2, "q6_k": 0.1, "q5_k_m": 0.5, "q4_k_m": 0.5}
GGUF_TYPES = list(MAX_KL)
# The type that keeps the weights as they are stored.
TYPE_OF_DTYPE = {"float32": "f32", "bfloat16": "bf16"}

# Methods of llmcompressor, for `--as merged`.
COMPRESSED_TYPES = ("fp8", "gptq", "awq")
