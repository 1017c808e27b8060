"""Cases of memory, encoding, validation, scores and checkpoints."""

import argparse
import contextlib
import functools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import train_cogvideox_lora as script
from cogvideox import checkpoint, memory, model, rehearsal, scoring, validation
from cogvideox.folder import COGVIDEOX_2B, load_tokenizer
from tools import estimate
from tools.benchmark import variants
from tools.benchmark.counters import peak_bytes, waited
from tools.benchmark.harness import ROOT, seconds_of
from tools.benchmark.models import demo_captions
from tools.benchmark.sizes import TEXT_LENGTH, spell
from tools.gpu_check.rows import not_run, row, unit_of, within
from tools.gpu_check.worker import attempt, build_text_encoder, build_vae, configs_of, resident_bytes, step_job

SHARE = 0.1  # by which a measured peak may differ from the predicted one
CONTEXT = int(0.6 * 2**30)  # bytes of a card that torch's libraries take, which the allocator's limit does not see


def memory_row(claim, predicted, peaks, remark="", no_claim="", **numbers):
    """A row of predicted bytes against (allocated, reserved) ones. no_claim: why the prediction is not for this device."""
    allocated, reserved = peaks
    remark = "; ".join(filter(None, [f"{reserved / 2**30:.2f} GiB reserved", remark, no_claim]))
    sizes = {"predicted_bytes": predicted, "allocated": allocated, "reserved": reserved}
    unit, size = unit_of(predicted)
    holds = None if no_claim else within(predicted, allocated, SHARE)
    return row(claim, predicted / size, allocated / size, unit, holds, remark, **sizes, **numbers)


def scratch_of(device):
    """Why the VAE's predicted memory is no claim on a device; nothing on a GPU."""
    return "a CPU's convolutions take scratch memory: no claim" if device == "cpu" else ""


# -----------------------------------------------------------------------------
# Training, scoring and validation, for each preset


def check_memory(job):
    """Peaks of the phases with the flags that the README has for each card, under a limit that stands in for the card."""
    device, configs = job["device"], configs_of(job)
    args = variants.our_flags(step_job(job, flags=["--validation_prompt", "x"]))
    phases = memory.phase_parts(configs, args, device)
    seen = set()
    for card in estimate.CARDS:
        saving, changed, plan, parts = estimate.flags_for(card, memory, configs, args, script.velocity_loss, device, phases)
        words, layers = estimate.spell_flags(saving), memory.layers_of(configs)
        settings = f"{card} GB: {words or 'no flags'}, {estimate.spell_recomputation(plan, layers)} recomputed"
        if (words, plan) in seen:
            continue  # a larger card with the same flags
        # A card reports less than its name says, by up to 8 % with error correction.
        if device == "cuda" and card * 0.9 * 2**30 > torch.cuda.get_device_properties(0).total_memory:
            yield not_run(f"training, {settings}", "this card is smaller")
            continue
        phases_too = words not in {words for words, _ in seen}
        seen.add((words, plan))
        with card_of(card, device):
            rows = measure_preset(job, settings, words.split(), plan, parts, changed, phases_too)
            yield from attempt(f"training, {settings}", rows, promised=True)


@contextlib.contextmanager
def card_of(gigabytes, device):
    """Let torch's allocator have what a card of so many GB would leave it."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gigabytes * 2**30 - CONTEXT) / total))
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)


def measure_preset(job, settings, words, plan, parts, args, phases_too):
    """The rows of one preset: training, and with `phases_too` validation and scoring."""
    device, configs = job["device"], configs_of(job)
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        run = variants.our_run(step_job(job, flags=words, steps=3), Path(folder))
        model.checkpoint_blocks(run.trained.transformer, *plan)
        run.step()  # makes the optimizer's states
        began = time.perf_counter()
        peaks = peak_bytes(run.step, device, resident_bytes(run.trained))
        seconds = time.perf_counter() - began
        yield memory_row(f"training, {settings}", parts["training"], peaks, f"{seconds:.2f} s a step", seconds=seconds)
        if not phases_too:
            return
        resident = resident_bytes(run.trained)
        videos = functools.partial(make_video, job, run, Path(folder), steps=1)
        peaks = peak_bytes(videos, device, resident)
        yield memory_row(f"validation, {settings}", parts["validation"], peaks, no_claim=scratch_of(device))
        shape = tuple(step_job(job)["shape"])
        one_clip = argparse.Namespace(**vars(args) | {"guidance_scale": 1.0})
        predicted = parts["base_weights"] + parts["adapters"] + parts["optimizer_state"]
        predicted += memory.sampling_bytes(configs, one_clip, shape, device)
        yield memory_row(f"scoring, {settings}", predicted, peak_bytes(functools.partial(score_clips, run, 1), device, resident))


def make_video(job, run, folder, steps):
    """A validation video of the live model, with so many denoising steps. RuntimeError if it failed."""
    frames, height, width = step_job(job)["shape"]
    settings = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps, "guidance_scale": 6.0}
    prompt = run.encodings.prompt(0).to(run.trained.dtype)
    jobs = validation.video_jobs(["x"], 1, run.args.seed)
    (folder / "videos").mkdir(exist_ok=True)
    failures = validation.validate(
        folder / "videos", jobs, 0, 1, run.trained.transformer, run.scheduler, ([prompt], prompt), functools.partial(build_vae, job),
        run.trained.device, 8, settings,
    )  # fmt: skip
    if failures:
        raise RuntimeError(failures[0])


def score_clips(run, clips):
    """The score of so many training clips."""

    def losses(batch):
        return run.clip_losses(run.trained.transformer, batch)

    sets, captions = {"train": list(range(clips)), "held_out": []}, [str(number) for number in range(variants.CLIPS)]
    timesteps = run.scheduler.config.num_train_timesteps
    return scoring.score(
        run.trained.accelerator, run.trained.transformer, losses, run.encodings, sets, captions, run.args.seed,
        COGVIDEOX_2B, timesteps, with_gap=False,
    )  # fmt: skip


# -----------------------------------------------------------------------------
# Encoding


def check_encode(job):
    """Memory and seconds of the VAE, tiled and untiled, and of T5; how far the two encodings of a clip are apart."""
    moments = {}
    for tiling in (True, False):
        name = "tiled" if tiling else "untiled"
        yield from attempt(f"VAE, encoding {name}", measure_encoding(job, name, tiling, moments))
    if len(moments) == 2:
        tiled, untiled = (moments[name].chunk(2)[0] for name in ("tiled", "untiled"))
        apart = ((tiled - untiled).square().mean() / untiled.square().mean()).sqrt().item()
        yield row("latents, tiled against untiled: relative difference", None, apart, remark="random weights")
    yield from attempt("VAE, decoding tiled", measure_decoding(job))
    yield from attempt("T5 on a caption", measure_captions(job))


def measure_encoding(job, name, tiling, moments):
    """The row of encoding one clip; its moments, fp32 on the CPU, go to moments[name]."""
    shape, device, configs = tuple(step_job(job)["shape"]), job["device"], configs_of(job)
    weights, working = memory.vae_bytes(configs, "encode", shape, tiling=tiling)
    vae = build_vae(job, tiling)
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    encode = waited(functools.partial(model.encode_frames, vae, frames), device)
    moments[name] = encode().float().cpu()
    seconds, _ = seconds_of(encode, 1, "wall")
    claim, remark = f"VAE, encoding {name}, {spell(shape)}", f"{seconds[0]:.2f} s a clip"
    yield memory_row(claim, weights + working, peak_bytes(encode, device, weights), remark, scratch_of(device), seconds=seconds)


def measure_decoding(job):
    """The row of decoding one clip in tiles."""
    shape, device, configs = tuple(step_job(job)["shape"]), job["device"], configs_of(job)
    weights, working = memory.vae_bytes(configs, "decode", shape)
    vae, latents = build_vae(job), torch.randn(memory.latents_of(configs, *shape))
    decode = functools.partial(model.decode_latents, vae, latents)
    decode()
    seconds, _ = seconds_of(decode, 1, "wall")
    claim, remark = f"VAE, decoding tiled, {spell(shape)}", f"{seconds[0]:.2f} s a clip"
    yield memory_row(claim, weights + working, peak_bytes(decode, device, weights), remark, scratch_of(device), seconds=seconds)


def measure_captions(job):
    """The row of T5 on one caption."""
    device, tokenizer = job["device"], load_tokenizer(ROOT / "demo")
    weights, working = memory.captions_bytes(configs_of(job))
    encoder, captions = build_text_encoder(job), demo_captions(1)
    encode = waited(functools.partial(model.encode_captions, tokenizer, encoder, captions, TEXT_LENGTH), device)
    encode()
    seconds, _ = seconds_of(encode, 1, "wall")
    peaks = peak_bytes(encode, device, weights)
    yield memory_row("T5 on a caption", weights + working, peaks, f"{seconds[0]:.2f} s", seconds=seconds)


# -----------------------------------------------------------------------------
# What looking costs


def check_looking(job):
    """Seconds of a validation video, of a score and of a checkpoint; the size of a checkpoint."""
    shape = spell(step_job(job)["shape"])
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        folder = Path(folder)
        run = variants.our_run(step_job(job, steps=2, flags=["--gradient_checkpointing", "all"]), folder)
        run.step()  # makes the optimizer's states, which a checkpoint holds
        make_video(job, run, folder, 1)  # loads what the first video loads
        two, four = (seconds_of(functools.partial(make_video, job, run, folder, steps), 1, "wall")[0][0] for steps in (2, 4))
        each = (four - two) / 2
        remark = f"computed from 2 and 4 denoising steps: {each:.2f} s each, the rest {two - 2 * each:.2f} s"
        yield row(f"a validation video of 50 steps, {shape}", None, two + 48 * each, "s", remark=remark, seconds=[two, four])
        score_clips(run, 1)
        seconds, _ = seconds_of(functools.partial(score_clips, run, 1), 1, "wall")
        yield row(f"a score of 4 + 4 clips, {shape}", None, 8 * seconds[0], "s", remark="computed from one clip", seconds=seconds)

        predicted, began = rehearsal.checkpoint_mebibytes(run.args, run.trained), time.perf_counter()
        snapshot = checkpoint.take_snapshot(run.trained)
        paused = time.perf_counter() - began
        path = checkpoint.write_checkpoint(folder, 1, snapshot, {}, {})
        seconds, size = time.perf_counter() - began, sum(file.stat().st_size for file in path.iterdir()) / 2**20
        remark = f"training waits {paused:.2f} s; {seconds:.2f} s with writing it"
        holds = within(predicted, size, SHARE) or abs(predicted - size) < 1  # a tiny checkpoint is mostly headers
        yield row("a checkpoint", predicted, size, "MiB", holds, remark, paused=paused, seconds=seconds)
