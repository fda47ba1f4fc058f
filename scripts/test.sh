#!/usr/bin/env bash
# Installs the test extras and runs format, lint, types, the import contract and the tests.
# Arguments go to pytest: bash scripts/test.sh -k merge
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/lint-imports --no-cache
# A process per core, of one thread each; on a GPU they would share its memory: bash scripts/test.sh -m gpu -n 0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Each takes a run of neighbouring tests, which share their files' fixtures, and then what another has left.
.venv/bin/pytest -n auto --dist worksteal "$@"
