# shellcheck shell=bash
# Starting a program from the shell scripts and forwarding signals to it. Sources cluster.sh.

# shellcheck source=cogvideox/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

# keep_rate_for_adam FLAG...: empties RATE_ARGS where the user's flags choose Prodigy or full fine-tuning. The guide's rate is for
# Adam and a LoRA: Prodigy would hardly move, and all weights would move ten times too far. The trainer has a default for each.
keep_rate_for_adam() {
  local flags=" $* "
  if [[ "${flags,,}" =~ \ --(optimizer[\ =]prodigy|training_type[\ =]sft)\  ]]; then
    RATE_ARGS=()
  fi
}

# pass_signals_as SIGNAL COMMAND...: runs the command, forwards SIGTERM, SIGINT, SIGHUP and SIGUSR1 to it as SIGNAL, and returns
# its exit code. `received` then holds the names of the received signals, such as " USR1 TERM".
#
# accelerate needs SIGTERM: it forwards SIGTERM to the trainer, which finishes its step, saves and exits. SIGUSR1 (Slurm's warning) and
# SIGHUP (a closed terminal) would kill accelerate itself, so it is started with both ignored, and torch's launcher inside it must not
# arm SIGHUP again: under nohup, which bash obeys, the run then outlives a hang-up. In a session of its own accelerate hears of Ctrl-C
# and of the terminal's end from this script only, once: at a second signal it would leave its trainers.
pass_signals_as() {
  local signal=$1 name
  shift
  received="" running=""
  for name in TERM INT HUP USR1; do
    # shellcheck disable=SC2064  # expand the names now
    trap "received+=' $name'; signal_running $signal" "$name"
  done
  {
    if [[ "$signal" != USR1 ]]; then
      trap '' USR1 HUP
      export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT  # the default has SIGHUP; old versions of torch do not read it
      # Seconds from the signal to SIGKILL. The default, 30, is shorter than a step of the 5B with accumulation.
      export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
      if command -v setsid >/dev/null; then  # Linux
        # A SIGKILL to this script's group would not reach it there: it gets a SIGTERM when the script is gone.
        command -v setpriv >/dev/null && set -- setpriv --pdeathsig TERM "$@"
        set -- setsid "$@"
      fi
    fi
    exec "$@"
  } &
  running=$!
  [[ -z "$received" ]] || signal_running "$signal"  # one that arrived before the command's process id was known
  while kill -0 "$running" 2>/dev/null; do
    wait "$running" || true  # a signal ends this wait, not the command
  done
  wait "$running"  # the exit code, which bash keeps
}

signal_running() {
  [[ -z "$running" ]] || kill -s "$1" "$running" 2>/dev/null || true
}
