#!/usr/bin/env bash
# Serve one of this export's files with llama.cpp:  bash serving/llama_server.sh model-TYPE.gguf [more options]
#   -r "<sep>"                stops every request at <sep>, whether or not the client names it
#   --no-prefill-assistant    lets the chat template continue an open last turn, with the space before its text
#   --reasoning-format none   leaves the reasoning in the content: llama.cpp has no parser for <reasoning>
set -euo pipefail
cd "$$(dirname "$$0")/.."
exec llama-server -m "$$1" --alias $shell_name --jinja -c $max_length -r "<sep>" --no-prefill-assistant \
    --reasoning-format none "$${@:2}"
