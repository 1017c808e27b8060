"""What is measured: python -m tools.benchmark.variants JOB does one job (JSON) in this process and prints what it measured as JSON.

Ours and the baseline are imported where they are needed, so that neither's process holds the other. The step that is timed is the
trainer's own: train_cogvideox_lora.train_step on what its prepare_transformer and make_losses return.
"""

import contextlib
import functools
import gc
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import torch
from diffusers import CogVideoXPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch.utils.data import DataLoader

from cogvideox import encodings, model
from cogvideox.decode import Framing, read_clip
from cogvideox.folder import COGVIDEOX_2B, PRECISIONS, facts_of, load_tokenizer
from cogvideox.reader import Readers, decode_workers
from cogvideox.video import read_video, write_video
from demo.make_model import make_scheduler
from tools.benchmark.counters import count_collectives, count_flops, matmul_peak, tensors_mib
from tools.benchmark.harness import ROOT, machine_facts, seconds_of
from tools.benchmark.models import configs_of_size, demo_captions, make_text_encoder, make_transformer, make_vae, random_moments
from tools.benchmark.sizes import TEXT_LENGTH

CLIPS = 4  # that a step is trained on


# -----------------------------------------------------------------------------
# Files for other measurements


def write_model(job):
    """Write a model folder of a size, for runs of whole programs."""
    dtype = PRECISIONS[job["precision"]]
    parts = make_text_encoder(job["size"], dtype), make_vae(job["vae"], dtype), make_transformer(job["size"], dtype)
    CogVideoXPipeline(load_tokenizer(ROOT / "demo"), *parts, make_scheduler()).save_pretrained(job["folder"])
    return {"folder": job["folder"]}


def write_sources(job):
    """Write mp4 files of a size for the decoders: the demo's pictures, enlarged."""
    frames, height, width = job["source"]
    for i, path in enumerate(sorted((ROOT / "demo/dataset/videos").glob("*.mp4"))[: job["clips"]]):
        small = read_video(path)
        pictures = [Image.fromarray(small[number % len(small)]).resize((width, height)) for number in range(frames)]
        write_video(Path(job["folder"]) / f"{i:02d}.mp4", [np.asarray(picture) for picture in pictures], job["fps"])
    return {"folder": job["folder"]}


# -----------------------------------------------------------------------------
# Steps


def our_flags(job):
    """The trainer's checked flags for a job: its shape, rank and precision, nothing recomputed, and job["flags"] on top, words of
    the command line.
    """
    import train_cogvideox_lora as script

    frames, height, width = job["shape"]
    words = ["--pretrained_model_name_or_path", "none", "--instance_data_root", "none", "--report_to", "none"]
    words += ["--max_num_frames", frames, "--height", height, "--width", width, "--rank", job["rank"]]
    words += ["--mixed_precision", job["precision"], "--training_type", job.get("training_type", "lora")]
    words += ["--train_batch_size", job.get("batch", 1), "--gradient_checkpointing", "none"]
    return script.parse_args([*map(str, words), *job.get("flags", ())])


def our_run(job, folder):
    """What train_cogvideox_lora.py has when it enters its loop, on encodings of random clips in `folder`: args, trained, compute_loss,
    clip_losses, encodings, scheduler, and `step`, which trains one step and returns its loss.

    The model is made on its device, so that the host needs no memory for it; a sharding engine takes it from the host.
    """
    import train_cogvideox_lora as script
    from cogvideox import attention, checkpoint, engine, lora

    dtype, steps, batch_size = PRECISIONS[job["precision"]], job["steps"] + job["warmup"] + 1, job.get("batch", 1)
    args = our_flags(job)
    everything = args.training_type == "sft"
    accelerator = script.start_processes(job["precision"], 1, 30.0)
    scheduler = make_scheduler()
    torch.manual_seed(0)
    device = "cpu" if engine.splits_weights(accelerator) else accelerator.device
    family = job.get("family", "2b")
    transformer = make_transformer(job["size"], torch.float32 if everything else dtype, device, family)
    model.keep_position_tables(transformer.patch_embed)  # as load_transformer does
    if everything:
        transformer.requires_grad_(True)
    else:
        lora.add_lora(transformer, args.rank, args.lora_alpha, args.lora_dropout, args.target_modules, args.seed)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    script.prepare_transformer(transformer, args, accelerator, dtype, hold=job["variant"] != "ours, plain linears")
    compute_loss, clip_losses = script.make_losses(args, transformer, scheduler, dtype, accelerator.device)

    stored = write_encodings(folder, job["shape"], transformer.config.text_embed_dim, dtype)
    facts = facts_of(*configs_of_size(job["size"], family))
    batches = our_batches(stored, args.seed, accelerator, batch_size, steps, scheduler, facts)
    optimizer = script.make_optimizer(args, parameters, args.learning_rate)
    schedule = script.make_schedule(args, optimizer, steps)
    wrapped, optimizer, parameters = engine.prepare(accelerator, transformer, optimizer, batch_size, args.max_grad_norm, dtype)
    kind = checkpoint.RESULTS[args.training_type]
    trained = engine.Trained(accelerator, transformer, wrapped, parameters, optimizer, schedule, dtype=dtype, kind=kind)
    first = next(our_batches(stored, args.seed, accelerator, batch_size, 1, scheduler, facts))
    attention.settle(args, trained, first)  # as the rehearsal does
    numbers = itertools.count(1)

    def step():
        result = script.train_step(args, trained, batches, compute_loss, next(numbers))
        return accelerator.reduce(result.losses[-1], "mean").item()  # as with --logging_steps 1

    return SimpleNamespace(
        args=args, trained=trained, compute_loss=compute_loss, clip_losses=clip_losses, encodings=stored, scheduler=scheduler, step=step
    )


def our_step(job, folder):
    """(a function that trains one step as train_cogvideox_lora.py does, one that sets the checkpointing), on encodings in `folder`.

    The FLOPs are counted before the checkpointing is set.
    """
    run = our_run(job, folder)
    return run.step, functools.partial(set_checkpointing, run.trained.transformer, job["gradient_checkpointing"])


def set_checkpointing(transformer, setting):
    """Set a --gradient_checkpointing value (auto: all) of a prepared transformer."""
    model.checkpoint_blocks(transformer, *model.blocks_to_recompute(setting, len(transformer.transformer_blocks)))


def write_encodings(folder, shape, width, dtype):
    """Write encodings of random clips of a shape, of images and of captions [TEXT_LENGTH, width] to a cache. Returns its Encodings."""
    names = [f"{i:040d}" for i in range(CLIPS)]
    for name, clip in zip(names, random_moments(CLIPS, shape), strict=True):
        encodings.write_entry(encodings.entry_path(folder, "clips", name), clip.to(dtype))
        encodings.write_entry(encodings.entry_path(folder, "captions", name), torch.randn(TEXT_LENGTH, width).to(dtype))
        images = random_moments(encodings.IMAGE_DRAWS, (1, *shape[1:]), seed=2)[:, :, 0]
        encodings.write_entry(encodings.entry_path(folder, "images", name), images.to(dtype))
    return encodings.Encodings(folder, names, names, names, {"": names[0]}, image_keys=names, flipped_image_keys=names)


def our_batches(stored, seed, accelerator, batch_size, steps, scheduler, facts=COGVIDEOX_2B):
    """An iterator over the batches of so many steps, of this process, in the trainer's order."""
    from cogvideox import order
    from dataset import TrainingClips

    rank, processes = accelerator.process_index, accelerator.num_processes
    plan = order.Plan(seed, tuple(range(CLIPS)), (0,) * CLIPS, batch_size * processes, CLIPS, steps)
    clips = TrainingClips(stored, plan.clip_of, seed, facts, scheduler.config.num_train_timesteps)
    return iter(DataLoader(clips, batch_sampler=list(order.positions_of(rank, processes, batch_size, 1, 0, steps))))


def reference_step(job, folder):
    """(a function that trains one step as the original does, one that sets the checkpointing), its log in `folder`."""
    from tools.benchmark import reference

    reference.set_seed(42)
    dtype = PRECISIONS[job["precision"]]
    accelerator = reference.start_accelerator(job["precision"])
    scheduler, tokenizer = make_scheduler(), load_tokenizer(ROOT / "demo")
    text_encoder = make_text_encoder(job["size"], dtype, accelerator.device)
    transformer = make_transformer(job["size"], dtype, accelerator.device)
    parameters = reference.add_lora(transformer, job["rank"])
    posteriors = [DiagonalGaussianDistribution(clip[None].to(dtype)) for clip in random_moments(CLIPS, job["shape"])]
    loader = reference.batches_of(posteriors, demo_captions(CLIPS), COGVIDEOX_2B.scaling_factor)
    wrapped, optimizer, schedule = reference.prepare(accelerator, transformer, parameters)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    log = (folder / "metrics.jsonl").open("w")

    def step():
        texts = tokenizer, text_encoder, next(batches), TEXT_LENGTH
        loss = reference.train_step(accelerator, wrapped, scheduler, optimizer, schedule, parameters, *texts)
        log.write(json.dumps({"loss": loss, "learning_rate": schedule.get_last_lr()[0]}) + "\n")
        log.flush()
        return loss

    def checkpoint():
        if job["gradient_checkpointing"] != "none":
            transformer.enable_gradient_checkpointing()

    return step, checkpoint


def time_steps(job):
    """Seconds of optimizer steps of one variant; of ours also the FLOPs: those that the job has, or counted without checkpointing."""
    with tempfile.TemporaryDirectory() as folder:
        ours = job["variant"] != "reference"
        step, checkpoint = (our_step if ours else reference_step)(job, Path(folder))
        flops = job.get("flops") or (count_flops(step) if ours else None)
        checkpoint()
        for _ in range(job["warmup"]):
            step()
        gc.collect()
        peak = matmul_peak(PRECISIONS[job["precision"]], job["clock"], device="cuda" if torch.cuda.is_available() else "cpu")
        losses = []
        seconds, others = seconds_of(lambda: losses.append(step()), job["steps"], job["clock"])
    resident_mib = psutil.Process().memory_info().rss / 2**20
    measured = {"seconds": seconds, "flops": flops, "matmul_peak": peak, "others": others, "losses": losses, "rss_mib": resident_mib}
    return measured | machine_facts()


def time_scale(job):
    """One of several processes: seconds of steps, the bytes given to collectives in one of them, and MiB of tensors of each process.

    The main process writes them to job["result"]: lines of several processes on one output get mixed.
    """
    import torch.distributed as distributed

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        step, checkpoint = our_step(job, Path(folder))
        checkpoint()
        losses = []
        for _ in range(job["warmup"]):
            losses.append(step())
        payload = count_collectives(step)
        seconds, _ = seconds_of(step, job["steps"], "wall")
        held = [tensors_mib()]
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            held = [None] * distributed.get_world_size()
            distributed.all_gather_object(held, tensors_mib())
            distributed.barrier()
    if os.environ.get("RANK", "0") == "0":
        measured = {"seconds": seconds, "losses": losses, "payload": payload, "held_mib": held}
        Path(job["result"]).write_text(json.dumps(measured | machine_facts()))


# -----------------------------------------------------------------------------
# Encoding and decoding


def time_encoder(job):
    """Seconds a clip of the VAE or of T5, their FLOPs a clip, and the matmul peak of the dtype that they run in."""
    dtype = PRECISIONS[job["precision"]]
    if job["variant"] == "vae":
        vae = make_vae(job["vae"], dtype)
        dtype = vae.dtype
        frames = np.random.default_rng(0).integers(0, 256, (*job["shape"], 3), dtype=np.uint8)
        call = functools.partial(model.encode_frames, vae, frames)
    else:
        text_encoder, captions = make_text_encoder(job["size"], dtype), demo_captions(1)
        call = functools.partial(model.encode_captions, load_tokenizer(ROOT / "demo"), text_encoder, captions, TEXT_LENGTH)
    flops = count_flops(torch.no_grad()(call))
    call()
    peak = matmul_peak(dtype, job["clock"])
    seconds, others = seconds_of(call, job["steps"], job["clock"])
    return {"seconds": seconds, "flops": flops, "matmul_peak": peak, "others": others} | machine_facts()


def time_decoder(job):
    """Seconds a clip of decoding files in one way, and the bytes that a decoded clip takes."""
    files = sorted(str(path) for path in Path(job["folder"]).iterdir())
    if job["variant"] == "ours, in reader processes":
        seconds, others, sizes = time_readers(job, files)
    else:
        decode, sizes = decoder_of(job), []
        decode(files[0])
        seconds, others = seconds_of(lambda: sizes.extend(decode(path).nbytes for path in files), job["steps"], job["clock"])
    return {"seconds": [value / len(files) for value in seconds], "others": others, "bytes": max(sizes)} | machine_facts()


def framing_of(job):
    """How our decoder cuts the clips of a job."""
    frames, height, width = job["shape"]
    return Framing(fps=job["fps"], max_num_frames=frames, sizes=((height, width),))


def decoder_of(job):
    """A function of a path, to the frames that one way of decoding makes of it in this process."""
    frames, height, width = job["shape"]
    if job["variant"] == "ours":
        framing = framing_of(job)
        return lambda path: read_clip(path, framing)[0]
    if job["variant"] == "decoder alone":
        return lambda path: decode_alone(path, height, width, frames)
    if job["variant"] == "full size":
        return lambda path: decode_at_full_size(path, height, width, frames)
    from tools.benchmark import reference

    return lambda path: reference.decode_clip(path, height, width, frames)


def time_readers(job, files):
    """(seconds of decoding all files in the trainer's reader processes, share of the CPUs that others used, bytes of each clip)."""
    framing, sizes = framing_of(job), []
    with Readers(decode_workers()) as readers:
        for path in files[:2]:  # starts the processes
            readers.read(path, framing)

        def read_all():
            sizes.extend(clip.nbytes for _, clip, _ in readers.read_all([(path, framing) for path in files]))

        seconds, _ = seconds_of(read_all, job["steps"], "wall")
    return seconds, None, sizes  # the readers' CPU time is seen only after they have ended, so what others used is not known


def decode_alone(path, height, width, max_num_frames):
    """uint8 frames [F, H, W, 3] as decord makes them: the first ones, stretched, and nothing done to them."""
    import decord  # which the trainer does without

    video = decord.VideoReader(path, num_threads=1, width=width, height=height)
    return video.get_batch(range(min(max_num_frames, len(video)))).asnumpy()


def decode_at_full_size(path, height, width, max_num_frames):
    """fp32 pixels in [-1, 1], [F, 3, H, W], resized after they were decoded at the file's size: diffusers' example does so."""
    import decord

    video = decord.VideoReader(path)
    frames = torch.from_numpy(video.get_batch(range(min(max_num_frames, len(video)))).asnumpy()).float()
    frames = frames.permute(0, 3, 1, 2)
    resized = [torch.nn.functional.interpolate(frame[None], (height, width), mode="bicubic", antialias=True)[0] for frame in frames]
    return torch.stack([frame / 255 * 2 - 1 for frame in resized])


JOBS = {
    "model": write_model,
    "sources": write_sources,
    "step": time_steps,
    "scale": time_scale,
    "encode": time_encoder,
    "decode": time_decoder,
}


if __name__ == "__main__":
    JOB = json.loads(sys.argv[1])
    print(json.dumps(JOBS[JOB["job"]](JOB)))
