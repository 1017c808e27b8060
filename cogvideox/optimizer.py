"""Optimizers and learning-rate schedules by name."""

import importlib

import torch
from diffusers.optimization import get_scheduler

from cogvideox.console import without_line


@without_line("Using decoupled weight decay")  # Prodigy's
def make_optimizer(args, parameters, learning_rate):
    """The optimizer of `args` over fp32 parameters.

    Adam adds `adam_weight_decay` to the gradient (L2); AdamW and both 8-bit optimizers decouple it (bitsandbytes' Adam8bit decays
    like AdamW8bit). Prodigy estimates its step size and needs a learning rate near 1.
    """
    name = args.optimizer.lower()
    common = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if name == "prodigy":
        return importlib.import_module("prodigyopt").Prodigy(
            parameters,
            beta3=args.prodigy_beta3,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
            **common,
        )
    if name.endswith("8bit"):
        library = importlib.import_module("bitsandbytes").optim
        return (library.AdamW8bit if name == "adamw8bit" else library.Adam8bit)(parameters, **common)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(parameters, fused=True, **common)


def make_schedule(args, optimizer, total_steps):
    """The learning-rate schedule, in optimizer steps, independent of the number of processes.

    Do not pass it to accelerate, which would step it once per process.
    """
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def step_size(optimizer):
    """What an optimizer multiplies the schedule's rate by: Prodigy's estimate d of the step size; 1 for all others."""
    return optimizer.param_groups[0].get("d", 1.0)
