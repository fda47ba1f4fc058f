#!/usr/bin/env bash
# Create .venv and install qlora into it with the given extras:
#   bash scripts/setup.sh [plot,test,…]
# PYTHON is the Python to use; TORCH_INDEX is a package index for torch that replaces pip's default.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "qlora needs Python 3.11 or newer, but this is $("$python" --version); set PYTHON=… to another one" >&2; exit 1; }
extras=${1:-plot}
if ! command -v nvidia-smi >/dev/null; then
  # Without a GPU, any build of torch works; use the version that the tests run on.
  export PIP_CONSTRAINT=${PIP_CONSTRAINT:-$PWD/.ci/constraints.txt}
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
install=(.venv/bin/python -m pip install --disable-pip-version-check)
if [ -n "${TORCH_INDEX:-}" ]; then
  "${install[@]}" --index-url "$TORCH_INDEX" torch
fi
"${install[@]}" -e ".[$extras]"
printf '\nqlora is installed in .venv. Next:\n  source .venv/bin/activate\n  qlora init\n'
