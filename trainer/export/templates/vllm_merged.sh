#!/usr/bin/env bash
# Serve this export with vLLM 0.30 or newer:  bash serving/vllm.sh [more options of `vllm serve`]
# TENSOR_PARALLEL is the number of GPUs to spread the model over; it must divide the model's $num_heads heads.
set -euo pipefail
cd "$$(dirname "$$0")/.."
exec vllm serve . --served-model-name $shell_name --dtype bfloat16 --tensor-parallel-size "$${TENSOR_PARALLEL:-1}" \
    --max-model-len $max_length \
    --reasoning-parser-plugin serving/reka_reasoning_parser.py --reasoning-parser reka "$$@"
