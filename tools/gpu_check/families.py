"""The other models of the family, with their published configs and random weights: a step at the size that each was made for."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

import train_cogvideox_lora as script
from cogvideox import memory, model
from cogvideox.folder import facts_of, largest_shape
from demo.make_model import TRANSFORMERS
from tools import estimate
from tools.benchmark import variants
from tools.benchmark.models import configs_of_size
from tools.benchmark.sizes import spell
from tools.gpu_check.phases import memory_row, peak_bytes
from tools.gpu_check.worker import attempt, configs_of, resident_bytes, step_job

STEPS = 2  # timed, after one that makes the optimizer's states and one whose memory is measured


def check_families(job):
    """A training step of each family at its own size, with as few blocks recomputed as the card has memory for."""
    for family in TRANSFORMERS:
        if family != "2b":  # of all other cases
            yield from attempt(f"{family}: training", measure_family(job, family), promised=True)


def measure_family(job, family):
    """The rows of one family."""
    device, (transformer, vae) = job["device"], configs_of_size(job["size"], family)
    facts = facts_of(transformer, vae)
    shape = (facts.sample_frames, *facts.sample_size)
    chosen = step_job(job, shape=list(shape), steps=STEPS, family=family)
    args = variants.our_flags(chosen)
    configs = configs_of(job) | {"transformer": transformer}
    recomputation, parts = plan_of(configs, args, device)
    settings = estimate.spell_recomputation(recomputation, memory.layers_of(configs))
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        run = variants.our_run(chosen, Path(folder))
        model.checkpoint_blocks(run.trained.transformer, *recomputation)
        run.step()
        peaks = peak_bytes(run.step, device, resident_bytes(run.trained))
        seconds = []
        for _ in range(STEPS):
            began = time.perf_counter()
            loss = run.step()  # reads the loss, and so waits for the device
            seconds.append(time.perf_counter() - began)
    claim = f"{family}: training at {spell(shape)}, {settings} recomputed"
    remark = f"{statistics.median(seconds):.2f} s a step, loss {loss:.3f}"
    yield memory_row(claim, parts["training"], peaks, remark, seconds=seconds, loss=loss)


def plan_of(configs, args, device):
    """(the least recomputation that fits this card, the prediction with it); all blocks on a CPU, whose memory is no card's."""
    if device == "cpu":
        plan, latents = (memory.layers_of(configs), False), memory.latents_of(configs, *largest_shape(args))
        return plan, memory.training_parts(configs, args, script.velocity_loss, latents, *plan, device)
    phases = dict.fromkeys(("captions", "clips_encode", "clips_decode", "sampling", "decoding"), 0)  # measured by other cases
    room = estimate.usable(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return estimate.chosen_recomputation(memory, configs, args, script.velocity_loss, room, device, phases)
