# shellcheck shell=bash
# How the shell scripts start the trainer and hand signals on to it.

# Memory in segments that can grow: less of it is lost to fragments, so fewer runs end out of memory.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# without_usr1 COMMAND...: run it so that SIGUSR1 does nothing to it; to be started in the background.
without_usr1() {
  trap '' USR1
  exec "$@"
}

# wait_for PROCESS: wait until it has ended and return its exit code. A signal ends bash's wait, not the process.
wait_for() {
  local code=0
  wait "$1" || code=$?
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
  return "$code"
}

# launch FLAG...: run `accelerate launch` with these flags and end the script with its exit code.
#
# SIGTERM, SIGINT and SIGUSR1 go to the launcher as SIGTERM, which it hands on. The trainer finishes its step, saves and ends;
# the launcher then gives it 30 seconds. Of SIGUSR1 (Slurm's warning) the launcher would die and leave the trainer behind, so it
# never hears it.
launch() {
  local code=0
  launcher=""
  trap '[[ -z "$launcher" ]] || kill -TERM "$launcher" 2>/dev/null || true' TERM INT USR1
  without_usr1 accelerate launch "$@" &
  launcher=$!
  wait_for "$launcher" || code=$?
  exit "$code"
}
