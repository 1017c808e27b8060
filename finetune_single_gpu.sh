#!/usr/bin/env bash
# Fine-tune a CogVideoX LoRA on one GPU (or, slowly, on a CPU).
#
#   bash finetune_single_gpu.sh                                  with the values below
#   DATASET_PATH=~/clips bash finetune_single_gpu.sh --rank 64   with others; flags at the end win
set -euo pipefail

# Edit these four, or set them in the environment.
MODEL_PATH="${MODEL_PATH:-THUDM/CogVideoX-2b}"             # hub id or folder; models other than the 2B: examples/
DATASET_PATH="${DATASET_PATH:-$HOME/disney}"               # folder with prompts.txt, videos.txt and videos/
OUTPUT_PATH="${OUTPUT_PATH:-cogvideox-lora-single-gpu}"    # the LoRA, its checkpoints and videos go here
CACHE_PATH="${CACHE_PATH:-$HOME/.cache}"                   # downloads, and the encoded clips and captions

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# Expandable segments reduce fragmentation, so fewer runs end out of memory.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

MODEL_ARGS=(
  --pretrained_model_name_or_path "$MODEL_PATH"
  --cache_dir "$CACHE_PATH"
  --enable_tiling                        # VAE: large frames in tiles
  --enable_slicing                       # VAE: one clip at a time
)
DATA_ARGS=(
  --instance_data_root "$DATASET_PATH"
  --caption_column prompts.txt           # one caption per line
  --video_column videos.txt              # the clip on the same line
  --height 480                           # clips are resized and cropped to this, in pixels
  --width 720
  --fps 8                                # frames per second of the sampled clips
  --max_num_frames 49                    # 4k + 1 frames at most
  --skip_frames_start 0                  # source frames to skip
  --skip_frames_end 0
)
LORA_ARGS=(
  --rank 128                             # 64 or above for new concepts; --lora_alpha is the same unless it is given
  # No --mixed_precision: it computes as the model is stored, the 2B in fp16 and the 5B in bf16. In bf16 the 2B would lose three
  # bits of its weights, and the LoRA would be trained on another base than it is used with. The LoRA itself is fp32 in any case.
  --seed 3407
)
TRAIN_ARGS=(
  --train_batch_size 1                   # clips per process and batch
  --num_train_epochs 10                  # passes over the clips
  --gradient_accumulation_steps 1        # batches per optimizer step
  --gradient_checkpointing auto          # recompute activations of as few blocks as fit; all: least memory
  --optimizer AdamW
  --adam_beta1 0.9
  --adam_beta2 0.95
)
RATE_ARGS=(                              # left out if you choose Prodigy or sft: the trainer has a default for each
  --learning_rate 1e-4                   # the guide's; the default 5e-4 learns faster (docs/quality.md)
)
VALIDATION_ARGS=(
  --validation_prompt "Mickey with the captain and friends:::Mickey and the bear"
  --validation_prompt_separator :::
  --num_validation_videos 1              # videos per prompt
  --validation_epochs 2                  # every 2 epochs, and before the first and after the last step
)
OUTPUT_ARGS=(
  --output_dir "$OUTPUT_PATH"
  --checkpointing_steps 500              # in optimizer steps, and at the end
)

# shellcheck source=cogvideox/launch.sh
source "$HERE/cogvideox/launch.sh"
keep_rate_for_adam "$@"
refuse_second_start
forget_other_launchers
pass_signals_as TERM accelerate launch --config_file "$HERE/accelerate_config_machine_single.yaml" \
  "$HERE/train_cogvideox_lora.py" \
  "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${LORA_ARGS[@]}" "${TRAIN_ARGS[@]}" "${RATE_ARGS[@]}" "${VALIDATION_ARGS[@]}" "${OUTPUT_ARGS[@]}" \
  "$@"
