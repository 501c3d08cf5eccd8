#!/usr/bin/env bash
# One policy, three tasks, four rewards, on two CPU cores:  bash recipes/multi-task.sh
#
# After recipes/quickstart.sh, which fetches SmolLM2-135M. SFT teaches the format of sums, small functions and short
# chats; six layers of the same model become a reward model that prefers politeness; RLOO then raises the rewards of all
# three tasks. Held-out prompts are answered before and after. All files are in runs/multi-task. If it was interrupted,
# start it again to continue. PREFERENCES is the URL of the preferences, such as file:///tmp/pairs.json (GitHub).
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh quickstart
export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000
export HF_HUB_OFFLINE=1

out=runs/multi-task
recipe=recipes/smollm2/multi-task-rloo.yaml
base=runs/quickstart/smollm2-135m
python recipes/smollm2/fetch_model.py "$base"
[ -f runs/politeness/train.jsonl ] ||
    python recipes/smollm2/make_preferences.py runs/politeness ${PREFERENCES:+--source "$PREFERENCES"}
[ -f "$out/sft.jsonl" ] || python recipes/smollm2/make_multi_task_rows.py runs/politeness "$out"
[ -d "$out/sft-export" ] || {
    rekatrain train recipes/smollm2/multi-task-sft.yaml --resume
    rekatrain export "$out/sft" "$out/sft-export"
}
[ -d "$out/reward-export" ] || {
    python recipes/smollm2/first_layers.py "$base" "$out/first-layers"
    rekatrain train recipes/smollm2/multi-task-reward.yaml --resume
    rekatrain export "$out/reward" "$out/reward-export"
}
[ -f "$out/first.json" ] || rekatrain evaluate "$recipe" --out "$out/first.json"
rekatrain train "$recipe" --resume
[ -f "$out/last.json" ] ||
    rekatrain evaluate "$recipe" model.pretrained_model_name_or_path="$out/rloo" --out "$out/last.json"
for reward in reasoning_format math_answer code_tests; do
    rekatrain compare "$out/first.json" "$out/last.json" --reward "$reward"
done
python recipes/smollm2/parts.py "$out/first.json" "$out/last.json"
