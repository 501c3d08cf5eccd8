#!/usr/bin/env bash
# Serve one of this export's files with llama.cpp:  bash serving/llama_server.sh model-TYPE.gguf [more options]
#   -r "<sep>"                the stop of every request, whatever its client sends
#   --no-prefill-assistant    an open last turn is continued by the chat template, which writes the space before it
#   --reasoning-format none   llama.cpp knows no parser for <reasoning>: it stays in the content
set -euo pipefail
cd "$$(dirname "$$0")/.."
exec llama-server -m "$$1" --alias $shell_name --jinja -c $max_length -r "<sep>" --no-prefill-assistant \
    --reasoning-format none "$${@:2}"
