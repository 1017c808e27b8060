#!/usr/bin/env bash
# Fine-tune a CogVideoX LoRA on the GPUs of one machine or several: run it once on each machine.
#
#   bash finetune_multi_gpus_1.sh                                             all GPUs of this machine
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash finetune_multi_gpus_1.sh   first of two machines
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash finetune_multi_gpus_1.sh   second of two machines
#   srun --ntasks-per-node=1 bash finetune_multi_gpus_1.sh                    all machines of a Slurm job (examples/slurm.sbatch)
#   bash finetune_multi_gpus_1.sh                                             in each pod of a Kubernetes PyTorchJob
#   CONFIG_PATH=configs/fsdp2.yaml bash finetune_multi_gpus_1.sh              weights sharded over the GPUs (or zero2, zero3)
# Flags at the end win. OUTPUT_PATH and CACHE_PATH must be on a file system that all machines share.
set -euo pipefail

# The machines. cogvideox/cluster.sh fills in empty values from the variables of Slurm, Kubernetes or torchrun; without those, the
# script uses this machine with all its GPUs.
NNODES="${NNODES:-}"                                       # machines
NODE_RANK="${NODE_RANK:-}"                                 # this machine's rank, from 0
GPUS_PER_NODE="${GPUS_PER_NODE:-}"                         # processes per machine, one per GPU
MASTER_ADDR="${MASTER_ADDR:-}"                             # address at which the others reach machine 0
MASTER_PORT="${MASTER_PORT:-}"                             # a free port there

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# Edit these, or set them in the environment.
CONFIG_PATH="${CONFIG_PATH:-$HERE/accelerate_config_machine_multi.yaml}"   # the engine: DDP, or one of configs/
MODEL_PATH="${MODEL_PATH:-THUDM/CogVideoX-2b}"             # hub id or folder; models other than the 2B: examples/
DATASET_PATH="${DATASET_PATH:-$HOME/disney}"               # folder with prompts.txt, videos.txt and videos/
OUTPUT_PATH="${OUTPUT_PATH:-cogvideox-lora-multi-gpu}"     # the LoRA, its checkpoints and videos go here
CACHE_PATH="${CACHE_PATH:-$HOME/.cache}"                   # downloads, and the encoded clips and captions

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
find_machines "$@"
pass_signals_as TERM accelerate launch --config_file "$CONFIG_PATH" \
  --num_processes "$((NNODES * GPUS_PER_NODE))" --num_machines "$NNODES" --machine_rank "$NODE_RANK" \
  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
  "$HERE/train_cogvideox_lora.py" \
  "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${LORA_ARGS[@]}" "${TRAIN_ARGS[@]}" "${RATE_ARGS[@]}" "${VALIDATION_ARGS[@]}" "${OUTPUT_ARGS[@]}" \
  "$@"
