"""Fine-tune a LoRA for CogVideoX on a folder of clips (prompts.txt, videos.txt, videos/).

One GPU, or a CPU:      bash finetune_single_gpu.sh
Several GPUs or nodes:  bash finetune_multi_gpus_1.sh        (once on each node)
By hand:                python train_cogvideox_lora.py --pretrained_model_name_or_path THUDM/CogVideoX-2b \\
                            --instance_data_root ~/disney --output_dir my-lora
The same line works under `accelerate launch` and `torchrun`.

Several engines:        CONFIG_PATH=configs/fsdp2.yaml bash finetune_multi_gpus_1.sh --training_type sft --learning_rate 1e-5

What comes out, in --output_dir: pytorch_lora_weights.safetensors (weight 1.0 is the trained strength in every loader) or,
of full fine-tuning, transformer/ (an ordinary diffusers folder), and beside it
README.md (the model card), report.html (the run on a page), metrics.jsonl, loss.png, dataset_report.txt, best/ (the lowest
held-out loss), validation/step-*/, checkpoint-*/.
"""

import argparse
import functools
import importlib.util
import math
import os
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cogvideox.flags import add_data_flags, below, check_data_flags, not_above_zero
from cogvideox.stopping import end_with_launcher

# -----------------------------------------------------------------------------
# Flags. Nothing heavy is imported before them, so that a wrong one is told in a second.

OPTIMIZER_NAMES = ("adamw", "adam", "prodigy", "adamw8bit", "adam8bit")
SCHEDULE_NAMES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRAINING_TYPES = ("lora", "sft")
LEARNING_RATES = {"lora": 5e-4, "sft": 1e-5}  # docs/quality.md
TIMESTEP_SAMPLINGS = ("uniform", "spread", "logit_normal")
BASE_PRECISIONS = ("stored", "fp8", "int8", "nf4")
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def build_parser():
    """All flags: one line each, with the unit and the value that turns it off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    switch = argparse.BooleanOptionalAction

    flag = parser.add_argument_group("model").add_argument
    flag(
        "--pretrained_model_name_or_path", required=True, help="folder or hub id of a diffusers CogVideoX model, such as THUDM/CogVideoX-2b"
    )
    flag("--revision", help="branch, tag or commit of a hub model")
    flag("--variant", help="file variant of the weights, such as fp16")
    flag("--cache_dir", help="where downloaded models and datasets are stored (default: the hub client's own place)")

    add_data_flags(parser)

    flag = parser.add_argument_group("LoRA and loss").add_argument
    flag("--training_type", choices=TRAINING_TYPES, default="lora", help="lora, or sft: all weights of the transformer, in fp32")
    flag("--rank", type=int, default=128, help="rank of the LoRA matrices; 64 or above for new concepts")
    flag("--lora_alpha", type=float, help="the LoRA is scaled by alpha / rank (default: equal to --rank)")
    flag("--lora_dropout", type=float, default=0.0, help="dropout on the LoRA's input (0: off)")
    flag("--init_lora", help="start from this LoRA file or folder (of the same rank and targets)")
    flag("--target_modules", nargs="+", default=DEFAULT_TARGETS, help="linear layers that get a LoRA, by the end of their name")
    flag(
        "--caption_dropout", type=float, default=0.0, help="share of clips trained with the empty caption (0: off; 0.1 was CogVideoX's own)"
    )
    flag(
        "--timestep_sampling", choices=TIMESTEP_SAMPLINGS, default="uniform", help="uniform, spread (evenly over neighbours), logit_normal"
    )
    flag("--snr_gamma", type=float, help="min-SNR weighting of the loss, such as 5 (default: the plain velocity error)")
    flag("--seed", type=int, default=42, help="seed of everything random")
    flag(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="compute precision; the LoRA is fp32 in all (default: as the weights are stored)",
    )

    flag = parser.add_argument_group("training").add_argument
    flag("--train_batch_size", type=int, default=1, help="clips in a batch, per process")
    flag("--num_train_epochs", type=int, default=10, help="passes over the clips, unless --max_train_steps is given")
    flag("--max_train_steps", type=int, help="optimizer steps (default: from --num_train_epochs)")
    flag("--gradient_accumulation_steps", type=int, default=1, help="batches summed into one optimizer step")
    flag("--learning_rate", type=float, help="peak learning rate (default: 5e-4, 1e-5 for all weights, 1 for Prodigy; the guide: 1e-4)")
    flag("--scale_lr", action="store_true", help="multiply the learning rate by clips a step")
    flag("--lr_scheduler", choices=SCHEDULE_NAMES, default="constant", help="shape of the learning rate over optimizer steps")
    flag("--lr_warmup_steps", type=int, default=0, help="optimizer steps of warm-up (0: off)")
    flag("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts")
    flag("--lr_power", type=float, default=1.0, help="power of polynomial")
    flag(
        "--optimizer",
        type=str.lower,
        choices=OPTIMIZER_NAMES,
        default="adamw",
        help="AdamW, Adam, Prodigy, AdamW8bit or Adam8bit, in any case",
    )
    flag("--use_8bit_adam", action="store_true", help="the same as --optimizer AdamW8bit, or Adam8bit (needs bitsandbytes)")
    flag("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    flag("--adam_beta2", type=float, default=0.95, help="decay of the second moment")
    flag("--adam_weight_decay", type=float, default=1e-4, help="weight decay (0: off)")
    flag("--adam_epsilon", type=float, default=1e-8, help="Adam's epsilon")
    flag("--prodigy_beta3", type=float, help="Prodigy's beta3 (default: the root of beta2)")
    flag("--prodigy_decouple", action=switch, default=True, help="Prodigy: weight decay as AdamW's")
    flag("--prodigy_use_bias_correction", action=switch, default=True, help="Prodigy: Adam's bias correction")
    flag("--prodigy_safeguard_warmup", action=switch, default=True, help="Prodigy: keep warm-up out of the step estimate")
    flag("--ema_decay", type=float, default=0.0, help="ship and validate an average of the trained weights, such as 0.999 (0: off)")
    flag("--max_grad_norm", type=float, default=1.0, help="clip the gradient norm to this (0: off)")
    flag("--allow_tf32", action="store_true", help="TF32 products on Ampere and later GPUs")
    flag("--max_skipped_steps", type=int, default=10, help="end the run after so many steps in a row whose gradient was not finite")
    flag("--process_timeout_minutes", type=float, default=30.0, help="how long a collective of the training loop may take")

    flag = parser.add_argument_group("memory and speed").add_argument
    flag(
        "--gradient_checkpointing",
        nargs="?",
        const="all",
        default="auto",
        help="recompute activations: auto (as few as fit), none, all, attention (all but attention's), or a number of blocks so",
    )
    flag(
        "--base_precision",
        choices=BASE_PRECISIONS,
        default="stored",
        help="hold the frozen weights as they are stored, or in fp8, int8 or nf4",
    )
    flag("--offload", action="store_true", help="keep the frozen weights of the blocks in host memory and copy each for its product")
    flag("--compile", action="store_true", help="compile the transformer's blocks (torch.compile; the first step takes minutes)")

    flag = parser.add_argument_group("validation").add_argument
    flag("--validation_prompt", help="prompts to make videos of, joined by the separator (default: no videos)")
    flag("--validation_prompt_separator", default=":::", help="what separates prompts")
    flag("--num_validation_videos", type=int, default=1, help="videos a prompt, with seeds --seed, --seed + 1, ...")
    flag(
        "--validation_epochs",
        type=int,
        default=50,
        help="validate every N epochs, and before the first and after the last step (0: those only)",
    )
    flag("--validation_steps", type=int, default=0, help="validate every N optimizer steps (0: by epochs)")
    flag("--validation_height", type=int, help="pixels (default: --height)")
    flag("--validation_width", type=int, help="pixels (default: --width)")
    flag("--validation_frames", type=int, help="frames (default: as trained)")
    flag("--guidance_scale", type=float, default=6.0, help="classifier-free guidance (1: off)")
    flag("--use_dynamic_cfg", action="store_true", help="guidance that grows over the denoising steps")
    flag("--num_inference_steps", type=int, default=50, help="denoising steps")
    flag("--negative_prompt", default="", help="what the videos should not show")
    flag("--eval_clips", type=int, default=4, help="clips, trained and held-out, scored on fixed noise at every checkpoint (0: off)")
    flag("--eval_steps", type=int, default=0, help="score them every N optimizer steps too (0: at checkpoints and with validation)")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="cogvideox-lora", help="where everything is written")
    flag("--overwrite_output_dir", action="store_true", help="remove an earlier run's files there first")
    flag("--checkpointing_steps", type=int, default=500, help="checkpoint every N optimizer steps, and at the end")
    flag("--checkpoints_total_limit", type=int, help="keep the newest N checkpoints (default: all)")
    flag("--dry_run", action="store_true", help="rehearse one step, a save and a video, print time, memory and disk for the run, and end")
    flag("--resume_from_checkpoint", help="a checkpoint folder, or latest")
    flag("--logging_dir", default="logs", help="the trackers' folder, inside --output_dir")
    flag("--logging_steps", type=int, default=1, help="log every N optimizer steps; reading the loss waits for the GPU")
    flag(
        "--report_to",
        choices=("tensorboard", "wandb", "comet_ml", "all", "none"),
        default="tensorboard",
        help="tracker, beside metrics.jsonl",
    )
    flag("--tracker_name", default="cogvideox-lora", help="project name in the tracker")
    flag("--push_to_hub", action="store_true", help="upload the LoRA, its card and videos at the end (a new repository is private)")
    flag("--hub_token", help="hub token; better in the environment as HF_TOKEN, where no process list shows it")
    flag("--hub_model_id", help="repository name (default: the name of --output_dir)")
    return parser


def check_flags(args):
    """Every mistake that the flags alone show, each a sentence. Fills in the defaults that depend on other flags."""
    problems = check_data_flags(args)
    problems += below(
        args, 1, "rank", "train_batch_size", "num_train_epochs", "max_train_steps", "gradient_accumulation_steps", "lr_num_cycles"
    )
    problems += below(
        args,
        1,
        "num_validation_videos",
        "num_inference_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "logging_steps",
        "max_skipped_steps",
    )
    problems += below(args, 1, "validation_height", "validation_width", "validation_frames")
    problems += below(
        args, 0, "lr_warmup_steps", "validation_epochs", "validation_steps", "eval_clips", "eval_steps", "seed", "guidance_scale"
    )
    problems += below(args, 0, "learning_rate", "lr_power", "adam_weight_decay", "max_grad_norm")
    problems += not_above_zero(args, "lora_alpha", "snr_gamma", "adam_epsilon", "process_timeout_minutes")
    for name in ("adam_beta1", "adam_beta2", "prodigy_beta3", "lora_dropout", "ema_decay"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            problems.append(f"--{name} {value}: at least 0 and below 1")
    if not 0 <= args.caption_dropout <= 1:
        problems.append(f"--caption_dropout {args.caption_dropout}: a share from 0 to 1")
    if args.training_type == "sft":
        for name, off in (("init_lora", None), ("lora_dropout", 0.0), ("base_precision", "stored"), ("offload", False)):
            if getattr(args, name) != off:
                problems.append(f"--{name}: of a LoRA or its frozen base; --training_type sft has neither")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        problems.append("--overwrite_output_dir and --resume_from_checkpoint: one removes what the other needs; give one of them")
    if args.use_8bit_adam and args.optimizer == "prodigy":
        problems.append("--use_8bit_adam: works with AdamW and Adam, not with Prodigy")
    elif args.use_8bit_adam:
        args.optimizer = args.optimizer.removesuffix("8bit") + "8bit"
    if args.gradient_checkpointing not in ("auto", "all", "attention", "none") and not args.gradient_checkpointing.isdecimal():
        problems.append(f"--gradient_checkpointing {args.gradient_checkpointing}: auto, all, attention, none, or a number of blocks")
    needs = {"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes", "adam8bit": "bitsandbytes"}
    for words, package in (
        (f"--optimizer {args.optimizer}", needs.get(args.optimizer)),
        (f"--base_precision {args.base_precision}", "bitsandbytes" if args.base_precision == "nf4" else None),
    ):
        if package and importlib.util.find_spec(package) is None:
            problems.append(f"{words} needs {package}: pip install {package}")
    if args.report_to not in ("all", "none") and importlib.util.find_spec(args.report_to) is None:
        problems.append(f"--report_to {args.report_to} needs a package: pip install {args.report_to}, or --report_to none")

    if Path(args.logging_dir).name != args.logging_dir or args.logging_dir in ("", "..", "validation", "encoded", "best"):
        problems.append(f"--logging_dir {args.logging_dir}: the name of a folder inside --output_dir, without slashes")

    for name in ("output_dir", "resume_from_checkpoint", "init_lora"):
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    args.lora_alpha = args.lora_alpha or float(args.rank)
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else LEARNING_RATES[args.training_type]
    separator = args.validation_prompt_separator or "\n"
    args.prompts = [p.strip() for p in (args.validation_prompt or "").split(separator) if p.strip()]
    if args.validation_prompt and not args.prompts:
        problems.append("--validation_prompt: holds no prompt")
    return problems


def parse_args(words=None):
    """The checked flags; ends with exit code 2 and all problems, one a line."""
    parser = build_parser()
    args = parser.parse_args(words)
    if problems := check_flags(args):
        parser.exit(2, "".join(f"ERROR[2]: {problem}\n" for problem in problems))
    return args


if __name__ == "__main__":
    end_with_launcher()
    ARGS = parse_args()

import filelock
import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader

from cogvideox import checkpoint, engine, hub, lora, memory, metrics, rehearsal, report, scoring, sft, stopping, validation
from cogvideox.console import BAD_DATA, BAD_FLAGS, BAD_OUTPUT, fail, say, warn
from cogvideox.encodings import encode_data, known_components
from cogvideox.files import try_writing
from cogvideox.folder import (
    COGVIDEOX_2B,
    PRECISIONS,
    check_geometry,
    check_model_folder,
    find_model,
    load_tokenizer,
    read_facts,
    stored_precision,
)
from cogvideox.launch import folders_not_shared, lock_folder, patient_barrier_maker, peak_memory_gib, start_processes
from cogvideox.linear import hold_linears
from cogvideox.model import (
    blocks_to_recompute,
    checkpoint_blocks,
    compile_blocks,
    load_scheduler,
    load_vae,
    rotary_tables,
)
from cogvideox.optimizer import make_optimizer, make_schedule
from cogvideox.order import Plan, positions_of, seeded_generator
from cogvideox.reader import Readers, decode_workers
from cogvideox.survey import check_data
from dataset import TrainingClips

# -----------------------------------------------------------------------------
# Loss


def velocity_loss(transformer, scheduler, batch, rotary, dtype):
    """The velocity error of each clip of a batch, [B], in fp32.

    v = sqrt(abar) noise - sqrt(1 - abar) latents (Salimans & Ho, 2022, "Progressive distillation", appendix D). The
    weighted x0 error of other CogVideoX trainers, |x0_hat - x0|^2 / (1 - abar), is this by algebra; taken directly there
    is no division by 1 - abar (0.0025 at t = 0), which in bf16 puts a floor of 0.07 under the loss.
    """
    latents, noise, timestep = batch["latents"], batch["noise"], batch["timestep"]  # [B, F, C, H, W] twice, [B]
    noisy = scheduler.add_noise(latents, noise, timestep)  # fp32: add_noise rounds its schedule to its input's dtype
    target = scheduler.get_velocity(latents, noise, timestep)
    predicted = transformer(
        hidden_states=noisy.to(dtype),
        encoder_hidden_states=batch["prompt"].to(dtype),
        timestep=timestep,
        image_rotary_emb=rotary,
        return_dict=False,
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
    """What an optimizer step tells: a loss, the positions and the timesteps of each micro-batch, and the numbers of the step."""

    losses: list
    positions: list
    timesteps: list
    grad_norm: float = math.nan
    finite: bool = False  # whether the gradient was; if not, nothing was updated
    learning_rate: float = 0.0
    seconds_waited: float = 0.0  # for the data


def train_step(args, trained, batches, compute_loss, step):
    """One optimizer step on the next --gradient_accumulation_steps batches. compute_loss: (model, batch) -> the mean loss."""
    accelerator, optimizer, result = trained.accelerator, trained.optimizer, StepResult([], [], [])
    # The seed is for LoRA dropout, the only random numbers that are drawn inside the model.
    torch.manual_seed(seeded_generator(args.seed, "dropout", step, accelerator.process_index).initial_seed())
    for _ in range(args.gradient_accumulation_steps):
        asked = time.perf_counter()
        batch = {name: value.to(trained.device, non_blocking=True) for name, value in next(batches).items()}
        result.seconds_waited += time.perf_counter() - asked
        with accelerator.accumulate(trained.model):
            loss = compute_loss(trained.model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                # The norm is of the summed gradients, so all ranks see the same. fp16's scaler skips by itself.
                norm = accelerator.clip_grad_norm_(trained.parameters, args.max_grad_norm or math.inf)
                result.grad_norm = float(engine.whole(norm))
                result.finite = math.isfinite(result.grad_norm)
                if result.finite or accelerator.scaler:
                    optimizer.step()
                    trained.update_average()
                optimizer.zero_grad()
        result.losses.append(loss.detach())
        result.positions.append(batch["position"])
        result.timesteps.append(batch["timestep"])
    result.learning_rate = trained.schedule.get_last_lr()[0]
    trained.schedule.step()
    return result


# -----------------------------------------------------------------------------
# The run


def choose_precision(wanted, folder, variant):
    """The compute precision: the one asked for, or that of the stored weights. Returns (precision, problem)."""
    on_gpu = torch.cuda.is_available()
    if wanted == "fp16" and not on_gpu:
        return wanted, "--mixed_precision fp16: this machine has no GPU, and CPUs have no fast fp16; use bf16 or no"
    if wanted == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        return wanted, f"--mixed_precision bf16: {torch.cuda.get_device_name()} has no bf16; use fp16"
    if wanted is None and folder:
        stored = stored_precision(folder, "transformer", variant)
        return ("no" if stored == "fp16" and not on_gpu else stored), None
    return wanted or "no", None


def prepare_output_dir(args, accelerator):
    """Make --output_dir and keep other runs out of it. Returns (lock, problems): a file in its place, not writable, in use
    by another run, or holding an earlier run that was not asked for. Every process calls it."""
    output_dir, lock, problem = Path(args.output_dir), None, None
    if accelerator.is_main_process:
        try:
            for flag in ("encoding_cache_dir", "output_dir"):
                tried = f"--{flag} {getattr(args, flag)}"
                try_writing(Path(getattr(args, flag)))
            lock = lock_folder(output_dir)
        except filelock.Timeout:
            problem = f"--output_dir {output_dir}: another run is writing there"
        except OSError as error:
            problem = f"{tried}: cannot be written to ({error.strerror})"
        else:
            earlier = holds_earlier_run(output_dir)
            if earlier and not (args.resume_from_checkpoint or args.overwrite_output_dir):
                problem = (
                    f"--output_dir {output_dir}: holds an earlier run ({earlier}); go on with it "
                    "(--resume_from_checkpoint latest), remove it (--overwrite_output_dir), or name another folder"
                )
    problems = [problem for problem in broadcast_object_list([problem]) if problem]
    if not problems and accelerator.num_processes > 1:
        problems = folders_not_shared(accelerator, [("--output_dir", output_dir), ("--encoding_cache_dir", args.encoding_cache_dir)])
    return (None if problems else lock), problems


def holds_earlier_run(output_dir):
    """The name of something that would be lost if another run wrote into a folder; None if there is nothing."""
    kept = [path.parent.name for path in sorted(output_dir.glob("checkpoint-*/manifest.json"))] + [lora.RESULT, sft.RESULT]
    return next((name for name in kept if (output_dir / name).exists()), None)


def remove_earlier_run(output_dir, logging_dir):
    """Delete what a run writes, and nothing else, from a folder that holds one.

    dataset.json and dataset_report.txt stay: the new run's check of the clips has written over them already.
    """
    names = [lora.RESULT, sft.RESULT, "README.md", "metrics.jsonl", "loss.png", "status.json", "validation", "encoded", "best", logging_dir]
    names += [report.NAME, "run.json"]
    checkpoints = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+(\.partial|\.abandoned)?", path.name)]
    for path in [*checkpoints, *(output_dir / name for name in names)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def open_model(args):
    """The model's folder, ModelFacts and tokenizer, from configs and headers only, and every problem that they show.

    Returns (folder, facts, tokenizer, problems), and fills in --mixed_precision.
    """
    problems, folder, facts, tokenizer = [], None, COGVIDEOX_2B, None
    token = args.hub_token or os.environ.get("HF_TOKEN")
    try:
        folder = find_model(args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, token)
        problems += check_model_folder(folder, args.variant, may_lack=known_components(folder, args.encoding_cache_dir, args.variant))
        if not problems:
            facts, tokenizer = read_facts(folder), load_tokenizer(folder)
            problems += lora.check_targets(folder, args.target_modules) if args.training_type == "lora" else []
    except ValueError as error:
        problems.append(str(error))
    args.mixed_precision, problem = choose_precision(args.mixed_precision, None if problems else folder, args.variant)
    problems += [problem] if problem else []
    problems += engine.unfit_flags(args)
    for height, width in args.bucket_sizes or [(args.height, args.width)]:
        for frames in args.bucket_lengths or [args.max_num_frames]:
            names = ("--bucket",) * 3 if args.bucket else ("--height", "--width", "--max_num_frames")
            problems += check_geometry(facts, height, width, frames, names)
    pixels = facts.spatial_multiple  # a size that is not given is a trained one, which is legal
    shape = (
        args.validation_height or pixels,
        args.validation_width or pixels,
        args.validation_frames or 1 + 4 * (facts.latents_per_patch - 1),
    )
    problems += check_geometry(facts, *shape, names=("--validation_height", "--validation_width", "--validation_frames"))
    return folder, facts, tokenizer, list(dict.fromkeys(problems))  # the same size may have been asked for twice


def prepare_transformer(transformer, args, accelerator, dtype, hold=True):
    """Bring a transformer, with its LoRA or all trainable, to the device and into the form that training steps run in.

    hold: whether frozen layers become FrozenLinear where something is gained by it.
    """
    lora.fit_to_autocast(transformer, dtype)
    if not engine.splits_weights(accelerator):  # an engine that shards has to see all weights, and brings its shard to the device
        if hold:
            hold_linears(transformer, args.base_precision, args.offload, accelerator.device)
        transformer.to(accelerator.device)
    # With auto the rehearsal starts with every block recomputed, and takes back what fits.
    checkpoint_blocks(transformer, *blocks_to_recompute(args.gradient_checkpointing, len(transformer.transformer_blocks)))
    if args.compile:
        compile_blocks(transformer, accelerator.device)
    transformer.train()


def make_losses(args, transformer, scheduler, dtype, device):
    """(compute_loss, clip_losses): functions of a model and a batch, to the loss that is trained and to the plain loss of each clip."""
    rotary_of = rotary_tables(transformer, device)
    weights = loss_weights(scheduler, args.snr_gamma, device) if args.snr_gamma else None

    def clip_losses(model, batch):
        return velocity_loss(model, scheduler, batch, rotary_of(batch), dtype)

    def compute_loss(model, batch):
        losses = clip_losses(model, batch)
        return (losses if weights is None else losses * weights[batch["timestep"]]).mean()

    return compute_loss, clip_losses


def main(args):
    """One training run, from flags to a LoRA on disk."""
    # The model's configs are read before any of its weights; its problems are told together with the data's.
    folder, facts, tokenizer, problems = open_model(args)

    # Processes. From here on every line runs on every rank; the main one prints and writes.
    accelerator = start_processes(args.mixed_precision, args.gradient_accumulation_steps, args.process_timeout_minutes)
    if __name__ == "__main__":  # from here on a signal is noted, and the run ends where nothing is lost
        stopping.listen(args.output_dir)
    barrier, device, is_main, output_dir = patient_barrier_maker(), accelerator.device, accelerator.is_main_process, Path(args.output_dir)
    dtype = PRECISIONS[args.mixed_precision]
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    lock, output_problems = prepare_output_dir(args, accelerator)  # the lock lasts as long as its object
    if output_problems:
        fail(BAD_OUTPUT, output_problems + problems)

    # Data: every clip is opened and decoded once, then encoded once; afterwards neither T5 nor the VAE is in memory.
    with Readers(decode_workers(), args.clip_timeout_seconds) as readers:
        data = check_data(args, facts, tokenizer, readers, accelerator, barrier)
        if problems or data.problems:
            fail(BAD_FLAGS if problems else BAD_DATA, problems + data.problems)
        if is_main and args.overwrite_output_dir and holds_earlier_run(output_dir):
            remove_earlier_run(output_dir, args.logging_dir)  # not before everything that could be wrong has been found right
        if args.dry_run and is_main:
            say_predicted_memory(args, folder, accelerator)
        encodings, prompts, negative_prompt, identities = encode_data(args, folder, facts, tokenizer, data, readers, accelerator, barrier)

    # Transformer: frozen, in the compute dtype, with a LoRA in fp32; or all of it in fp32.
    scheduler, result = load_scheduler(folder), checkpoint.RESULTS[args.training_type]
    build = functools.partial(result.build, args, folder, dtype)
    transformer = build()
    export = functools.partial(result.export, stored_dtype=PRECISIONS[stored_precision(folder, "transformer", args.variant)])
    result_facts = result.facts(args, transformer) | {"trigger": args.id_token or "", "example_prompt": data.records[0].caption}
    try:
        if args.init_lora:
            lora.load_exported(transformer, args.init_lora)
    except ValueError as error:
        fail(BAD_FLAGS, f"--init_lora {args.init_lora}: {error}")
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    num_trained, num_parameters = sum(p.numel() for p in parameters), sum(p.numel() for p in transformer.parameters())
    prepare_transformer(transformer, args, accelerator, dtype)

    # Optimizer and schedule. Steps are optimizer steps.
    plan = Plan.of(args, data, accelerator.num_processes)
    learning_rate = args.learning_rate * (plan.clips_per_step if args.scale_lr else 1)
    optimizer = make_optimizer(args, parameters, learning_rate)
    schedule = make_schedule(args, optimizer, plan.total_steps)
    model, optimizer, parameters = engine.prepare(accelerator, transformer, optimizer, args.train_batch_size, args.max_grad_norm, dtype)
    average = engine.make_average(parameters, args.ema_decay) if args.ema_decay else None
    trained = engine.Trained(accelerator, transformer, model, parameters, optimizer, schedule, average, build, dtype, barrier)
    compute_loss, clip_losses = make_losses(args, transformer, scheduler, dtype, device)
    num_timesteps = scheduler.config.num_train_timesteps
    clips = TrainingClips(
        encodings, plan.clip_of, args.seed, facts.scaling_factor, num_timesteps, args.caption_dropout, args.random_flip,
        args.timestep_sampling,
    )  # fmt: skip

    # Rehearsal: what would fail after ten hours fails in the first minute.
    memory_explained = functools.partial(
        stopping.explained_memory, blocks=len(transformer.transformer_blocks), peak=lambda: peak_memory_gib(device)
    )
    largest = max(plan.clips, key=lambda i: data.clips[i]["frames"] * data.clips[i]["height"] * data.clips[i]["width"])
    with memory_explained("in the rehearsal of one step at the largest shape"):
        measured = rehearsal.rehearse(
            args, accelerator, model, transformer, optimizer, trained.full_model, result, export, result_facts, clips, largest,
            functools.partial(compute_loss, model), steps=2 if args.dry_run else 1,
        )  # fmt: skip
    if problem := rehearsal.report(args, *measured, plan.total_steps, device, num_trained):
        fail(BAD_OUTPUT, problem)
    if args.dry_run:
        say("--dry_run: nothing was trained")
        accelerator.end_training()
        return

    # Who watches; each does nothing while its flag is off. The scorer scores the base model before a checkpoint changes it.
    run_facts = {"flags": checkpoint.public_flags(args), "clips_per_step": plan.clips_per_step, **identities}
    checkpointer = checkpoint.Checkpointer(args, trained, result, export, run_facts, result_facts)
    scorer = scoring.Scorer(args, trained, clip_losses, encodings, data, facts.scaling_factor, num_timesteps)
    # There is no random state to restore: what a position trains is a function of the seed and the position.
    first_step = checkpointer.load()
    meter = metrics.Meter(args, trained, plan, first_step)
    vae = functools.partial(load_vae, folder, device, args.variant, args.enable_slicing, args.enable_tiling)
    clip_shapes = Counter((data.clips[i]["frames"], data.clips[i]["height"], data.clips[i]["width"]) for i in plan.clips)
    validator = validation.Validator(args, trained, scheduler, (prompts, negative_prompt), vae, clip_shapes.most_common(1)[0][0], plan)
    scorer.begin(meter, checkpointer, validator)
    guard = metrics.NonFiniteGuard(args, trained, plan.clip_of, data.records, checkpointer)
    metrics.start_trackers(args, accelerator, run_facts)
    say_plan(args, accelerator, plan, first_step, learning_rate, num_trained, num_parameters)
    run = describe_run(args, accelerator, plan, validator.settings, data, num_trained)
    if is_main and (problem := report.write_run_facts(output_dir, run)):
        warn(f"{problem}")

    # The loop
    if first_step == 0:
        if is_main:
            shutil.rmtree(output_dir / "best", ignore_errors=True)  # of a run that ended before its first checkpoint
        with trained.one_full_model():
            scorer.offer(0)
            validator.offer(0)
    ranks = accelerator.process_index, accelerator.num_processes
    positions = positions_of(*ranks, args.train_batch_size, args.gradient_accumulation_steps, first_step, plan.total_steps)
    batches = iter(
        DataLoader(clips, batch_sampler=list(positions), num_workers=args.dataloader_num_workers, pin_memory=device.type == "cuda")
    )
    step, stop = first_step, 0
    for step in meter.bar(first_step + 1, plan.total_steps):
        last = step == plan.total_steps
        with memory_explained(f"in step {step}"):
            outcome = train_step(args, trained, batches, compute_loss, step)
        guard.check(step, outcome)  # too many non-finite gradients end the run
        meter.offer(step, outcome, last)
        checkpointer.offer(step, last)
        with meter.paused(), trained.one_full_model():
            scorer.offer(step, last)
            validator.offer(step, last)
        # A signal to any rank ends the run here, on all of them, with everything on disk.
        if stop := stopping.stop_requested_anywhere(device):
            checkpointer.save(step)
            break
    if first_step >= plan.total_steps:
        say(f"already complete: {output_dir} has been trained for {first_step} of {plan.total_steps} steps")
        validator.make_missing(first_step)  # a kill in the last validation left it without videos
    finish(args, trained, result, checkpointer, scorer, validator, plan, step, stop, run, learning_rate)


def say_predicted_memory(args, folder, accelerator):
    """Print what the run will need of the device's memory, from configs alone."""
    device = accelerator.device.type
    configs = memory.on_device(memory.read_configs(folder, args.variant), device)
    engines = {"engine": engine.engine_of(accelerator), "processes": accelerator.num_processes}
    say("\npredicted, with every block recomputed where the flag is auto:")
    say("\n".join(memory.table(memory.predict(configs, args, velocity_loss, device, **engines))))


def say_plan(args, accelerator, plan, first_step, learning_rate, num_trained, num_parameters):
    """Print what will be trained."""
    epochs, precision = plan.total_steps * plan.clips_per_step / plan.epoch_clips, args.mixed_precision.replace("no", "fp32")
    what = f"rank {args.rank}, alpha {args.lora_alpha:g}" if args.training_type == "lora" else "full fine-tuning"
    say(
        f"\n{len(plan.clips)} clips; {args.train_batch_size} a batch x {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} accumulation = {plan.clips_per_step} clips a step\n"
        f"{plan.total_steps} steps = {epochs:.1f} epochs, from step {first_step}; learning rate {learning_rate:g}, {args.lr_scheduler}\n"
        f"training {num_trained / 1e6:.2f} M of {num_parameters / 1e6:.1f} M parameters ({what}), computing in {precision}; "
        f"engine: {engine.engine_of(accelerator)}\n"
    )


def describe_run(args, accelerator, plan, video, data, num_trained):
    """The content of run.json while nothing is trained yet, for the report and the model card. video: settings of validation's."""
    base = args.pretrained_model_name_or_path
    is_on_hub = not Path(base).expanduser().exists()
    facts = {"name": Path(args.output_dir).resolve().name, "device": report.device_name(accelerator.device)}
    facts |= {"processes": accelerator.num_processes, "engine": engine.engine_of(accelerator), "clips": len(plan.clips)}
    facts |= {"clips_per_step": plan.clips_per_step, "total_steps": plan.total_steps, "trained_parameters": num_trained}
    # Of a local folder only the name is told: the card may be published.
    facts |= {"base_model": base if is_on_hub else Path(base).name, "is_base_on_hub": is_on_hub}
    facts |= {"example_prompt": args.prompts[0] if args.prompts else data.records[0].caption}
    facts |= {name: video[name] for name in ("num_frames", "height", "width")} | {"steps": 0, "videos": []}
    defaults = {action.dest: action.default for action in build_parser()._actions}
    return report.run_facts(checkpoint.public_flags(args), facts, defaults)


def finish(args, trained, result, checkpointer, scorer, validator, plan, step, stop, run, learning_rate):
    """The one ending: the last checkpoint on disk, the verdict, card, plot, status and report, the push, and the exit code.

    stop: the signal that ended the loop, or 0. The result is on disk already, and nothing here can undo it.
    """
    output_dir, problem = Path(args.output_dir), None
    newest = checkpointer.newest()
    verdict = scoring.verdict(scorer.lines, learning_rate, ran_all=not stop)
    if trained.is_main:
        if newest is None and not checkpointer.failed:  # nothing was trained: the run was complete
            newest = output_dir / f"checkpoint-{step}"
            result.publish(newest, output_dir)
        run["facts"] |= hub.without_secrets({"steps": step, "videos": validator.videos_of(step)})
        problem = publish(args, output_dir, run, verdict, push=args.push_to_hub and not stop)
        code, reason = (1, problem) if problem else (0, "done")
        code, reason = (128 + stop, f"stopped by {signal.Signals(stop).name}") if stop else (code, reason)
        code, reason = (BAD_OUTPUT, "the last checkpoint was not written") if checkpointer.failed else (code, reason)
        stopping.write_status(output_dir, code, reason, step, newest, verdict=verdict[0], verdict_sentences=verdict[1])
        report.refresh(output_dir)
    trained.barrier()  # the launcher ends all processes soon after the first one is gone
    trained.accelerator.end_training()
    if stop:
        say(f"stopped by {signal.Signals(stop).name} after step {step} of {plan.total_steps}; --resume_from_checkpoint latest goes on")
        raise SystemExit(128 + stop)
    if checkpointer.failed:
        fail(BAD_OUTPUT, f"the last checkpoint was not written; the newest is {newest}")
    if problem:
        fail(1, problem)


def publish(args, output_dir, run, verdict, push):
    """Write run.json, the card and the plot, say the verdict, and upload if it was asked for. Returns what failed, or None."""
    if problem := report.write_run_facts(output_dir, run):
        warn(f"{problem}")
    try:
        hub.write_model_card(output_dir, run)
        metrics.plot_losses(output_dir / "metrics.jsonl", output_dir / "loss.png")
    except OSError as error:
        warn(f"the model card and the plot were not written ({error})")
    made, (word, sentences) = output_dir / checkpoint.RESULTS[args.training_type].RESULT, verdict
    say(f"\nverdict: {word}. {' '.join(sentences)}")
    say(f"\nthe result: {made}\nhow to use it: {output_dir / 'README.md'}\nthe run on a page: {output_dir / report.NAME}")
    if not push:
        return None
    token = args.hub_token or os.environ.get("HF_TOKEN")
    try:
        say(f"uploaded to {hub.push(output_dir, args, token)}")
    except Exception as error:  # the hub client raises many kinds; the result is here whatever it says
        reason = hub.without_secrets((str(error).splitlines() or [""])[0], token)
        return f"--push_to_hub: the upload failed ({type(error).__name__}: {reason}); everything is in {output_dir}"
    return None


if __name__ == "__main__":
    record(main)(ARGS)  # a process that fails tells the launcher its traceback
