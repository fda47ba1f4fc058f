# Forwards a script's signals to the command that it runs. Source this file, then:
#   forward COMMAND [ARGUMENT …]
# runs the command and returns its exit code. SIGINT, SIGTERM, SIGHUP and SIGUSR1 reach the command exactly once, whether
# they are sent to the script alone (a service manager) or to its process group (Ctrl-C): a second SIGTERM would stop a
# run without saving. After a signal to stop, `forward` returns a nonzero code and starts no further command.
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
    # It does not lead its own group yet: the command has not been started, and Bash or Python, which are about to start
    # it, may swallow any other signal.
    unstarted=yes
    { kill -s KILL "$child" && wait "$child"; } 2>/dev/null || true # here, as Bash would report that it was killed
  fi
}
for signal in HUP INT TERM USR1; do
  # shellcheck disable=SC2064 # the name of now
  trap "pass_on $signal" "$signal"
done

# Bash runs traps during `wait` alone, so the command runs in the background; there Bash puts it into the script's own
# process group and has it ignore SIGINT. This changes both. (`set -m` would too, but stops a script started with `&`.)
in_own_group='import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setpgid(0, 0)  # from here on signals are forwarded
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)
    sys.exit(127)'

forward() {
  local code
  [ "$stop_code" = 0 ] || return "$stop_code"
  python -c "$in_own_group" "$@" <&0 &
  child=$!
  [ "$stop_code" = 0 ] || pass_on "$signalled" # which came while the command was being started
  while true; do
    signalled=
    code=0
    wait "$child" || code=$?
    [ -n "$signalled" ] || break # else it was the signal that ended the wait, and not the command
  done
  child=
  # It was stopped before it started, or finished before the signal reached it.
  if [ -n "$unstarted" ] || [ "$code" = 0 ]; then
    code=$stop_code
  fi
  return "$code"
}
