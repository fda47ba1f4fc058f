# Forward a script's signals to the command it runs. Source this file, then:
#   forward COMMAND [ARGUMENT …]
# runs the command and returns its exit code. SIGINT, SIGTERM, SIGHUP and SIGUSR1 reach the command exactly once, whether
# they are sent to the script alone (by a service manager) or to its process group (by Ctrl-C). A second SIGTERM would
# stop a run without saving. After a signal to stop, `forward` returns a nonzero code and starts no further command.
child=
signalled=
unstarted=
stop_code=0

pass_on() {
  signalled=$1
  case $1 in HUP) stop_code=129 ;; INT) stop_code=130 ;; TERM) stop_code=143 ;; esac
  if [ -z "$child" ]; then
    return 0
  elif kill -0 -- "-$child" 2>/dev/null; then
    kill -s "$1" "$child" 2>/dev/null || true
  elif [ "$stop_code" != 0 ]; then
    # It does not lead its own group yet, so the command has not started, and Bash or Python, which are about to start
    # it, may swallow any other signal.
    unstarted=yes
    { kill -s KILL "$child" && wait "$child"; } 2>/dev/null || true # wait here, or Bash reports that it was killed
  fi
}
for signal in HUP INT TERM USR1; do
  # shellcheck disable=SC2064 # expand the name now
  trap "pass_on $signal" "$signal"
done

# Bash runs traps only during `wait`, so the command runs in the background. There, Bash puts it into the script's own
# process group and makes it ignore SIGINT. This changes both. (`set -m` would too, but stops a script started with `&`.)
in_own_group='import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setpgid(0, 0)  # signals are forwarded from here on
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)
    sys.exit(127)'

# Use the checkout's virtual environment if none is active, as in a cron job.
checkout=${BASH_SOURCE[0]%"${BASH_SOURCE[0]##*/}"}..
if ! command -v qlora >/dev/null && [ -x "$checkout/.venv/bin/qlora" ]; then
  PATH=$(cd "$checkout" && pwd)/.venv/bin:$PATH
fi

forward() {
  local code
  [ "$stop_code" = 0 ] || return "$stop_code"
  python -c "$in_own_group" "$@" <&0 &
  child=$!
  [ "$stop_code" = 0 ] || pass_on "$signalled" # it came while the command was being started
  while true; do
    signalled=
    code=0
    wait "$child" || code=$?
    [ -n "$signalled" ] || break # otherwise the signal ended the wait, not the command
  done
  child=
  # The command was stopped before it started, or finished before the signal reached it.
  if [ -n "$unstarted" ] || [ "$code" = 0 ]; then
    code=$stop_code
  fi
  return "$code"
}
