#!/usr/bin/env bash
# From nothing to a served RLOO policy, on two CPU cores:  bash recipes/quickstart.sh
#
# Fetch a real model (SmolLM2-135M), measure it, train it by SFT and RLOO to add two numbers in the Reka format, export
# it, measure again, and print answers of the exported folder. All files are in runs/quickstart. If it was interrupted,
# start it again to continue; delete that folder to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
source recipes/environment.sh quickstart

# glibc returns every large block to the kernel, which clears it page by page for the next matrix product.
export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000
export HF_HUB_OFFLINE=1

out=runs/quickstart
say() { printf '\n== %s (minute %d)\n' "$1" $((($(date +%s) - started) / 60)); }
measure() { # NAME MODEL: measure held-out accuracy, unless the result is there
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
say "results"
python recipes/smollm2/summary.py "$out"
rekatrain report "$out/rloo" "$out/sft" "$out"/{base,sft,rloo}.json --out "$out/report.html"
say "done: the run is in $out/rloo, the exported model in $out/rloo-export, the report in $out/report.html"
