#!/usr/bin/env bash
# Runs everything that needs a CUDA GPU, and writes its figures to runs/gpu:
#   bash tests/gpu/run.sh                 # skipped without a GPU
#   bash tests/gpu/run.sh --device cpu    # the same code at tiny sizes on a CPU: shows that it runs
#   MODEL=runs/smollm2-135m bash tests/gpu/run.sh    # the benchmarks too, with this model folder
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/gpu
python=${PYTHON:-python}
if [ "${1:-}" = "--device" ] && [ "${2:-}" = "cpu" ]; then
  export CUDA_VISIBLE_DEVICES=
  $python -m pytest -q tests/gpu
  $python tests/gpu/throughput.py --device cpu --shapes tiny --tokens 64 128 --out "$out/throughput-cpu.json"
  exit
fi
if ! $python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "tests/gpu/run.sh: no CUDA GPU here: skipped (the CPU form: --device cpu)"
  exit
fi
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/gpu.csv"
$python -m pytest -q tests/gpu tests/trainer/rloo/kernels tests/trainer/rloo/sampler tests/trainer/rloo/test_determinism.py
$python tests/gpu/throughput.py --out "$out/throughput.json"
# Exit status 1 says that the recipe does not fit this GPU; its rates are measured anyway.
$python -m rekatrain plan recipes/smollm2/rloo.yaml --calibrate "$out/rates.json" || [ $? -eq 1 ]
if [ -n "${MODEL:-}" ]; then
  for benchmark in roofline sampler; do
    $python tests/benchmarks/$benchmark.py --model "$MODEL" --device cuda --out "$out/$benchmark.json"
  done
  $python tests/benchmarks/rloo_vs_trl.py --model "$MODEL" --out "$out/rloo_vs_trl.json"
fi
