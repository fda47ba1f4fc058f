#!/usr/bin/env bash
# Fine-tune with a config on one or more GPUs, then merge and verify:
#   bash scripts/finetune.sh CONFIG MERGED_DIR [options of qlora train, section.key=value …]
# Ctrl-C or SIGTERM saves the run and exits with 130 or 143; the same command, without --fresh, continues it. A finished
# run is not trained again. A run that was trained further, for example with a higher train.max_steps, is merged again.
# --dry-run and --replay are refused because they train nothing.
set -euo pipefail
usage="usage: finetune.sh CONFIG MERGED_DIR [options of qlora train, section.key=value …]"
if [ $# -lt 2 ]; then
  echo "$usage" >&2
  exit 2
fi
config=$1
merged=$2
shift 2
here=${0%"${0##*/}"} # not dirname: Bash loses a SIGINT that arrives while it waits for a command
here=${here:-./}
source "${here}forward.sh"

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
launch=(qlora)
if [ "$gpus" -gt 1 ]; then
  launch=(accelerate launch --num_processes "$gpus" -m qlora)
  # The launcher forwards signals too, but by default it kills processes that have not saved after 30 seconds.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
  trap '' USR1 # it would end the launcher; signal the process in run.lock instead
fi

report=$(mktemp)
trap 'rm -f "$report"' EXIT
code=0
forward "${launch[@]}" train "$config" "$@" --report "$report" || code=$?
if [ "$code" != 0 ]; then
  # After a signal, accelerate exits with 1 even if the run has saved its state.
  if [ "$stop_code" != 0 ] && grep -q '"status": "interrupted"' "$report"; then
    code=$stop_code
  fi
  exit "$code"
fi
run=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["run_dir"])' "$report")
forward bash "${here}export.sh" "$run" "$merged"
