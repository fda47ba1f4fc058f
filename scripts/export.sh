#!/usr/bin/env bash
# Merge a run into 16-bit weights and verify them against the adapter; exits with 1 on a mismatch:
#   bash scripts/export.sh RUN DIR [options of qlora merge, as --dtype bfloat16]
# A merge that was interrupted is continued by the same command. If DIR already holds the run as it is now, it is only
# verified; if the run was trained further since, DIR is moved to DIR.old-1 and the run is merged again.
set -euo pipefail
usage="usage: export.sh RUN DIR [options of qlora merge]"
run=${1:?$usage}
merged=${2:?$usage}
merged=${merged%/}
shift 2
source "$(dirname "$0")/forward.sh"

report=$merged/merge_report.json
if [ -f "$report" ] && [ "$run/adapter/adapter_model.safetensors" -nt "$report" ]; then
  number=1
  while [ -e "$merged.old-$number" ]; do number=$((number + 1)); done
  mv "$merged" "$merged.old-$number"
  echo "$run was trained further since it was merged: moved the old merge to $merged.old-$number."
fi
if [ -f "$report" ]; then
  echo "$merged already holds $run as it is now: not merged again${*:+, and $* ignored}. Remove it to merge again."
else
  forward qlora merge "$run" -o "$merged" "$@"
fi
forward qlora verify "$run" "$merged"
