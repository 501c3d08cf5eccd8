#!/usr/bin/env bash
# Sets up an environment of its own and runs all checks and tests:  bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh test
ruff format --check .
ruff check .
mypy
# Two workers, one thread each: the tests are many small models, and the wait is mostly for imports.
exec env OMP_NUM_THREADS=1 pytest -q "$@"
