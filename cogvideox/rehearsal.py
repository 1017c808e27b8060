"""The rehearsal before step 1: one step, save and video on the real configuration, with all effects undone."""

import contextlib
import copy
import dataclasses
import itertools
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideox import attention, engine, hub
from cogvideox.console import BAD_OUTPUT, fail, say, warn
from cogvideox.flags import public_flags
from cogvideox.launch import peak_memory_gib, peak_memory_text, synchronize
from cogvideox.model import checkpoint_blocks
from cogvideox.report import run_facts
from cogvideox.stopping import exit_if_requested
from cogvideox.validation import undisturbed
from cogvideox.video import read_video, write_video


class Measured(NamedTuple):
    """Measurements of the rehearsal. forward_seconds: of a forward pass on the batch. save_seconds: of a checkpoint, estimated."""

    seconds_per_step: float
    peak_gib: float
    checkpoint_mib: float
    forward_seconds: float
    save_seconds: float


def rehearse(args, trained, result_facts, batch, compute_loss, train_step):
    """Take one optimizer step at the largest shape, save and reload its result, write an mp4 and a card, then undo all of it.

    result_facts: the metadata of the exported file. batch: CPU tensors. compute_loss: (model, batch) -> the mean loss.
    train_step: the script's. With --dry_run a second step is timed, without first-step overhead. Every rank calls it. Returns
    Measured.
    """
    accelerator, device, forward_seconds = trained.accelerator, trained.device, 0.0

    def timed_loss(model, batch):
        nonlocal forward_seconds
        synchronize(device)
        started = time.perf_counter()
        loss = compute_loss(model, batch)
        synchronize(device)
        forward_seconds = time.perf_counter() - started
        return loss

    attention.settle(args, trained, batch)
    live = dataclasses.replace(trained, average=None)
    with undone(args, trained):
        create_optimizer_states(trained)  # before the memory is measured: every step but the first runs beside them
        fit_to_memory(args, trained, lambda: compute_loss(trained.model, {name: value.to(device) for name, value in batch.items()}))
        for _ in range(2 if args.dry_run else 1):
            started = time.perf_counter()
            finite, tries = False, 0
            while not finite and tries < 20:  # fp16's scaler starts high, and halves its scale after an overflow
                exit_if_requested()
                outcome = train_step(args, live, itertools.repeat(batch), timed_loss, 0)
                finite, tries = outcome.finite or not accelerator.scaler, tries + 1
            synchronize(device)
            seconds = (time.perf_counter() - started) / tries * args.gradient_accumulation_steps
        if args.compile:  # that step compiled; scores and videos run without compilation
            with undisturbed(trained.transformer):
                timed_loss(trained.model, {name: value.to(device) for name, value in batch.items()})
        peak, megabytes = peak_memory_gib(device), checkpoint_mebibytes(args, trained)
        state = trained.state()
        with trained.full_model() as full_model:
            problem, rate = try_results(args, trained, full_model, state, result_facts) if trained.is_main else (None, 0.0)
    problem, rate = broadcast_object_list([problem, rate])
    if problem:
        fail(BAD_OUTPUT, problem)
    return Measured(seconds, peak, megabytes, forward_seconds, megabytes * rate)


@contextlib.contextmanager
def undone(args, trained):
    """Undo the block's steps: restore weights, optimizer, schedule and scaler. A collective.

    In the block a step is one batch, regardless of --gradient_accumulation_steps, with a learning rate of at least 1e-4, so that
    it changes the weights even if a warm-up starts at 0.
    """
    accelerator, parameters, deepspeed = trained.accelerator, trained.parameters, engine.uses_deepspeed(trained.accelerator)
    # In host memory: beside the model, a second copy of all weights would take memory that training has.
    weights = [(engine.read_weight(p) if deepspeed else engine.local(p.detach())).to("cpu", copy=True) for p in parameters]
    groups = [dict(group) for group in trained.optimizer.param_groups]
    schedule, scaler = copy.deepcopy(trained.schedule.state_dict()), accelerator.scaler and accelerator.scaler.state_dict()
    accelerator.gradient_accumulation_steps = 1
    for group in trained.optimizer.param_groups:
        group["lr"] = max(args.learning_rate, 1e-4)
    yield
    accelerator.gradient_accumulation_steps, accelerator.step = args.gradient_accumulation_steps, 0
    with torch.no_grad():
        for parameter, value in zip(parameters, weights, strict=True):
            engine.write_weight(parameter, value) if deepspeed else engine.local(parameter).copy_(value)
    if deepspeed:
        engine.load_optimizer_state(trained.optimizer, parameters, {"state": {}, "param_groups": groups})
    else:
        trained.optimizer.zero_grad()
        engine.inner_optimizer(trained.optimizer).state.clear()
    for group, before in zip(trained.optimizer.param_groups, groups, strict=True):
        group.update(before)
    trained.schedule.load_state_dict(schedule)
    if scaler:
        accelerator.scaler.load_state_dict(scaler)


def create_optimizer_states(trained):
    """Have the optimizer allocate its states, by a step with gradients of zero. Call it inside `undone`.

    An optimizer allocates them in its first step, after the peak of the first backward pass: that the second step does not fit
    would show only then. DeepSpeed's are there from the start.
    """
    if engine.uses_deepspeed(trained.accelerator):
        return
    for parameter in trained.parameters:
        parameter.grad = torch.zeros_like(parameter)
    engine.inner_optimizer(trained.optimizer).step()  # not accelerate's, whose fp16 scaler has no scale yet
    for parameter in trained.parameters:
        parameter.grad = None


def checkpoint_mebibytes(args, trained):
    """The approximate size of a checkpoint, once a step has created the optimizer states."""
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in trained.parameters)
    states = engine.inner_optimizer(trained.optimizer).state if not engine.uses_deepspeed(trained.accelerator) else {}
    tensors = [value for state in states.values() for value in state.values() if torch.is_tensor(value)]
    moments = sum(value.numel() * value.element_size() for value in tensors) or numel * 8
    halved = args.training_type == "sft" and args.mixed_precision != "no"  # the stored dtype is usually half of fp32
    return (numel * (6 if halved else 8) + moments + (numel * 4 if args.ema_decay else 0)) / 2**20


def try_results(args, trained, full_model, state, result_facts):
    """Write and reload a result, write and read a video, write a card, all in a temporary folder.

    state: the weights after a step. Returns (the problem as a sentence or None, seconds per written MiB). Only rank 0 calls it.
    """
    folder, rate, problem = Path(args.output_dir) / ".rehearsal", 0.0, None
    try:
        folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(1) as thread:  # ffmpeg is a process of its own
            pictures = thread.submit(try_video_and_card, args, folder)
            started = time.perf_counter()
            trained.kind.write(folder, trained.export(full_model, state), result_facts)
            written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
            rate = (time.perf_counter() - started) / written
            _, effect = trained.kind.check_export(folder, full_model)
            problem = pictures.result()
        if effect == 0:
            warn("an optimizer step does not change the model's output; check --learning_rate and --target_modules")
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return problem and f"rehearsal in {folder}: {problem}", rate


def try_video_and_card(args, folder):
    """Write and read a video of five frames, and write a model card. Returns the problem, or None."""
    write_video(folder / "video.mp4", np.zeros((5, 32, 32, 3), np.uint8), args.fps)
    if (frames := len(read_video(folder / "video.mp4"))) != 5:
        return f"a video of 5 frames was read back with {frames} frames"
    hub.write_model_card(folder, run_facts(public_flags(args), hub.NO_FACTS))
    return None


def fit_to_memory(args, trained, loss):
    """With --gradient_checkpointing auto, recompute as few blocks as fit in memory. loss: () -> the loss of the largest batch."""
    accelerator = trained.accelerator
    if args.gradient_checkpointing != "auto":
        return
    if engine.splits_weights(accelerator) or engine.uses_deepspeed(accelerator):
        # Running a block alone, to measure it, would gather it and not release it.
        say("gradient checkpointing: all blocks are recomputed, because auto does not measure this engine (faster: attention, none or N)")
        return
    with accelerator.no_sync(trained.model):
        fit_checkpointing(accelerator, trained.transformer, lambda: loss().backward())
    for parameter in trained.parameters:
        parameter.grad = None


@torch.compiler.set_stance("force_eager")  # do not compile for a measurement
def fit_checkpointing(accelerator, transformer, step):
    """Recompute as few blocks as fit in the free memory. step: runs a forward and a backward pass at the largest shape.

    Measures the memory that one block would keep. Unless all blocks fit twice, runs the step with every block recomputed, which needs
    the least memory, and measures the memory left free: 15 % of it stay unused, for fragmentation and other programs. Every rank
    calls it, and all use the plan of the rank with the least free memory.
    """
    blocks, device, processes = transformer.transformer_blocks, accelerator.device, accelerator.num_processes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    args, kwargs = first_inputs(blocks[0], step)
    with accelerator.autocast():
        kept, attention = kept_bytes(blocks[0], args, kwargs)
    room = free_bytes(device) / (1 if device.type == "cuda" else processes)
    gradients = sum(weight.nbytes for weight in transformer.parameters() if weight.requires_grad)
    plan = 0, True
    # In its backward pass a block takes about as much again as it keeps; the other layers take less than three more blocks.
    if not all(gather_object([2 * ((len(blocks) + 4) * kept + gradients) <= room])):
        checkpoint_blocks(transformer, len(blocks), False)
        step()
        room = free_bytes(device)
        if device.type == "cpu":  # the step's own memory is free again, and was not subtracted
            room = room / processes - 2 * kept
        plans = gather_object([fewest_recomputed(len(blocks), kept, attention, 0.85 * room)])
        plan = max(plans, key=lambda plan: (plan[0], not plan[1]))
    checkpoint_blocks(transformer, *plan)
    recomputed, keep_attention = plan
    attention_note = "" if recomputed == 0 else ", except attention" if keep_attention else ", including attention"
    say(
        f"gradient checkpointing: {recomputed} of {len(blocks)} blocks are recomputed{attention_note} "
        f"(a block keeps {kept / 2**20:.0f} MiB; {room / 2**30:.1f} GiB were free)"
    )


class BlockReached(Exception):
    """The inputs of a block: (args, kwargs)."""


@torch.no_grad()  # nothing is checkpointed then: an exception would leave torch's hooks behind
def first_inputs(block, step):
    """The (args, kwargs) of a block's first call in `step()`, which ends there."""

    def stop(block, args, kwargs):
        raise BlockReached(args, kwargs)

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        step()
    except BlockReached as reached:
        return reached.args
    finally:
        handle.remove()


def fewest_recomputed(blocks, kept, attention, room):
    """(how many blocks to recompute, whether to keep their attention outputs): the fastest choice that fits.

    kept, attention: bytes that one block keeps for the backward pass, and bytes of its attention outputs. room: bytes free while
    every block is fully recomputed.
    """
    for recomputed in range(blocks + 1):
        if (blocks - recomputed) * kept + recomputed * attention <= room:
            return recomputed, True
    return blocks, False


def kept_bytes(block, args, kwargs):
    """(bytes that a block keeps for its backward pass, bytes of its attention outputs), measured by running it once."""
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

    def trainable(one):
        return one.detach().requires_grad_(one.is_floating_point()) if torch.is_tensor(one) else one

    args, kwargs = [trainable(one) for one in args], {name: trainable(one) for name, one in kwargs.items()}
    weights = {weight.untyped_storage().data_ptr() for weight in block.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Watch():
        outputs = block(*args, **kwargs)
    del outputs
    return sum(size for pointer, size in tensors.items() if pointer not in weights), sum(attention)


def free_bytes(device):
    """Free bytes: on a GPU, beyond the peak since its last reset; on a CPU, of this machine or container.

    What torch has reserved on the GPU is free where no tensor lies, except between the tensors of one segment, where a larger
    tensor does not fit and which cannot be given back.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        gaps = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.peak", 0)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device) - gaps
    available = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip().isdecimal():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def report(args, measured, total_steps, device, num_trained):
    """Print the rehearsal's measurements and the run's needs. Returns a problem, or None."""
    seconds, peak, checkpoint_mib = measured[:3]
    kept = -(-total_steps // args.checkpointing_steps)
    kept = min(kept, args.checkpoints_total_limit + 1) if args.checkpoints_total_limit else kept
    free = shutil.disk_usage(args.output_dir).free / 2**20
    say(
        f"rehearsal: {seconds:.2f} seconds per step, {total_steps * seconds / 3600:.2f} hours for {total_steps} steps without validation; "
        f"peak {peak_memory_text(device, peak)}; {num_trained / 1e6:.2f} M trainable parameters;\n"
        f"           {checkpoint_mib:.1f} MiB per checkpoint, {kept * checkpoint_mib:.0f} MiB for {kept} of them, {free:.0f} MiB free"
    )
    if checkpoint_mib * 1.5 > free:
        return f"--output_dir {args.output_dir}: a checkpoint needs {checkpoint_mib:.0f} MiB, but {free:.0f} MiB are free; use another disk"
    return None
