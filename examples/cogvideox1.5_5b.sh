#!/usr/bin/env bash
# Train a LoRA for CogVideoX1.5-5B (text to video).
#
#   DATASET_PATH=~/disney bash examples/cogvideox1.5_5b.sh                                    one GPU
#   SCRIPT=finetune_multi_gpus_1.sh DATASET_PATH=~/disney bash examples/cogvideox1.5_5b.sh    all GPUs; once on each machine
# This wraps one of the two scripts: all of its variables and flags work here too, and flags at the end win.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

export MODEL_PATH="${MODEL_PATH:-THUDM/CogVideoX1.5-5B}"   # hub id or folder of the base model
export OUTPUT_PATH="${OUTPUT_PATH:-cogvideox1.5-5b-lora}"

FAMILY_ARGS=(
  --height 768                           # the only size for which all of the model's positions are used, in pixels
  --width 1360
  --max_num_frames 81                    # 16N + 1: the model was trained on no other lengths
  --fps 16                               # frames per second that it was trained at
  --validation_scheduler dpm             # what the authors advise for this model
  --use_dynamic_cfg                      # likewise
)

exec bash "$ROOT/${SCRIPT:-finetune_single_gpu.sh}" "${FAMILY_ARGS[@]}" "$@"
