#!/usr/bin/env bash
# From nothing to a served RLOO policy, on two CPU cores:  bash recipes/quickstart.sh
#
# Fetches a real model (SmolLM2-135M), measures it, trains it by SFT and RLOO to add two numbers in the Reka format,
# exports it, measures again and lets the exported folder answer. Everything goes to runs/quickstart. Interrupted, it
# goes on where it was when started again; to start over, delete that folder.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
source recipes/environment.sh quickstart

# glibc gives every large block back to the kernel, which then clears it page by page for the next matrix product.
export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000
export HF_HUB_OFFLINE=1

out=runs/quickstart
say() { printf '\n== %s (minute %d)\n' "$1" $((($(date +%s) - started) / 60)); }
measure() { # NAME MODEL: held-out accuracy, unless it is known already
    [ -f "$out/$1.json" ] || rekatrain evaluate recipes/smollm2/rloo.yaml \
        model.pretrained_model_name_or_path="$2" --out "$out/$1.json"
}

say "the model"
python recipes/smollm2/fetch_model.py "$out/smollm2-135m"
say "before training"
measure base "$out/smollm2-135m"
say "SFT: the format"
[ -f "$out/sft.jsonl" ] || python recipes/smollm2/make_sft_rows.py "$out/sft.jsonl"
[ -d "$out/sft-export" ] || {
    rekatrain train recipes/smollm2/sft.yaml --resume
    rekatrain export "$out/sft" "$out/sft-export"
}
measure sft "$out/sft-export"
say "RLOO: the answers"
[ -d "$out/rloo-export" ] || {
    rekatrain train recipes/smollm2/rloo.yaml --resume
    rekatrain export "$out/rloo" "$out/rloo-export"
}
measure rloo "$out/rloo-export"
say "what came of it"
python recipes/smollm2/summary.py "$out"
say "done"
