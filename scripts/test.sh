#!/usr/bin/env bash
# Install the test extras, then check format, lint, types and the import contract, and run the tests.
# Arguments are passed to pytest: bash scripts/test.sh -k merge
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/lint-imports --no-cache
# One process per core, with one thread each. On a GPU they would share its memory: bash scripts/test.sh -m gpu -n 0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Each takes a run of neighbouring tests, which share their files' fixtures, and then what another has left.
.venv/bin/pytest -n auto --dist worksteal "$@"
