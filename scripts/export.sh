#!/usr/bin/env bash
# Merges a run into fp16 weights and holds them against the adapter; fails when they are apart:
#   bash scripts/export.sh runs/llama3-8b merged/llama3-8b [--dtype bfloat16 …]
set -euo pipefail
run=${1:?usage: export.sh RUN DIR [options of qlora merge]}
merged=${2:?usage: export.sh RUN DIR [options of qlora merge]}
shift 2
qlora merge "$run" -o "$merged" "$@"
qlora verify "$run" "$merged"
