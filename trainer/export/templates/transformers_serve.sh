#!/usr/bin/env bash
# Serve this export with transformers:  pip install 'transformers[serving]', then
#   bash serving/transformers_serve.sh [more options of `transformers serve`]
# A client names the folder as its `model`, and must send "stop": ["<sep>"]. The answer ends in <sep>; the reasoning is in it.
set -euo pipefail
cd "$$(dirname "$$0")/.."
folder=$$(basename "$$PWD")
cd ..
exec transformers serve "$$folder" "$$@"
