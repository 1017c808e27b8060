"""Before step 1: everything that would otherwise fail after hours, once, on the real configuration, its effect undone."""

import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import default_collate

from cogvideox import hub, lora
from cogvideox.launch import BAD_OUTPUT, fail, peak_memory_gib, say
from cogvideox.optimizer import make_optimizer
from cogvideox.video import read_video, write_video


def rehearse(args, accelerator, model, transformer, scheduler, clips, largest, loss_of, steps=1):
    """One forward, backward and optimizer step at the largest shape, a LoRA saved and loaded again, an mp4, a card.

    clips: the TrainingClips. largest: the index of the clip with the most latents. loss_of: batch -> loss. The weights are
    put back, the optimizer is a throw-away, and nothing random is drawn from a stream that training uses. Every process
    calls it. Returns (seconds of an optimizer step, peak GiB, MiB of a checkpoint).
    """
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer(args, parameters, max(args.learning_rate, 1e-4))
    batch = default_collate([clips.item(largest, position) for position in range(args.train_batch_size)])
    batch = {name: value.to(accelerator.device) for name, value in batch.items()}
    for _ in range(steps):
        started = time.perf_counter()
        loss_of(batch).backward()  # without fp16's scaler, whose first scale may be too large and is nobody's fault
        if all(torch.isfinite(p.grad).all() for p in parameters):
            optimizer.step()
        optimizer.zero_grad()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        seconds = (time.perf_counter() - started) * args.gradient_accumulation_steps
    peak = peak_memory_gib(accelerator.device)
    checkpoint_bytes = 2 * sum(p.numel() * 4 for p in parameters) + sum(
        value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )
    del optimizer
    folder, problem = Path(args.output_dir) / ".rehearsal", None
    if accelerator.is_main_process:
        try:
            folder.mkdir(exist_ok=True)
            lora.save_lora(folder, transformer, {})
            _, effect = lora.check_export(folder, transformer, scheduler)
            if effect == 0:
                say("warning: an optimizer step changes no output of the model; check --learning_rate and --target_modules")
            write_video(folder / "video.mp4", np.zeros((5, 32, 32, 3), np.uint8), args.fps)
            assert len(read_video(folder / "video.mp4")) == 5
            hub.write_model_card(folder, args, hub.NO_FACTS)
        except (OSError, ValueError, RuntimeError) as error:
            problem = f"rehearsal in {folder}: {type(error).__name__}: {error}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if problem := broadcast_object_list([problem])[0]:
        fail(BAD_OUTPUT, problem)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return seconds, peak, checkpoint_bytes / 2**20


def report(args, seconds, peak, checkpoint_mib, total_steps, device, trained):
    """What the rehearsal measured, and what it means for the whole run. Returns a problem, or None."""
    kept = -(-total_steps // args.checkpointing_steps)
    kept = min(kept, args.checkpoints_total_limit + 1) if args.checkpoints_total_limit else kept
    free = shutil.disk_usage(args.output_dir).free / 2**20
    capacity = f" of {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f}" if device.type == "cuda" else ""
    say(
        f"rehearsal: {seconds:.2f} seconds a step, {total_steps * seconds / 3600:.2f} hours for {total_steps} steps (without validation); "
        f"peak {peak:.2f}{capacity} GiB; {trained / 1e6:.2f} M parameters trained;\n"
        f"           {checkpoint_mib:.1f} MiB a checkpoint, {kept * checkpoint_mib:.0f} MiB for {kept} of them, {free:.0f} MiB free"
    )
    if checkpoint_mib * 1.5 > free:
        return f"--output_dir {args.output_dir}: a checkpoint takes {checkpoint_mib:.0f} MiB and {free:.0f} MiB are free; name another disk"
    return None
