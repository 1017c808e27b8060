#!/usr/bin/env bash
# Train a LoRA for CogVideoX-5B (text to video).
#
#   DATASET_PATH=~/disney bash examples/cogvideox_5b.sh                                       one GPU
#   SCRIPT=finetune_multi_gpus_1.sh DATASET_PATH=~/disney bash examples/cogvideox_5b.sh       all GPUs; once on each machine
# This wraps one of the two scripts: all of its variables and flags work here too, and flags at the end win.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

export MODEL_PATH="${MODEL_PATH:-THUDM/CogVideoX-5b}"      # hub id or folder of the base model
export OUTPUT_PATH="${OUTPUT_PATH:-cogvideox-5b-lora}"

FAMILY_ARGS=(
  --height 480                           # the size that the model was made for, in pixels
  --width 720
  --max_num_frames 49                    # 4k + 1
  --fps 8                                # frames per second that it was trained at
  --validation_scheduler dpm             # what the authors advise for this model
  --use_dynamic_cfg                      # likewise
)

exec bash "$ROOT/${SCRIPT:-finetune_single_gpu.sh}" "${FAMILY_ARGS[@]}" "$@"
