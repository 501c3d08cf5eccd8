#!/usr/bin/env bash
# Serve this reward model with vLLM 0.30 or newer:  bash serving/vllm.sh [more options of `vllm serve`]
# TENSOR_PARALLEL is the number of GPUs to spread the model over; it must divide the model's $num_heads heads.
# A recipe uses the server with serving/remote_reward_model.yaml. It returns raw scores (problem_type in config.json).
set -euo pipefail
cd "$$(dirname "$$0")/.."
exec vllm serve . --served-model-name $shell_name --runner pooling --dtype $dtype \
    --tensor-parallel-size "$${TENSOR_PARALLEL:-1}" --max-model-len $max_length --port 8001 "$$@"
