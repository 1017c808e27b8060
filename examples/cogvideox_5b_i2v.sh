#!/usr/bin/env bash
# Train a LoRA for CogVideoX-5B-I2V (image to video).
#
#   DATASET_PATH=~/disney bash examples/cogvideox_5b_i2v.sh                                     one GPU
#   SCRIPT=finetune_multi_gpus_1.sh DATASET_PATH=~/disney bash examples/cogvideox_5b_i2v.sh     all GPUs; once on each machine
#   ... --image_column images.txt                      images of their own instead of the clips' first frames, one path per line
#   ... --validation_prompt "one:::two" --validation_images one.png:::two.png     (without: first frames of clips)
# This wraps one of the two scripts: all of its variables and flags work here too, and flags at the end win.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

export MODEL_PATH="${MODEL_PATH:-THUDM/CogVideoX-5b-I2V}"  # hub id or folder of the base model
export OUTPUT_PATH="${OUTPUT_PATH:-cogvideox-5b-i2v-lora}"

FAMILY_ARGS=(
  --height 480                           # the only size for which the model has positions, in pixels
  --width 720
  --max_num_frames 49                    # and the only length at which a stock pipeline uses them
  --fps 8                                # frames per second that it was trained at
  --noised_image_dropout 0.05            # probability of no image, as in the authors' training
  --validation_scheduler dpm             # what the authors advise for this model
  --use_dynamic_cfg                      # likewise
)

exec bash "$ROOT/${SCRIPT:-finetune_single_gpu.sh}" "${FAMILY_ARGS[@]}" "$@"
