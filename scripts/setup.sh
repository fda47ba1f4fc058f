#!/usr/bin/env bash
# Creates .venv and installs qlora into it, with the extras named: bash scripts/setup.sh [plot,test,…]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "qlora needs Python 3.11 or newer; name one with PYTHON=… (this is $("$python" --version))" >&2; exit 1; }
# Without a GPU any build of torch will do, so take the one that the tests run on.
if ! command -v nvidia-smi >/dev/null; then
  export PIP_CONSTRAINT=${PIP_CONSTRAINT:-$PWD/.ci/constraints.txt}
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[${1:-plot}]"
