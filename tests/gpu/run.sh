#!/usr/bin/env bash
# Runs everything that needs a CUDA GPU, and writes its figures to runs/gpu:
#   bash tests/gpu/run.sh                 # skipped without a GPU
#   bash tests/gpu/run.sh --device cpu    # the same code at tiny sizes on a CPU: shows that it runs
#   MODEL=runs/smollm2-135m bash tests/gpu/run.sh    # the benchmarks too, with this model folder
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/gpu
python=${PYTHON:-python}
mkdir -p "$out"
# The files that a GPU runs otherwise; the sampler and the attention have their CPU tests there, too.
tests="tests/gpu tests/trainer/plan/test_calibrate.py"
if [ "${1:-}" = "--device" ] && [ "${2:-}" = "cpu" ]; then
  export CUDA_VISIBLE_DEVICES=
  $python -m pytest -q $tests tests/trainer/plan/test_plan_memory.py  # peak memory: test_memory.py on a GPU
  $python tests/gpu/throughput.py --device cpu --shapes tiny --tokens 64 128 --out "$out/throughput-cpu.json"
  $python tests/benchmarks/launches.py --layers 2 --out "$out/launches-cpu.json"
  exit
fi
if ! $python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "tests/gpu/run.sh: no CUDA GPU here: skipped (the CPU form: --device cpu)"
  exit
fi
export HF_HUB_OFFLINE=1  # nothing here needs a network
$python -c "import torch; print(torch.cuda.get_device_properties(0), 'torch', torch.__version__)" | tee "$out/gpu.txt"
determinism=tests/trainer/rloo/test_determinism.py::test_full_determinism_runs_nothing_that_raises_on_a_gpu
$python -m pytest -q $tests tests/trainer/rloo/kernels tests/trainer/rloo/sampler $determinism
$python tests/gpu/throughput.py --out "$out/throughput.json"
$python tests/gpu/attention.py --out "$out/attention.json"
$python tests/benchmarks/launches.py --out "$out/launches.json"
# Layers of the 21B model with random weights; its config is shipped. Exit status 1 says that the recipe does not fit this
# GPU: its rates are measured anyway. `launch=null`: sampling in process, whose decoding steps are measured, too.
$python -m rekatrain plan recipes/reka-flash-3/rloo-8k.yaml launch=null --calibrate "$out/rates.json" || [ $? -eq 1 ]
if [ -n "${MODEL:-}" ]; then
  for benchmark in roofline sampler; do
    $python tests/benchmarks/$benchmark.py --model "$MODEL" --device cuda --dtype bfloat16 --out "$out/$benchmark.json"
  done
  $python tests/benchmarks/rloo_vs_trl.py --model "$MODEL" --dtype bfloat16 --out "$out/rloo_vs_trl.json"
fi
