"""Fine-tune a LoRA for CogVideoX on a folder of clips (prompts.txt, videos.txt, videos/).

One GPU, or a CPU:      bash finetune_single_gpu.sh
Several GPUs or nodes:  bash finetune_multi_gpus_1.sh        (once on each node)
By hand:                python train_cogvideox_lora.py --pretrained_model_name_or_path THUDM/CogVideoX-2b \\
                            --instance_data_root ~/disney --output_dir my-lora
The same line works under `accelerate launch` and `torchrun`.

Sharded over GPUs:      CONFIG_PATH=configs/fsdp2.yaml bash finetune_multi_gpus_1.sh --training_type sft --learning_rate 1e-5

Outputs in --output_dir: pytorch_lora_weights.safetensors (any loader applies the trained strength at weight 1.0) or, after full
fine-tuning, transformer/ (an ordinary diffusers folder); README.md (the model card), report.html (the run on one page),
metrics.jsonl, loss.png, dataset_report.txt, best/ (the lowest held-out loss), validation/step-*/, checkpoint-*/.
"""

import argparse
import functools
import gc
import importlib.util
import math
import os
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from cogvideox import versions

if __name__ == "__main__":
    versions.check()  # before the first import that an old or missing package would break

from cogvideox import flags, hub
from cogvideox.device import cpu_is_wanted, hide_gpus
from cogvideox.files import at_home, hash_ahead
from cogvideox.stopping import end_with_launcher

# -----------------------------------------------------------------------------
# Flags. They are parsed before torch is imported, so that a wrong flag is rejected within a second.

OPTIMIZER_NAMES = ("adamw", "adam", "prodigy", "adamw8bit", "adam8bit")
SCHEDULE_NAMES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PRECISION_NAMES, BASE_PRECISIONS = ("no", "fp16", "bf16"), ("stored", "fp8", "int8", "nf4")
SAMPLERS = ("stored", "ddim", "dpm")
SAMPLER_HELP = "sampler: the model's own (stored), ddim or dpm, which needs fewer steps (default: dpm; the 2B: stored)"
TIMESTEP_SAMPLINGS = ("uniform", "spread", "logit_normal")
CHECKPOINTING_HELP = "recompute activations: auto (of as few blocks as fit), none, all, attention (all but attention outputs), N blocks"
ATTENTION_BACKENDS = ("auto", "default", "flash", "flash3", "efficient", "cudnn", "math")
ATTENTION_HELP = "attention kernel: auto (on a GPU the fastest exact one, measured), default (torch's choice), or one by name"
TRACKERS = ("tensorboard", "wandb", "comet_ml", "all", "none")
LEARNING_RATES = {"lora": 5e-4, "sft": 1e-5}  # docs/quality.md
COMPILER = "torch>=2.10"  # older ones compile no block where attention outputs are kept, and say nothing
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def build_parser():
    """The parser of all flags, those of a first run on top. free: a resumed run may change the value."""
    parser = flags.new_parser(__doc__)

    flag = flags.flag_group(parser, "model and output")
    flag("--pretrained_model_name_or_path", None, "folder or hub id, such as THUDM/CogVideoX-2b", required=True, free=True)
    flag("--output_dir", "cogvideox-lora", "where everything is written", free=True)
    flag("--overwrite_output_dir", False, "delete an earlier run's files in --output_dir first", free=True)
    flag("--resume_from_checkpoint", None, "a checkpoint folder, or latest", free=True)
    flag("--dry_run", False, "rehearse a step, a save and a video, print the run's time, memory and disk needs, and exit", free=True)
    flag("--cache_dir", None, "folder of downloaded models and datasets (default: the hub client's cache)", free=True)
    flag("--revision", None, "branch, tag or commit of a hub model", free=True)
    flag("--variant", None, "file variant of the weights, such as fp16", free=True)

    flags.add_data_flags(parser)

    flag = flags.flag_group(parser, "training")
    flag("--num_train_epochs", 10, "passes over the clips, unless --max_train_steps is given", at_least=1, free=True)
    flag("--max_train_steps", None, "optimizer steps (default: from --num_train_epochs)", type=int, at_least=1, free=True)
    flag("--learning_rate", None, "peak learning rate (default: 5e-4; sft: 1e-5; Prodigy: 1; the scripts: 1e-4)", type=float, at_least=0)
    flag("--train_batch_size", 1, "clips per batch and process", at_least=1, free=True)
    flag("--gradient_accumulation_steps", 1, "batches per optimizer step", at_least=1, free=True)
    flag("--mixed_precision", None, "compute precision; trained weights are fp32 (default: as stored)", choices=PRECISION_NAMES)
    flag("--seed", 42, "random seed", at_least=0)
    flag("--training_type", "lora", "lora, or sft: all weights of the transformer, in fp32", choices=("lora", "sft"))

    flag = flags.flag_group(parser, "LoRA")
    flag("--rank", 128, "rank of the LoRA matrices; 64 or above for new concepts", at_least=1)
    flag("--lora_alpha", None, "the LoRA is scaled by alpha / rank (default: equal to --rank)", type=float, above=0)
    flag("--lora_dropout", 0.0, "dropout on the LoRA's input", at_least=0, below=1)
    flag("--target_modules", DEFAULT_TARGETS, "LoRA layers, by name suffix (default: to_q to_k to_v to_out.0)", nargs="+", type=str)
    flag("--init_lora", None, "start from this LoRA file or folder, of the same rank and targets", free=True)

    flag = flags.flag_group(parser, "validation")
    flag("--validation_prompt", None, "validation prompts, joined by the separator (default: no videos)", free=True)
    flag("--validation_prompt_separator", ":::", "separator between prompts", free=True)
    flag(
        "--validation_images",
        None,
        "image-to-video: an image for all prompts, or for each, joined alike (default: of the clips)",
        free=True,
    )
    flag("--validation_epochs", 50, "make videos every N epochs, and of step 0 and the last (0: only those)", at_least=0, free=True)
    flag("--validation_steps", 0, "make videos every N optimizer steps instead (0: off)", at_least=0, free=True)
    flag("--num_validation_videos", 1, "videos per prompt, with seeds --seed, --seed + 1, ...", at_least=1, free=True)
    flag(
        "--validation_prompts_at_once",
        0,
        "videos of N prompts at a time, in turns; at first and last of all (0: always)",
        at_least=0,
        free=True,
    )
    flag("--validation_without_trigger", True, "one more video each time: of the first prompt with the id token, without it", free=True)
    flag("--num_inference_steps", 50, "denoising steps", at_least=1, free=True)
    flag("--validation_scheduler", None, SAMPLER_HELP, choices=SAMPLERS, free=True)
    flag("--guidance_scale", 6.0, "classifier-free guidance; 1: off", at_least=0, free=True)
    flag(
        "--use_dynamic_cfg",
        None,
        "increase the guidance over the denoising steps (default: on; the 2B: off)",
        action=argparse.BooleanOptionalAction,
        free=True,
    )
    flag("--negative_prompt", "", "negative prompt of the videos", free=True)
    flag("--validation_height", None, "pixels (default: --height)", type=int, at_least=1, free=True)
    flag("--validation_width", None, "pixels (default: --width)", type=int, at_least=1, free=True)
    flag("--validation_frames", None, "frames (default: the clips' most common length; 5B-I2V: 49)", type=int, at_least=1, free=True)
    flag("--eval_clips", 4, "score N training and N held-out clips at every checkpoint (0: off)", at_least=0, free=True)
    flag("--eval_steps", 0, "also score them every N optimizer steps (0: only at checkpoints and with videos)", at_least=0, free=True)

    flag = flags.flag_group(parser, "memory and speed")
    flag("--gradient_checkpointing", "auto", CHECKPOINTING_HELP, nargs="?", const="all", free=True)
    flag("--base_precision", "stored", "precision of the frozen weights: as stored, fp8, int8 or nf4", choices=BASE_PRECISIONS)
    flag("--offload", False, "keep frozen weights in host memory; copy each block's to the GPU while another computes", free=True)
    flag("--compile", False, "compile the transformer's blocks (torch 2.10 or newer); the first step takes minutes", free=True)
    flag("--cpu", False, "train on the CPU, even if there is a GPU", free=True)
    flag("--attention_backend", "auto", ATTENTION_HELP, choices=ATTENTION_BACKENDS, free=True)
    flag("--deterministic", False, "use deterministic kernels only, so that a resumed run ends with the same bits on a GPU too", free=True)
    flag("--allow_tf32", False, "use TF32 matmuls on Ampere and later GPUs", free=True)

    flag = flags.flag_group(parser, "checkpoints and logs")
    flag("--checkpointing_steps", 500, "checkpoint every N optimizer steps, and at the end", at_least=1, free=True)
    flag("--checkpoints_total_limit", None, "keep the newest N checkpoints (default: all)", type=int, at_least=1, free=True)
    flag("--logging_steps", 1, "log every N optimizer steps; reading the loss waits for the GPU", at_least=1, free=True)
    flag("--report_to", "tensorboard", "tracker, in addition to metrics.jsonl", choices=TRACKERS, free=True)
    flag("--tracker_name", "cogvideox-lora", "project name in the tracker", free=True)
    flag("--logging_dir", "logs", "the trackers' folder, inside --output_dir", free=True)
    flag("--verbose", False, "show debug messages, including those of the libraries and of every rank", free=True)
    flag("--push_to_hub", False, "upload the LoRA, its card and videos at the end (a new repository is private)", free=True)
    flag("--hub_model_id", None, "repository name (default: the name of --output_dir)", free=True)
    flag("--hub_token", None, "hub token; prefer the variable HF_TOKEN, which process lists do not show", free=True)

    flag = flags.flag_group(parser, "optimizer and learning rate")
    flag("--optimizer", "adamw", "AdamW, Adam, Prodigy, AdamW8bit or Adam8bit, case-insensitive", type=str.lower, choices=OPTIMIZER_NAMES)
    flag("--use_8bit_adam", False, "the same as --optimizer AdamW8bit or Adam8bit (needs bitsandbytes)", free=True)
    flag("--lr_scheduler", "constant", "learning-rate schedule, in optimizer steps", choices=SCHEDULE_NAMES)
    flag("--lr_warmup_steps", 0, "optimizer steps of warm-up", at_least=0)
    flag("--lr_num_cycles", 1, "cycles of cosine_with_restarts", at_least=1)
    flag("--lr_power", 1.0, "power of polynomial", at_least=0)
    flag("--scale_lr", False, "multiply the learning rate by the clips per step")
    flag("--max_grad_norm", 1.0, "clip the gradient norm to this (0: off)", at_least=0)
    flag("--adam_beta1", 0.9, "decay of the first moment", at_least=0, below=1)
    flag("--adam_beta2", 0.95, "decay of the second moment", at_least=0, below=1)
    flag("--adam_weight_decay", 1e-4, "weight decay", at_least=0)
    flag("--adam_epsilon", 1e-8, "Adam's epsilon", above=0)
    flag("--prodigy_beta3", None, "Prodigy's beta3 (default: the root of beta2)", type=float, at_least=0, below=1)
    flag("--prodigy_decouple", True, "Prodigy: decoupled weight decay, as in AdamW")
    flag("--prodigy_use_bias_correction", True, "Prodigy: bias correction, as in Adam")
    flag("--prodigy_safeguard_warmup", True, "Prodigy: keep warm-up out of the step estimate")
    flag("--ema_decay", 0.0, "decay of an EMA of the weights, which is exported and validated, such as 0.999 (0: off)", at_least=0, below=1)

    flag = flags.flag_group(parser, "loss and rarely changed")
    flag("--caption_dropout", 0.0, "probability of an empty caption; CogVideoX was trained with 0.1", at_least=0, at_most=1)
    flag("--noised_image_dropout", 0.05, "probability of no image (image-to-video models only)", at_least=0, at_most=1)
    flag("--timestep_sampling", "uniform", "uniform, spread (stratified over consecutive clips), logit_normal", choices=TIMESTEP_SAMPLINGS)
    flag("--snr_gamma", None, "gamma of min-SNR loss weighting, such as 5 (default: unweighted)", type=float, above=0)
    flag("--max_skipped_steps", 10, "abort after N consecutive steps with a non-finite gradient", at_least=1, free=True)
    flag("--process_timeout_minutes", 30.0, "timeout of a collective in the training loop", above=0, free=True)
    return parser


def check_flags(args):
    """Problems of the flags beyond their bounds, one sentence each. Fills in the defaults that depend on other flags."""
    texts = ("validation_prompt", "negative_prompt", "pretrained_model_name_or_path", "output_dir", "init_lora", "resume_from_checkpoint")
    problems = flags.check_data_flags(args) + flags.undecodable(args, *texts)
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        problems.append(f"--lr_warmup_steps {args.lr_warmup_steps}: --lr_scheduler constant has no warm-up; use constant_with_warmup")
    if args.learning_rate == 0 and args.optimizer == "prodigy":
        problems.append("--learning_rate 0: Prodigy needs a learning rate above 0, usually 1")
    if args.training_type == "sft":
        for name, off in (("init_lora", None), ("lora_dropout", 0.0), ("base_precision", "stored"), ("offload", False)):
            if getattr(args, name) != off:
                problems.append(f"--{name}: unsupported with --training_type sft, which has no LoRA and no frozen weights")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        problems.append("--overwrite_output_dir and --resume_from_checkpoint: one deletes what the other resumes from; give only one")
    if args.use_8bit_adam and args.optimizer == "prodigy":
        problems.append("--use_8bit_adam: unsupported with Prodigy; use AdamW or Adam")
    elif args.use_8bit_adam:
        args.optimizer = args.optimizer.removesuffix("8bit") + "8bit"
    if args.gradient_checkpointing not in ("auto", "all", "attention", "none") and not args.gradient_checkpointing.isdecimal():
        problems.append(f"--gradient_checkpointing {args.gradient_checkpointing}: auto, all, attention, none, or a number of blocks")
    if args.attention_backend == "flash3" and importlib.util.find_spec("flash_attn_interface") is None:
        problems.append("--attention_backend flash3 needs flash_attn_interface: build it from hopper/ of Dao-AILab/flash-attention")
    if args.attention_backend == "cudnn" and args.deterministic:
        problems.append("--attention_backend cudnn: torch has no deterministic backward pass of it for --deterministic; use auto or flash")
    eight_bits = "bitsandbytes>=0.50"  # older ones step on a GPU only
    needs = {"prodigy": "prodigyopt>=1.1", "adamw8bit": eight_bits, "adam8bit": eight_bits, "nf4": eight_bits}
    needs |= {"wandb": "wandb", "comet_ml": "comet_ml", "tensorboard": "tensorboard"}
    for name in ("optimizer", "base_precision", "report_to"):
        package = needs.get(value := getattr(args, name))
        if package and (fault := versions.misfit(package)):
            problems.append(f"--{name} {value}: {fault}; run pip install {shlex.quote(package)}")
    if args.compile and (fault := versions.misfit(COMPILER)):
        problems.append(f"--compile: {fault}; run pip install '{COMPILER}', or omit the flag")
    if Path(args.logging_dir).name != args.logging_dir or args.logging_dir in ("", "..", "validation", "encoded", "best"):
        problems.append(f"--logging_dir {args.logging_dir}: the name of a folder inside --output_dir, without slashes")
    flags.expand_home(args, "output_dir", "resume_from_checkpoint", "init_lora")
    args.cpu = cpu_is_wanted(args.cpu)
    args.lora_alpha = args.lora_alpha or float(args.rank)
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else LEARNING_RATES[args.training_type]
    separator = args.validation_prompt_separator or "\n"
    args.prompts = [p.strip() for p in (args.validation_prompt or "").split(separator) if p.strip()]
    if args.validation_prompt and not args.prompts:
        problems.append("--validation_prompt: contains no prompt")
    args.image_files = [at_home(p.strip()) for p in (args.validation_images or "").split(separator) if p.strip()]
    if args.validation_images and args.prompts and len(args.image_files) not in (1, len(args.prompts)):
        rule = f"{len(args.image_files)} images for {len(args.prompts)} prompts; give one for all, or one for each"
        problems.append(f"--validation_images {args.validation_images}: {rule}, joined by {args.validation_prompt_separator}")
    plain = [(number, text) for number, prompt in enumerate(args.prompts) if (text := flags.without_token(prompt, args.id_token))]
    args.prompts_have_trigger = bool(plain)
    # (the number of a prompt, its text without the token)
    args.plain_prompt = plain[0] if plain and args.validation_without_trigger else None
    if args.push_to_hub and (problem := hub.unfit_name(args)):
        problems.append(problem)
    if not args.resume_from_checkpoint:  # a run of an earlier version may have them, and is resumed with the same flags
        idle = flags.idle_flags(args, flags.REFUSED_IDLE)
        problems += [f"{flag}: would do nothing, because {reason}; leave it out" for flag, reason in idle]
    return problems


def notes_on_flags(args):
    """What the user should know about checked flags, as sentences: the run is as the flags say, but maybe not as meant."""
    notes = []
    if idle := flags.idle_flags(args, flags.IDLE + flags.REFUSED_IDLE):
        notes.append("flags that do nothing here: " + ", ".join(f"{flag} ({reason})" for flag, reason in idle))
    if args.id_token and args.prompts and not any(args.id_token in prompt for prompt in args.prompts):
        notes.append(f"--id_token {args.id_token}: no --validation_prompt has it, so the videos show the LoRA without its trigger")
    if args.optimizer == "prodigy" and not 0.1 <= args.learning_rate <= 10:
        notes.append(
            f"--learning_rate {args.learning_rate:g}: Prodigy finds the size of its steps itself and multiplies it by this rate, which "
            "should be near 1; leave the flag out"
        )
    if args.optimizer == "prodigy" and args.scale_lr:
        notes.append("--scale_lr: Prodigy finds the size of its steps itself, also for more clips per step; leave the flag out")
    return notes


def hash_model_ahead(args):
    """Begin to hash the weights of a local model, on the rank that asks for it, while the libraries are imported."""
    if os.environ.get("RANK", "0") == "0":
        parts, ending = ("text_encoder", "vae", "transformer"), f".{args.variant}.safetensors" if args.variant else ".safetensors"
        folder = Path(at_home(args.pretrained_model_name_or_path))
        files = [file for part in parts for file in sorted((folder / part).glob(f"*{ending}"))]
        hash_ahead([file for file in files if args.variant or "." not in file.stem], Path(args.encoding_cache_dir))


def parse_args(arguments=None):
    """The checked flags; problems end the program with exit code 2, one line each."""
    return flags.parse(build_parser(), arguments, check_flags)


if __name__ == "__main__":
    end_with_launcher()
    ARGS = parse_args()
    hash_model_ahead(ARGS)
    gc.disable()  # collecting garbage takes a sixth of the time of the imports, which leave none
    if ARGS.cpu:
        hide_gpus()

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader

from cogvideox import (
    attention,
    base_model,
    checkpoint,
    engine,
    lora,
    memory,
    metrics,
    motion,
    price,
    rehearsal,
    report,
    scoring,
    stopping,
    validation,
)
from cogvideox.console import BAD_DATA, BAD_FLAGS, BAD_OUTPUT, configure, fail, say, timed, warn
from cogvideox.encodings import encode_data
from cogvideox.folder import PRECISIONS, open_model, stored_precision
from cogvideox.launch import (
    check_gpu,
    claim_output_dir,
    end_before_meeting,
    patient_barrier_maker,
    peak_memory_text,
    remove_earlier_run,
    start_processes,
    use_deterministic_algorithms,
)
from cogvideox.linear import hold_linears
from cogvideox.model import (
    blocks_to_recompute,
    checkpoint_blocks,
    compile_blocks,
    constant_inputs,
    load_scheduler,
    load_vae,
    pipeline_class,
)
from cogvideox.offload import offload_blocks
from cogvideox.optimizer import make_optimizer, make_schedule, step_size
from cogvideox.order import Plan, positions_of, seeded_generator
from cogvideox.owned import card_name, remove_files_of_runs
from cogvideox.preview import Preview
from cogvideox.reader import Readers, decode_workers
from cogvideox.survey import absent_validation_images, check_data, check_lists
from dataset import TrainingClips, lacking_shared_memory, one_ahead

# -----------------------------------------------------------------------------
# Loss


def velocity_loss(transformer, scheduler, batch, constant, dtype):
    """The velocity error of each clip of a batch, [B], in fp32.

    v = sqrt(abar) noise - sqrt(1 - abar) latents (Salimans & Ho, 2022, "Progressive distillation", appendix D). The
    weighted x0 error of other CogVideoX trainers, |x0_hat - x0|^2 / (1 - abar), is algebraically equal. Computed directly, it
    needs no division by 1 - abar (0.0025 at t = 0), which in bf16 puts a floor of 0.07 under the loss.

    constant: of `constant_inputs`. The image's latents stand beside the noisy ones, in channels of their own: none for text-to-video.
    """
    latents, noise, timestep = batch["latents"], batch["noise"], batch["timestep"]  # [B, F, C, H, W] twice, [B]
    noisy = scheduler.add_noise(latents, noise, timestep)  # fp32: add_noise rounds its schedule to its input's dtype
    target = scheduler.get_velocity(latents, noise, timestep)
    predicted = transformer(
        hidden_states=torch.cat([noisy, batch["image"]], dim=2).to(dtype),
        encoder_hidden_states=batch["prompt"].to(dtype),
        timestep=timestep,
        return_dict=False,
        **constant,
    )[0]
    return (predicted.float() - target).pow(2).mean(dim=(1, 2, 3, 4))


def loss_weights(scheduler, snr_gamma, device):
    """The weight of the velocity error at each timestep, fp32 [T]: min(SNR, gamma) / (SNR + 1), where SNR = abar / (1 - abar).

    Hang et al., 2023, "Efficient diffusion training via min-SNR weighting strategy", section 3.4, for v-prediction.
    """
    abar = scheduler.alphas_cumprod.to(device, torch.float32)
    return torch.minimum(abar, snr_gamma * (1 - abar))


# -----------------------------------------------------------------------------
# One optimizer step


@dataclass
class StepResult:
    """Results of one optimizer step: loss, positions and timesteps of each micro-batch, and the numbers of the step."""

    losses: list
    positions: list
    timesteps: list
    grad_norm: float = math.nan
    finite: bool = False  # whether the gradient norm is finite; otherwise nothing was updated
    learning_rate: float = 0.0
    seconds_waited: float = 0.0  # for batches


def train_step(args, trained, batches, compute_loss, step):
    """One optimizer step on the next --gradient_accumulation_steps batches. compute_loss: (model, batch) -> the mean loss."""
    accelerator, optimizer, result = trained.accelerator, trained.optimizer, StepResult([], [], [])
    # Seeds LoRA dropout, the only randomness inside the model.
    torch.manual_seed(seeded_generator(args.seed, "dropout", step, accelerator.process_index).initial_seed())
    size = step_size(optimizer)  # the step changes it after its use
    for _ in range(accelerator.gradient_accumulation_steps):
        started = time.perf_counter()
        batch = {name: value.to(trained.device, non_blocking=True) for name, value in next(batches).items()}
        result.seconds_waited += time.perf_counter() - started
        with accelerator.accumulate(trained.model):
            loss = compute_loss(trained.model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                # The gradients are reduced, so every rank gets the same norm. fp16's scaler skips bad steps by itself.
                norm = accelerator.clip_grad_norm_(trained.parameters, args.max_grad_norm or math.inf)
                result.grad_norm = float(engine.whole(norm))
                result.finite = math.isfinite(result.grad_norm)
                if result.finite or accelerator.scaler:
                    optimizer.step()
                if result.finite:
                    trained.update_average()
                optimizer.zero_grad()
        result.losses.append(loss.detach())
        result.positions.append(batch["position"])
        result.timesteps.append(batch["timestep"])
    result.learning_rate = trained.schedule.get_last_lr()[0] * size
    trained.schedule.step()
    return result


# -----------------------------------------------------------------------------
# The run


def prepare_transformer(transformer, args, accelerator, dtype, hold=True):
    """Prepare a transformer (with a LoRA, or all trainable) for training: autocast, frozen layers, device, checkpointing, compilation.

    hold: whether to replace frozen layers by FrozenLinear where that saves memory or time.
    """
    lora.fit_to_autocast(transformer, dtype)
    if not engine.splits_weights(accelerator):  # a sharding engine needs the full weights, and moves its shard to the device
        if hold:
            hold_linears(transformer, args.base_precision, args.offload, accelerator.device)
        transformer.to(accelerator.device)
        if hold and args.offload and accelerator.device.type != "cpu":
            offload_blocks(transformer, accelerator.device)
    # auto starts with every block recomputed; the rehearsal then keeps the activations of as many blocks as fit.
    checkpoint_blocks(transformer, *blocks_to_recompute(args.gradient_checkpointing, len(transformer.transformer_blocks)))
    if args.compile:
        compile_blocks(transformer, accelerator.device)
    transformer.train()


def make_losses(args, transformer, scheduler, dtype, device):
    """(compute_loss, clip_losses): functions of (model, batch) that return the training loss and the unweighted loss of each clip."""
    constant_of = constant_inputs(transformer, device)
    weights = loss_weights(scheduler, args.snr_gamma, device) if args.snr_gamma else None

    def clip_losses(model, batch):
        return velocity_loss(model, scheduler, batch, constant_of(batch), dtype)

    def compute_loss(model, batch):
        losses = clip_losses(model, batch)
        return (losses if weights is None else losses * weights[batch["timestep"]]).mean()

    return compute_loss, clip_losses


def main(args):
    """One training run, from flags to a LoRA on disk."""
    gc.freeze()  # no collection looks at the million objects of the imports again: 0.2 seconds each
    gc.enable()
    configure(args.verbose)
    for note in notes_on_flags(args):
        warn(note)
    # Read the model's configs, not its weights; its problems are reported together with those of the lists of clips.
    folder, facts, tokenizer, problems = open_model(args)
    problems += engine.unfit_flags(args) + (lora.unfit_initial(args, folder) if not problems else [])
    use_deterministic_algorithms(args.deterministic)  # before a GPU starts
    check_gpu(args.cpu, problems)
    end_before_meeting(engine.contradicted_flags(args), problems)  # accelerate would raise an error for some of them

    # Processes. From here on every line runs on every rank; the main one prints and writes.
    accelerator = start_processes(args.mixed_precision, args.gradient_accumulation_steps, args.process_timeout_minutes, args.cpu)
    if __name__ == "__main__":  # from here on a signal stops the run at the next safe point
        stopping.listen(args.output_dir)
    barrier, device, is_main, output_dir = patient_barrier_maker(), accelerator.device, accelerator.is_main_process, Path(args.output_dir)
    dtype = PRECISIONS[args.mixed_precision]
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    problems += attention.unfit_backend(args.attention_backend, device, dtype, facts.head_width)
    lock = claim_output_dir(args, accelerator, problems)  # noqa: F841  no other run writes there while it lives
    problems += absent_validation_images(args, facts, accelerator)
    checkpoint.refuse_missing(args, accelerator, problems)
    if problems:  # decoding all clips, maybe in a wrong size, would take minutes
        fail(BAD_FLAGS, problems + check_lists(args, facts, tokenizer))

    # Data: decode every clip once, encode it once, then free T5 and the VAE.
    with Readers(decode_workers(), args.clip_timeout_seconds) as readers:
        with timed("check the clips"):
            data = check_data(args, facts, tokenizer, readers, accelerator, barrier)
        if data.problems:
            fail(BAD_DATA, data.problems)
        if is_main and args.overwrite_output_dir and not args.dry_run:
            remove_earlier_run(output_dir)  # only after every check has passed
        if is_main and args.dry_run:
            memory.say_predicted(args, folder, accelerator, velocity_loss)
        plan = Plan.of(args, data, accelerator.num_processes)
        if args.lr_warmup_steps >= plan.total_steps:
            warn(f"--lr_warmup_steps {args.lr_warmup_steps}: the run has {plan.total_steps} steps, so it never trains at the full rate")

        def before_encoding(identities):
            checkpoint.refuse_ahead(args, accelerator, plan.clips_per_step, identities)
            if not args.dry_run:  # a refused run leaves no empty one with a tracker
                metrics.open_trackers(args, accelerator)

        encodings, identities = encode_data(args, folder, facts, tokenizer, data, readers, accelerator, barrier, before_encoding)

    # Transformer: frozen in the compute dtype with a LoRA in fp32, or all weights in fp32.
    scheduler, kind = load_scheduler(folder), checkpoint.RESULTS[args.training_type]
    build = functools.partial(kind.build, args, folder, dtype)
    with timed("load the transformer"):
        transformer = build(device=engine.loading_device(args, accelerator))
    if args.init_lora and (problem := lora.load_initial(transformer, args.init_lora)):
        fail(BAD_FLAGS, problem)
    num_trained, num_parameters = engine.count_parameters(transformer)
    prepare_transformer(transformer, args, accelerator, dtype)

    # Optimizer and schedule. Steps are optimizer steps.
    learning_rate = args.learning_rate * (plan.clips_per_step if args.scale_lr else 1)
    optimizer = make_optimizer(args, [p for p in transformer.parameters() if p.requires_grad], learning_rate)
    schedule = make_schedule(args, optimizer, plan.total_steps)
    model, optimizer, parameters = engine.prepare(accelerator, transformer, optimizer, args.train_batch_size, args.max_grad_norm, dtype)
    average = engine.make_average(parameters, args.ema_decay) if args.ema_decay else None
    stored_dtype = PRECISIONS[stored_precision(folder, "transformer", args.variant)]
    trained = engine.Trained(
        accelerator, transformer, model, parameters, optimizer, schedule, average, build, dtype, barrier, kind, stored_dtype
    )
    compute_loss, clip_losses = make_losses(args, transformer, scheduler, dtype, device)
    num_timesteps = scheduler.config.num_train_timesteps
    clips = TrainingClips(
        encodings, plan.clip_of, args.seed, facts, num_timesteps, args.caption_dropout, args.random_flip, args.timestep_sampling,
        args.noised_image_dropout,
    )  # fmt: skip

    # Rehearsal: an error of the first save or video shows up in the first minute, not after ten hours.
    result_facts = kind.facts(args, transformer) | {"trigger": args.id_token or "", "example_prompt": data.records[0].caption}
    memory_explained = functools.partial(
        stopping.explained_memory, blocks=len(transformer.transformer_blocks), peak=lambda: peak_memory_text(device),
        sharded=engine.splits_weights(accelerator),
    )  # fmt: skip
    with memory_explained("in the rehearsal of one step at the largest shape"), timed("rehearsal"):
        batch = clips.largest_batch(plan, data.clips, args.train_batch_size)
        measured = rehearsal.rehearse(args, trained, result_facts, batch, compute_loss, train_step)
    if problem := rehearsal.report(args, measured, plan.total_steps, device, num_trained):
        fail(BAD_OUTPUT, problem)

    # Checkpoints, scores and videos; each is a no-op while its flag is off.
    run_facts = checkpoint.facts_of_run(args, plan.clips_per_step, identities)
    checkpointer = checkpoint.Checkpointer(args, trained, run_facts, result_facts)
    base_identity = base_model.identity_of(args, identities["transformer"], scheduler, device)
    vae = functools.partial(load_vae, folder, device, args.variant, args.enable_slicing, args.enable_tiling)
    data_motion = functools.partial(motion.of_data, args, data)
    validator = validation.Validator(
        args, trained, scheduler, encodings, vae, data.most_common_shape(), plan, base_identity, data_motion, data.validation_images
    )
    scorer = scoring.Scorer(args, trained, clip_losses, encodings, data, facts, num_timesteps, tuple(identities.values()), base_identity)
    scorer.follow(checkpointer, validator)
    say_price = functools.partial(
        price.say_price_of, args, plan, measured, transformer, folder, facts, batch["latents"].shape[1:], accelerator.num_processes,
        (checkpointer, scorer, validator),
    )  # fmt: skip
    if args.dry_run:
        say_price(first_step=0)
        say("--dry_run: nothing was trained")
        accelerator.end_training()
        return

    # Resume, if asked. No random state to restore: clip, noise and timestep are functions of the seed and the position.
    scorer.score_what_training_changes()
    first_step = checkpointer.load()
    meter = metrics.Meter(args, trained, plan, first_step)
    scorer.begin(meter)
    validator.begin(meter)
    preview = Preview(args, trained, data, encodings, vae)
    guard = metrics.NonFiniteGuard(args, trained, plan.clip_of, data.records, checkpointer)
    say_plan(args, accelerator, plan, first_step, learning_rate, num_trained, num_parameters)
    say_price(first_step=first_step)
    engine_name, pipeline = engine.engine_of(accelerator), pipeline_class(transformer.config).__name__
    run = report.describe_run(args, facts, accelerator, engine_name, plan, data, validator.settings, num_trained, pipeline)
    if is_main and (problem := report.write_run_facts(output_dir, run)):
        warn(problem)

    # The loop
    if first_step == 0:
        if is_main:
            remove_files_of_runs(output_dir, parts=("best", "validation"))  # left by a run without a checkpoint
        trained.barrier()
        with trained.one_full_model():
            scorer.offer(0)
            validator.offer(0)
    batches = load_batches(args, accelerator, clips, batch, first_step, plan.total_steps)
    step, stop = first_step, 0
    for step in meter.bar(first_step + 1, plan.total_steps):
        last = step == plan.total_steps
        with memory_explained(f"in step {step}"):
            outcome = train_step(args, trained, batches, compute_loss, step)
        guard.check(step, outcome)  # too many non-finite gradients end the run
        meter.offer(step, outcome, last)
        checkpointer.offer(step, last)
        with meter.paused():
            with trained.one_full_model():
                scorer.offer(step, last)
                validator.offer(step, last)
            preview.offer(due=checkpointer.is_due(step, last))
            encodings.finish(due=checkpointer.is_due(step, last))
        # A signal to any rank stops all ranks here, after a checkpoint.
        if stop := stopping.stop_requested_anywhere(device):
            checkpointer.save(step)
            break
    if first_step >= plan.total_steps:
        rule = "a larger --max_train_steps, or more --num_train_epochs, trains on"
        say(f"already complete: {output_dir} is at step {first_step}, and this run ends at {plan.total_steps}; {rule}")
        with trained.one_full_model():  # if the run was stopped during its last scores or videos
            scorer.make_missing(first_step)
            validator.make_missing(first_step)
    finish(args, trained, checkpointer, scorer, validator, run, step, stop)


def load_batches(args, accelerator, clips, largest, first_step, total_steps):
    """An iterator over this rank's batches from step `first_step` on, in order, --gradient_accumulation_steps of them per step.

    largest: the run's largest batch. On a GPU without workers a thread makes each batch ahead; on a CPU it would compete with the step.
    """
    ranks = accelerator.process_index, accelerator.num_processes
    positions = positions_of(*ranks, args.train_batch_size, args.gradient_accumulation_steps, first_step, total_steps)
    on_gpu, workers = accelerator.device.type == "cuda", args.dataloader_num_workers
    if problem := lacking_shared_memory(largest, workers):
        warn(problem)
        workers = 0
    batches = iter(DataLoader(clips, batch_sampler=list(positions), num_workers=workers, pin_memory=on_gpu))
    return one_ahead(batches, accelerator.device) if on_gpu and not workers else batches


def say_plan(args, accelerator, plan, first_step, learning_rate, num_trained, num_parameters):
    """Print the run's clips, steps and trainable parameters."""
    epochs, precision = plan.total_steps * plan.clips_per_step / plan.epoch_clips, args.mixed_precision.replace("no", "fp32")
    method = f"rank {args.rank}, alpha {args.lora_alpha:g}" if args.training_type == "lora" else "full fine-tuning"
    say(
        f"\n{len(plan.clips)} clips; {args.train_batch_size} per batch x {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} accumulation = {plan.clips_per_step} clips per step\n"
        f"{plan.total_steps} steps = {epochs:.1f} epochs, from step {first_step}; learning rate {learning_rate:g}, {args.lr_scheduler}\n"
        f"training {num_trained / 1e6:.2f} M of {num_parameters / 1e6:.1f} M parameters ({method}), computing in {precision}; "
        f"engine: {engine.engine_of(accelerator)}\n"
    )


def finish(args, trained, checkpointer, scorer, validator, run, step, stop):
    """End the run: wait for the last checkpoint, write verdict, card, plot, status and report, push, and set the exit code.

    stop: the signal that ended the loop, or 0. The result is already on disk; a failure here does not lose it.
    """
    output_dir, problem = Path(args.output_dir), None
    newest = checkpointer.newest()
    verdict = scorer.verdict(ran_all=not stop)
    if trained.is_main:
        if newest is None and not checkpointer.failed:  # the run was already complete
            newest = output_dir / f"checkpoint-{step}"
            trained.kind.publish(newest, output_dir)
        run["facts"] |= hub.without_secrets({"steps": step, "videos": validator.videos_of(step)})
        problem = publish(args, output_dir, trained.kind, run, verdict, push=args.push_to_hub and not stop)
        code, reason = (1, problem) if problem else (0, "done")
        code, reason = (128 + stop, f"stopped by {signal.Signals(stop).name}") if stop else (code, reason)
        code, reason = (BAD_OUTPUT, "the last checkpoint was not written") if checkpointer.failed else (code, reason)
        stopping.write_status(output_dir, code, reason, step, newest, verdict=verdict[0], verdict_sentences=verdict[1])
        report.refresh(output_dir)
    trained.barrier()  # the launcher kills the other ranks soon after the first one exits
    metrics.close_trackers(trained.accelerator)
    trained.accelerator.end_training()
    if stop:
        total_steps = run["facts"]["total_steps"]
        say(f"stopped by {signal.Signals(stop).name} after step {step} of {total_steps}; resume with --resume_from_checkpoint latest")
        raise SystemExit(128 + stop)
    if checkpointer.failed:
        fail(BAD_OUTPUT, f"the last checkpoint was not written; the newest is {newest}")
    if problem:
        fail(1, problem)


def publish(args, output_dir, kind, run, verdict, push):
    """Write run.json, the card and the plot, print the verdict, and upload the result if `push`. Returns the problem, or None."""
    if problem := report.write_run_facts(output_dir, run):
        warn(problem)
    card = output_dir / card_name(output_dir)
    try:
        card = hub.write_model_card(output_dir, run)
        metrics.plot_losses(output_dir / "metrics.jsonl", output_dir / "loss.png")
    except OSError as error:
        warn(f"the model card and the plot were not written ({error})")
    result_path, (word, sentences) = output_dir / kind.RESULT, verdict
    say(f"\nverdict: {word}. {' '.join(sentences)}")
    say(f"\nresult: {result_path}\nhow to use it: {card}\nreport: {output_dir / report.NAME}")
    if not push:
        return None
    token = args.hub_token or os.environ.get("HF_TOKEN")
    try:
        say(f"uploaded to {hub.push(output_dir, args, token)}")
    except Exception as error:  # the hub client raises many kinds; the result is on disk either way
        reason = hub.without_secrets((str(error).splitlines() or [""])[0], token)
        return f"--push_to_hub: the upload failed ({type(error).__name__}: {reason}); everything is in {output_dir}"
    return None


if __name__ == "__main__":
    record(main)(ARGS)  # reports the traceback of a failed rank to the launcher
