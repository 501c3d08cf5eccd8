#!/usr/bin/env bash
# Reward against wall time with a real vLLM, for max_staleness 0, 1 and 4: one core for the server, one for the trainer.
#
#   VLLM_PYTHON=~/vllm/bin/python bash tests/benchmarks/staleness.sh [--rounds 2] [--staleness 0 1 4] [key=value ...]
#
# It needs the model of recipes/quickstart.sh. The table is printed; staleness.json, a plot and the runs are in
# runs/benchmarks/.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${VLLM_PYTHON:?set it to the Python of an environment with vLLM}"
recipe=recipes/smollm2/staleness.yaml out=runs/benchmarks
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)

read -ra cores < <("$python" -c "import os; print(*sorted(os.sched_getaffinity(0)))")
[ "${#cores[@]}" -ge 2 ] || { echo "this needs two cores" >&2; exit 2; }
port=$("$python" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
url=http://127.0.0.1:$port

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# glibc returns every large block to the kernel, which clears it page by page for the next matrix product.
export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000
mkdir -p "$out"
rm -rf "$out/staleness" # the runs of the last time

# 1. Start the server, in a separate process group, so that its engine ends with it.
set -m
VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" \
    taskset -c "${cores[1]}" "$python" -m rekatrain serve-rollouts "$recipe" --port "$port" >"$out/staleness-server.log" 2>&1 &
server=$!
set +m
trap 'kill -TERM -- -$server 2>/dev/null; sleep 2; kill -KILL -- -$server 2>/dev/null; true' EXIT
for _ in $(seq 600); do
    curl -fsS "$url/health" >/dev/null 2>&1 && break
    kill -0 $server 2>/dev/null || { tail -20 "$out/staleness-server.log" >&2; exit 1; }
    sleep 1
done
curl -fsS "$url/health" >/dev/null || { echo "the server is not ready after 600 s: $out/staleness-server.log" >&2; exit 1; }

# 2. Run the arms, interleaved.
taskset -c "${cores[0]}" "$python" tests/benchmarks/staleness.py "$recipe" --url "$url" --out "$out/staleness.json" --rounds 2 "$@"
