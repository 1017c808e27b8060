# shellcheck shell=bash
# The cluster's layout for the shell scripts: number of machines, this machine's rank, processes per machine, main address.
#
# find_machines sets NNODES, NODE_RANK, GPUS_PER_NODE, MASTER_ADDR and MASTER_PORT. A value that the user set wins; the others
# come from the first of these sources that has them, and a contradiction ends the script with exit code 2:
#   Slurm                      the step that srun started: SLURM_STEP_NUM_NODES or SLURM_NNODES, SLURM_NODEID, ...
#   torchrun and Kubernetes    PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR, PET_MASTER_PORT
#   torchrun's own variables   GROUP_WORLD_SIZE, GROUP_RANK, LOCAL_WORLD_SIZE
#   a PyTorchJob or similar    WORLD_SIZE, RANK. They count machines here, because the script starts once on each; if
#                              LOCAL_WORLD_SIZE is set too, WORLD_SIZE counts processes

refuse() {
  echo "ERROR[2]: $*" >&2
  exit 2
}

# first_set NAME...: prints the name of the first of these variables that has a value.
first_set() {
  local name
  for name; do
    if [[ -n "${!name:-}" ]]; then
      echo "$name"
      return
    fi
  done
}

# take OWN OTHER...: OWN keeps its value or takes that of the first OTHER that has one; OWN_FROM is the source's name.
# The others must agree with each other. A value that the user set wins over them, with a note.
take() {
  local own=$1 from="$1_FROM" other
  shift
  if [[ -n "${!own:-}" && -z "${!from:-}" ]]; then
    printf -v "$from" %s "$own"
  fi
  for other; do
    if [[ -z "${!other:-}" ]]; then
      continue
    elif [[ -z "${!own:-}" ]]; then
      printf -v "$own" %s "${!other}"
      printf -v "$from" %s "$other"
    elif [[ "${!other}" != "${!own}" && "${!from}" == "$own" ]]; then
      echo "note: $own=${!own} is used, not $other=${!other}" >&2
    elif [[ "${!other}" != "${!own}" ]]; then
      refuse "$other=${!other} and ${!from}=${!own} must be equal: unset the wrong one, or set $own, which wins over both"
    fi
  done
}

# default OWN VALUE SOURCE: sets OWN if it has no value.
default() {
  local own=$1 from="$1_FROM"
  if [[ -z "${!own:-}" ]]; then
    printf -v "$own" %s "$2"
    printf -v "$from" %s "$3"
  fi
}

# whole OWN LOWEST HIGHEST WAY_OUT: rejects a value that is not a whole number in this range.
whole() {
  local own=$1 from="$1_FROM"
  if [[ ! "${!own}" =~ ^[0-9]{1,9}$ ]] || ((10#${!own} < $2 || 10#${!own} > $3)); then
    refuse "${!from}=${!own} must be a whole number from $2 to $3: $4"
  fi
  printf -v "$own" %d "$((10#${!own}))"
}

# first_host LIST: the first host of a Slurm host list, such as node[01-04,7],login or rack[1-2]-node[3,4].
first_host() {
  local rest=$1 host=""
  if command -v scontrol >/dev/null && host="$(scontrol show hostnames "$1" 2>/dev/null)" && [[ -n "$host" ]]; then
    echo "${host%%$'\n'*}"
    return
  fi
  host=""
  while [[ "$rest" =~ ^([^],[]*)\[([^],[-]*)[^]]*\](.*)$ ]]; do
    host+="${BASH_REMATCH[1]}${BASH_REMATCH[2]}"
    rest="${BASH_REMATCH[3]}"
  done
  echo "$host${rest%%,*}"
}

# Rejects a second start of this script on one machine: it starts the processes itself.
refuse_second_start() {
  local tasks name way_out="run it with bash, once on each machine"
  if [[ -n "${TORCHELASTIC_RUN_ID:-}" && -n "${LOCAL_RANK:-}" ]]; then
    refuse "LOCAL_RANK=$LOCAL_RANK with TORCHELASTIC_RUN_ID must be unset: torchrun or accelerate launch started this script," \
      "which starts the processes of a machine itself; $way_out"
  fi
  if [[ -n "${SLURM_STEP_ID:-${SLURM_STEPID:-}}" ]]; then
    tasks="$(first_set SLURM_STEP_TASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_NTASKS_PER_NODE)"
    if [[ -n "$tasks" && ! "${!tasks}" =~ ^1(\(x[0-9]+\))?$ ]]; then
      refuse "$tasks=${!tasks} must be 1: this script starts the processes of a machine itself; srun --ntasks-per-node=1"
    fi
  fi
  for name in SLURM_LOCALID LOCAL_RANK; do
    if [[ "${!name:-0}" != 0 ]]; then
      refuse "$name=${!name} must be 0: this script starts the processes of a machine itself; $way_out (srun --ntasks-per-node=1)"
    fi
  done
}

# Unset the variables of an outer launcher, which ours would misread as its own.
forget_other_launchers() {
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE
  unset TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE
  unset "${!PET_@}"  # the launcher reads every one of them as a flag of torchrun
}

# find_machines FLAG...: the trainer's flags, of which --cpu means one process.
find_machines() {
  local slurm_nodes slurm_hosts slurm_step="${SLURM_STEP_ID:-${SLURM_STEPID:-}}" processes gpus
  unset NNODES_FROM NODE_RANK_FROM GPUS_PER_NODE_FROM MASTER_ADDR_FROM MASTER_PORT_FROM
  refuse_second_start
  slurm_nodes="$(first_set SLURM_STEP_NUM_NODES SLURM_NNODES SLURM_JOB_NUM_NODES)"
  slurm_hosts="$(first_set SLURM_STEP_NODELIST SLURM_JOB_NODELIST SLURM_NODELIST)"
  if [[ -z "${NNODES:-}" && -n "$slurm_nodes" && "${!slurm_nodes}" != 1 && -z "$slurm_step" ]]; then
    refuse "$slurm_nodes=${!slurm_nodes} must be 1 if srun did not start this script, because the other machines would not take part:" \
      "start it with srun --ntasks-per-node=1, or set NNODES=1 to use only this machine"
  fi

  # Machines.
  take NNODES ${slurm_nodes:+"$slurm_nodes"} PET_NNODES GROUP_WORLD_SIZE
  if [[ -z "${NNODES:-}" && -n "${WORLD_SIZE:-}" && -n "${LOCAL_WORLD_SIZE:-}" ]]; then
    if [[ ! "$WORLD_SIZE $LOCAL_WORLD_SIZE" =~ ^[1-9][0-9]{0,8}\ [1-9][0-9]{0,8}$ ]] || ((WORLD_SIZE % LOCAL_WORLD_SIZE)); then
      refuse "WORLD_SIZE=$WORLD_SIZE must be a multiple of LOCAL_WORLD_SIZE=$LOCAL_WORLD_SIZE: set NNODES and GPUS_PER_NODE instead"
    fi
    default NNODES "$((WORLD_SIZE / LOCAL_WORLD_SIZE))" "WORLD_SIZE / LOCAL_WORLD_SIZE"
  elif [[ -z "${NNODES:-}" ]]; then
    take NNODES WORLD_SIZE
  fi
  default NNODES 1 default
  whole NNODES 1 99999 "set NNODES to the number of machines, which cannot change during a run"

  # This machine's rank.
  take NODE_RANK SLURM_NODEID PET_NODE_RANK GROUP_RANK
  if [[ "${WORLD_SIZE:-}" == "$NNODES" ]]; then
    take NODE_RANK RANK  # one rank per machine
  fi
  if ((NNODES == 1)); then
    default NODE_RANK 0 default
  elif [[ -z "${NODE_RANK:-}" ]]; then
    refuse "NODE_RANK must be set, because $NNODES_FROM=$NNODES: give each machine its own, from 0 to $((NNODES - 1)), or set NNODES=1"
  fi
  whole NODE_RANK 0 "$((NNODES - 1))" "NNODES is $NNODES ($NNODES_FROM); set NODE_RANK, from 0 on the first machine"

  # Processes per machine.
  take GPUS_PER_NODE SLURM_GPUS_ON_NODE LOCAL_WORLD_SIZE
  if [[ "${PET_NPROC_PER_NODE:-}" =~ ^[0-9]+$ ]]; then  # it may be "auto" or "gpu"
    take GPUS_PER_NODE PET_NPROC_PER_NODE
  fi
  if [[ -z "${GPUS_PER_NODE:-}" ]]; then
    gpus="$(python -P "$(dirname "${BASH_SOURCE[0]}")/device.py" "$@")" || exit 2  # it has said why
    default GPUS_PER_NODE "$gpus" "the GPUs here"
  fi
  whole GPUS_PER_NODE 1 1024 "set GPUS_PER_NODE, the same on all machines"
  if [[ -n "${WORLD_SIZE:-}" && "$WORLD_SIZE" != "$NNODES" && "$WORLD_SIZE" != "$((NNODES * GPUS_PER_NODE))" ]]; then
    if [[ "$NNODES_FROM" != NNODES && "$GPUS_PER_NODE_FROM" != GPUS_PER_NODE ]]; then
      refuse "WORLD_SIZE=$WORLD_SIZE must be $NNODES, the machines ($NNODES_FROM), or $((NNODES * GPUS_PER_NODE)), with $GPUS_PER_NODE" \
        "processes on each ($GPUS_PER_NODE_FROM): unset it, or set NNODES and GPUS_PER_NODE"
    fi
    echo "note: NNODES=$NNODES and GPUS_PER_NODE=$GPUS_PER_NODE are used, not WORLD_SIZE=$WORLD_SIZE" >&2
  fi

  # The main address. The port depends on Slurm's job and step ids, so that two jobs on one machine get different ports.
  take MASTER_ADDR PET_MASTER_ADDR
  if ((NNODES == 1)); then
    default MASTER_ADDR 127.0.0.1 default
  elif [[ -n "$slurm_hosts" ]]; then
    default MASTER_ADDR "$(first_host "${!slurm_hosts}")" "$slurm_hosts"
  fi
  if [[ -z "${MASTER_ADDR:-}" ]]; then
    refuse "MASTER_ADDR must be set, because $NNODES_FROM=$NNODES: the address at which the other machines reach the first (NODE_RANK 0)"
  fi
  if ((NODE_RANK > 0)) && [[ "$MASTER_ADDR" =~ ^(127\.|localhost$|::1$) ]]; then
    echo "note: MASTER_ADDR=$MASTER_ADDR is this machine itself; it is usually the address of the first one" >&2
  fi
  take MASTER_PORT PET_MASTER_PORT
  if [[ "${SLURM_JOB_ID:-}" =~ ^[0-9]{1,12}$ ]]; then
    [[ "$slurm_step" =~ ^[0-9]{1,5}$ ]] || slurm_step=0
    default MASTER_PORT "$((10000 + (10#$SLURM_JOB_ID + 1009 * 10#$slurm_step) % 20000))" SLURM_JOB_ID
  fi
  default MASTER_PORT 29500 default
  whole MASTER_PORT 1 65535 "set MASTER_PORT to a port that is free on the first machine"

  forget_other_launchers
  processes="processes"
  ((GPUS_PER_NODE > 1)) || processes="process"
  echo "machine $NODE_RANK of $NNODES ($NODE_RANK_FROM, $NNODES_FROM), $GPUS_PER_NODE $processes each ($GPUS_PER_NODE_FROM)," \
    "main at $MASTER_ADDR:$MASTER_PORT ($MASTER_ADDR_FROM, $MASTER_PORT_FROM)" >&2
}
