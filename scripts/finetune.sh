#!/usr/bin/env bash
# Fine-tunes by a recipe on one or more GPUs, then merges and verifies:
#   bash scripts/finetune.sh configs/llama3_8b_24gb.yaml merged/llama3-8b [section.key=value …]
# Run again, it continues where it stopped.
set -euo pipefail
config=${1:?usage: finetune.sh CONFIG MERGED_DIR [section.key=value …]}
merged=${2:?usage: finetune.sh CONFIG MERGED_DIR [section.key=value …]}
shift 2
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
launch=(qlora)
if [ "$gpus" -gt 1 ]; then
  launch=(accelerate launch --num_processes "$gpus" -m qlora)
fi
report=$("${launch[@]}" train "$config" "$@" --json | tail -n 1)
run=$(python -c 'import json, sys; print(json.loads(sys.argv[1])["run_dir"])' "$report")
if [ -f "$merged/merge_report.json" ]; then
  qlora verify "$run" "$merged"
else
  bash "$(dirname "$0")/export.sh" "$run" "$merged"
fi
