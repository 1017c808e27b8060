# shellcheck shell=bash
# Flags that both finetune scripts pass as they stand. They are the guide's; a flag at the end of the command wins over them.
#
# $HERE is the repository; MODEL_PATH, DATASET_PATH, OUTPUT_PATH and CACHE_PATH are set by the script that reads this file.
# shellcheck disable=SC2034,SC2154
COMMON_ARGS=(
  --pretrained_model_name_or_path "$MODEL_PATH"
  --instance_data_root "$DATASET_PATH"
  --output_dir "$OUTPUT_PATH"
  --cache_dir "$CACHE_PATH"
  --enable_tiling                        # VAE: large frames in tiles
  --enable_slicing                       # VAE: one clip at a time
  --caption_column prompts.txt           # one caption a line
  --video_column videos.txt              # the clip of the same line
  --skip_frames_start 0                  # source frames left out
  --skip_frames_end 0
  --adam_beta1 0.9
  --adam_beta2 0.95
  --validation_prompt_separator :::
)
