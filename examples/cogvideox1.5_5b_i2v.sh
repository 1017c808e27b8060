#!/usr/bin/env bash
# Train a LoRA for CogVideoX1.5-5B-I2V (image to video).
#
#   DATASET_PATH=~/disney bash examples/cogvideox1.5_5b_i2v.sh                                    one GPU
#   SCRIPT=finetune_multi_gpus_1.sh DATASET_PATH=~/disney bash examples/cogvideox1.5_5b_i2v.sh    all GPUs; once on each machine
#   ... --image_column images.txt                      images of their own instead of the clips' first frames, one path per line
#   ... --validation_prompt "one:::two" --validation_images one.png:::two.png     (without: first frames of clips)
# This wraps one of the two scripts: all of its variables and flags work here too, and flags at the end win.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

export MODEL_PATH="${MODEL_PATH:-THUDM/CogVideoX1.5-5B-I2V}"   # hub id or folder of the base model
export OUTPUT_PATH="${OUTPUT_PATH:-cogvideox1.5-5b-i2v-lora}"

FAMILY_ARGS=(
  --height 768                           # short side 768, long side 768 to 1360, in pixels
  --width 1360
  --max_num_frames 81                    # 16N + 1: the model was trained on no other lengths
  --fps 16                               # frames per second that it was trained at
  --noised_image_dropout 0.05            # probability of no image, as in the authors' training
  --validation_scheduler dpm             # what the authors advise for this model
  --use_dynamic_cfg                      # likewise
)

exec bash "$ROOT/${SCRIPT:-finetune_single_gpu.sh}" "${FAMILY_ARGS[@]}" "$@"
