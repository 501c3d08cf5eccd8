#!/usr/bin/env bash
# Serve this adapter on its base with vLLM 0.30 or newer:  bash serving/vllm.sh [more options of `vllm serve`]
# TENSOR_PARALLEL is the number of GPUs to spread the model over; it must divide the model's $num_heads heads.
# The client's `model` chooses: $name is the base with the adapter, `base` is the base alone.
set -euo pipefail
cd "$$(dirname "$$0")/.."
exec vllm serve $base --served-model-name base --tokenizer . --generation-config . \
    --chat-template chat_template.jinja --dtype bfloat16 --tensor-parallel-size "$${TENSOR_PARALLEL:-1}" \
    --max-model-len $max_length --enable-lora --max-lora-rank $max_rank --lora-modules $shell_name=. \
    --reasoning-parser-plugin serving/reka_reasoning_parser.py --reasoning-parser reka "$$@"
