"""Before step 1: everything that would otherwise fail after hours, once, on the real configuration, its effect undone."""

import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

from cogvideox import engine, hub
from cogvideox.console import BAD_OUTPUT, fail, say, warn
from cogvideox.launch import peak_memory_gib
from cogvideox.model import checkpoint_blocks
from cogvideox.optimizer import make_optimizer
from cogvideox.report import run_facts
from cogvideox.video import read_video, write_video


def rehearse(args, accelerator, model, transformer, optimizer, whole, result, export, facts, clips, largest, loss_of, steps=1):
    """One forward, backward and optimizer step at the largest shape, the result saved and loaded again, an mp4, a card.

    whole: () -> a context with the model that has all its weights here. result, export: as in `take_snapshot`. facts: for the
    result's file. clips: the TrainingClips. largest: the index of the clip with the most latents. loss_of: batch -> loss.
    The weights are put back, the optimizer is a throw-away (DeepSpeed's is put back), and nothing random is drawn from a
    stream that training uses. Every process calls it. Returns (seconds of an optimizer step, peak GiB, MiB of a checkpoint).
    """
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    device, deepspeed = accelerator.device, engine.uses_deepspeed(accelerator)
    before = [engine.read_weight(p).cpu() if deepspeed else p.detach().clone() for p in parameters]
    batch = default_collate([clips.item(largest, position) for position in range(args.train_batch_size)])
    batch = {name: value.to(device) for name, value in batch.items()}
    if args.gradient_checkpointing == "auto" and (engine.splits_weights(accelerator) or deepspeed):
        # A block that is run by itself, to be measured, would be gathered and not let go.
        say("gradient checkpointing: every block is recomputed; this engine is not measured (attention, none or a number: less work)")
    elif args.gradient_checkpointing == "auto":
        with accelerator.no_sync(model):
            fit_checkpointing(accelerator, transformer, lambda: loss_of(batch).backward())
        for parameter in parameters:
            parameter.grad = None
    learning_rate = max(args.learning_rate, 1e-4)
    rehearsed = optimizer if deepspeed else make_optimizer(args, parameters, learning_rate)
    groups = [dict(group) for group in rehearsed.param_groups]
    for group in rehearsed.param_groups:
        group["lr"] = learning_rate
    for _ in range(steps):
        started = time.perf_counter()
        if deepspeed:
            accelerator.backward(loss_of(batch))  # takes the step too
        else:
            loss_of(batch).backward()  # without fp16's scaler, whose first scale may be too large and is nobody's fault
            if torch.isfinite(engine.whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))):
                rehearsed.step()
            rehearsed.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - started) * args.gradient_accumulation_steps
    peak = peak_memory_gib(device)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    states = [value for state in rehearsed.state.values() for value in state.values() if torch.is_tensor(value)] if not deepspeed else []
    moments = sum(value.numel() * value.element_size() for value in states) or trained * 8
    shipped = args.training_type == "sft" and accelerator.mixed_precision != "no"  # about: the stored dtype is usually half of fp32
    checkpoint_bytes = trained * (6 if shipped else 8) + moments + (trained * 4 if args.ema_decay else 0)
    if not deepspeed:
        del rehearsed
    folder, problem = Path(args.output_dir) / ".rehearsal", None
    live = result.live_state(transformer, keep=accelerator.is_main_process)
    with whole() as looked_at:
        if accelerator.is_main_process:
            try:
                folder.mkdir(exist_ok=True)
                result.write(folder, export(looked_at, live), facts)
                _, effect = result.check_export(folder, looked_at)
                if effect == 0:
                    warn("an optimizer step changes no output of the model; check --learning_rate and --target_modules")
                write_video(folder / "video.mp4", np.zeros((5, 32, 32, 3), np.uint8), args.fps)
                assert len(read_video(folder / "video.mp4")) == 5
                hub.write_model_card(folder, run_facts(vars(args), hub.NO_FACTS))
            except (OSError, ValueError, RuntimeError) as error:
                problem = f"rehearsal in {folder}: {type(error).__name__}: {error}"
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    del live
    if problem := broadcast_object_list([problem])[0]:
        fail(BAD_OUTPUT, problem)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            if deepspeed:
                engine.write_weight(parameter, value)
            else:
                parameter.copy_(value)
                parameter.grad = None
    if deepspeed:
        engine.load_optimizer_state(optimizer, parameters, {"state": {}, "param_groups": groups})
    return seconds, peak, checkpoint_bytes / 2**20


@torch.compiler.set_stance("force_eager")  # what is measured here is not to be compiled for it
def fit_checkpointing(accelerator, transformer, step):
    """Recompute no more blocks than the free memory asks for. step: runs a forward and a backward pass at the largest shape.

    The step is run with every block recomputed, which needs the least, and what it leaves free is measured; so is what one
    block would keep. A share of the room is left alone: memory breaks into pieces, and other programs come and go. Every
    process calls it, and all do as the one with the least room.
    """
    blocks, inputs = transformer.transformer_blocks, []
    handle = blocks[-1].register_forward_pre_hook(lambda block, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    step()
    handle.remove()
    room = free_bytes(accelerator.device)
    with accelerator.autocast():
        kept, attention = kept_bytes(blocks[-1], *inputs[0])
    inputs.clear()
    if accelerator.device.type == "cpu":  # what the step itself takes is free again, and was not counted
        room = room / max(1, accelerator.num_processes) - 2 * kept
    plan = max(gather_object([fewest_recomputed(len(blocks), kept, attention, 0.85 * room)]), key=lambda plan: (plan[0], not plan[1]))
    checkpoint_blocks(transformer, *plan)
    recomputed, keep_attention = plan
    how = "" if recomputed == 0 else ", their attention kept" if keep_attention else ", their attention too"
    say(
        f"gradient checkpointing: {recomputed} of {len(blocks)} blocks are recomputed{how} "
        f"(a block keeps {kept / 2**20:.0f} MiB; {room / 2**30:.1f} GiB were free)"
    )


def fewest_recomputed(blocks, kept, attention, room):
    """(how many blocks to recompute, whether to keep what their attention gave), the least work that fits.

    kept, attention: bytes that one block keeps for the backward pass, and that its attention alone gives. room: bytes free
    while every block is recomputed in full.
    """
    for recomputed in range(blocks + 1):
        if (blocks - recomputed) * kept + recomputed * attention <= room:
            return recomputed, True
    return blocks, False


def kept_bytes(block, args, kwargs):
    """(bytes that a block keeps for its backward pass, bytes of them that attention gave), by running it once."""
    tensors, attention = {}, []

    def keep(tensor):
        tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if "_scaled_dot_product" in str(operation):
                attention.extend(one.untyped_storage().nbytes() for one in result if torch.is_tensor(one))
            return result

    args = [one.detach().requires_grad_(one.is_floating_point()) if torch.is_tensor(one) else one for one in args]
    weights = {weight.untyped_storage().data_ptr() for weight in block.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Watch():
        outputs = block(*args, **kwargs)
    del outputs
    return sum(size for pointer, size in tensors.items() if pointer not in weights), sum(attention)


def free_bytes(device):
    """Bytes that are free on a GPU beside the peak since it was reset, or in this machine (or container)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    available = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip().isdecimal():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


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
