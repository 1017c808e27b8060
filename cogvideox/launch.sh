# shellcheck shell=bash
# How the shell scripts start a program and pass signals on to it. With the machines, from cluster.sh.

# shellcheck source=cogvideox/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

# pass_signals_as SIGNAL COMMAND...: run the command, pass SIGTERM, SIGINT and SIGUSR1 on to it as SIGNAL, return its exit code.
# `received` then holds the names of the signals that came, such as " USR1 TERM".
#
# accelerate takes SIGTERM: it passes that on, the trainer finishes its step, saves and ends, and accelerate gives it 30 seconds.
# SIGUSR1 (Slurm's warning) would kill accelerate and leave the trainer behind, so it ignores that one.
pass_signals_as() {
  local signal=$1 name
  shift
  received="" running=""
  for name in TERM INT USR1; do
    # shellcheck disable=SC2064  # the names of now
    trap "received+=' $name'; signal_running $signal" "$name"
  done
  {
    [[ "$signal" == USR1 ]] || trap '' USR1
    exec "$@"
  } &
  running=$!
  [[ -z "$received" ]] || signal_running "$signal"  # one that came before its number was known
  while kill -0 "$running" 2>/dev/null; do
    wait "$running" || true  # a signal ends this wait, not the command
  done
  wait "$running"  # bash remembers how it ended
}

signal_running() {
  [[ -z "$running" ]] || kill -s "$1" "$running" 2>/dev/null || true
}
