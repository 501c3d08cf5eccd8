#!/usr/bin/env bash
# All rows of the README's table "How fast is a step, compared with TRL?", one after the other: about 35 minutes.
#
#   bash tests/benchmarks/rloo_vs_trl.sh runs/smollm2-135m gsm8k.jsonl
#
# The tables are printed; a JSON report per row is in runs/benchmarks/. TRL needs 20 GB at 256 tokens.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: rloo_vs_trl.sh MODEL PROMPTS" >&2; exit 2; }
model=$(realpath "$1") prompts=$(realpath "$2")
cd "$(dirname "$0")/../.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)

row() { # NAME OPTION...
    local name=$1
    shift
    "$python" tests/benchmarks/rloo_vs_trl.py --model "$model" --prompts "$prompts" \
        --out "runs/benchmarks/rloo_vs_trl-$name.json" "$@"
}

row 64 --caps 64 --arms rekatrain trl-16 --steps 3 --micro-batch-tokens 600
row 64-beta --caps 64 --betas 0.05 --arms rekatrain trl-16 --steps 3 --micro-batch-tokens 800
row 64-equal --caps 64 --lengths equal --arms rekatrain trl-16 --steps 3 --micro-batch-tokens 800
row 256 --caps 256 --arms rekatrain trl-8 trl-16 --steps 2 --micro-batch-tokens 1200
