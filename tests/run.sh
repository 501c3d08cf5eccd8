#!/usr/bin/env bash
# Sets up a separate environment and runs the checks and tests:  bash tests/run.sh [pytest arguments]
# Without arguments the slow tests are left out; `-m ""` runs all.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh test
ruff format --check .
ruff check .
mypy
# Two workers with one thread each: the models are small, and most of the time goes to imports. The tests of a file
# share fixtures, so a file stays on one worker. The order of collection is kept: the longest tests come first.
exec env OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" "$@"
