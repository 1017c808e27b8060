#!/usr/bin/env bash
# Fine-tune all weights of the 2B, sharded over the GPUs of one machine or several: run it once on each machine.
#
#   bash examples/finetune_sft.sh                                         all GPUs of this machine
#   CONFIG_PATH=configs/zero3.yaml bash examples/finetune_sft.sh          with DeepSpeed instead of FSDP2
# This wraps finetune_multi_gpus_1.sh: all of its variables and flags work here too, and flags at the end win.
# OUTPUT_PATH/transformer is an ordinary diffusers folder.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

export CONFIG_PATH="${CONFIG_PATH:-$ROOT/configs/fsdp2.yaml}"
export OUTPUT_PATH="${OUTPUT_PATH:-cogvideox-sft}"

SFT_ARGS=(
  --training_type sft
  --learning_rate 1e-5                   # a tenth of a LoRA's
  --lr_scheduler cosine
  --lr_warmup_steps 100                  # optimizer steps
  --ema_decay 0                          # 0.999 exports an EMA of the weights (unsupported with DeepSpeed)
  --checkpoints_total_limit 2            # each holds all weights and the optimizer state
)

exec bash "$ROOT/finetune_multi_gpus_1.sh" "${SFT_ARGS[@]}" "$@"
