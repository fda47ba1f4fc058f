#!/usr/bin/env bash
# Merge a run into 16-bit weights and verify them against the adapter; exits with 1 on a mismatch:
#   bash scripts/export.sh RUN DIR [options of qlora merge, such as --dtype bfloat16]
# RUN is a run or one of its checkpoints. The same command continues an interrupted merge. If DIR already holds this
# merge, it is only verified. If it holds another one, for example of the run before it was trained further, DIR is
# moved to DIR.old-N and the run is merged again.
set -euo pipefail
usage="usage: export.sh RUN DIR [options of qlora merge]"
if [ $# -lt 2 ]; then
  echo "$usage" >&2
  exit 2
fi
run=$1
merged=$2
merged=${merged%/}
shift 2
here=${0%"${0##*/}"} # not dirname: Bash loses a SIGINT that arrives while it waits for a command
here=${here:-./}
source "${here}forward.sh"

# What chooses the adapter and its base is needed to verify them, too.
verified=("$run" "$merged")
before=
for option in "$@"; do
  case $before in --checkpoint | --base) verified+=("$before" "$option") ;; esac
  case $option in --checkpoint=* | --base=*) verified+=("$option") ;; esac
  before=$option
done

forward qlora merge "$run" -o "$merged" --update "$@"
forward qlora verify "${verified[@]}"
