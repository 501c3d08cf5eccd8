#!/usr/bin/env bash
# Sets up an environment of its own and runs all checks and tests:  bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh test
ruff format --check .
ruff check .
mypy
# Two workers, one thread each: the tests are many small models, and the wait is mostly for imports. A file is one
# worker's, as its tests share what they made; those of whole runs, the longest, come first.
exec env OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
