#!/usr/bin/env bash
# Serve this reward model with vLLM 0.30 or newer:  bash serving/vllm.sh [more options of `vllm serve`]
# Set TENSOR_PARALLEL to the number of GPUs to spread the model over; it must divide the model's $num_heads heads.
# A recipe asks it by serving/remote_reward_model.yaml. It answers with raw scores, as config.json's problem_type says.
set -euo pipefail
cd "$$(dirname "$$0")/.."
exec vllm serve . --served-model-name $shell_name --runner pooling --dtype $dtype \
    --tensor-parallel-size "$${TENSOR_PARALLEL:-1}" --max-model-len $max_length --port 8001 "$$@"
