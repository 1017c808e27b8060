"""Measure on this machine, ours against a baseline: python -m tools.benchmark step|growth|start|memory|encode|decode [flags].

step     seconds of an optimizer step, and the share of the machine's matmul peak that its useful FLOPs reach
growth   how the seconds of our step grow with frames, size, rank and clips in a batch (in the data set: start, memory)
start    seconds from launch to the first step: full cache, empty cache, baseline
memory   peak memory of whole runs (encoding, training, validation), and that it does not grow with the clips
encode   clips a second of decoding, VAE and T5, each against its own limit
decode   clips a second of decoding, in four ways
scale    ours on 1, 2, 4 processes under each engine: seconds a step, bytes sent, memory of each process
quality  steps and seconds until a held-out loss is reached, with the guide's settings and with the defaults (tools/quality.py)

The baseline is tools/reference.py: how the original trainer works, on the same machine, model and data. Every measurement is
a process of its own; the variants take turns (A B C A B C ...), and a ratio is the median over the turns of baseline / ours
within a turn. "others" is the largest share of the CPUs that other processes used meanwhile: above some 10 % a sample is
disturbed. Useful FLOPs are those of our step: no T5, nothing recomputed. Prints a Markdown table; --json FILE has all samples.
"""

import argparse
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from cogvideox.console import progress

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
TEXT_LENGTH = 226  # tokens of a caption, in all CogVideoX 1.0 models
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
# The transformer's defaults in diffusers are the 2B's: 30 layers, 30 heads x 64, text width 4096, time width 512.
SIZES = {
    "tiny": {
        "transformer": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "text_embed_dim": 32, "time_embed_dim": 64},
        "t5": {"vocab_size": 32128, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2},
        "rank": 4,
    },
    "mid": {"transformer": {"num_layers": 4}, "t5": T5_XXL | {"num_layers": 2}, "rank": 128},
    "2b": {"transformer": {}, "t5": T5_XXL, "rank": 128},
}
VAES = {"small": {"block_out_channels": (16,) * 4, "layers_per_block": 1, "norm_num_groups": 4}, "real": {}}
DISTURBED = 0.1


# -----------------------------------------------------------------------------
# Runs of whole programs


def make_clips(folder, count):
    """A data folder of `count` clips of different content: the demo's, each with a box of its own at the end of the file."""
    captions = (ROOT / "demo/dataset/prompts.txt").read_text().splitlines()
    sources = sorted((ROOT / "demo/dataset/videos").glob("*.mp4"))
    (folder / "videos").mkdir(parents=True)
    for i in range(count):
        mark = f"{i:08d}".encode()
        # An empty `free` box: players skip it, and the content's hash is another.
        extra = (8 + len(mark)).to_bytes(4, "big") + b"free" + mark
        (folder / f"videos/{i:04d}.mp4").write_bytes(sources[i % len(sources)].read_bytes() + extra)
    (folder / "videos.txt").write_text("".join(f"videos/{i:04d}.mp4\n" for i in range(count)))
    (folder / "prompts.txt").write_text("".join(f"{captions[i % len(captions)]} {i}\n" for i in range(count)))
    return folder


def trainer_command(model, clips, output, cache, processes, flags):
    """The command line of a training on one process or several."""
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    line = [sys.executable, *launcher, str(ROOT / "train_cogvideox_lora.py")]
    paths = {"pretrained_model_name_or_path": model, "instance_data_root": clips, "output_dir": output, "encoding_cache_dir": cache}
    for name, value in (paths | flags).items():
        line += [f"--{name}", str(value)]
    return line


def reference_command(model, clips, output, flags):
    """The command line of the baseline."""
    line = [sys.executable, "-m", "tools.reference"]
    paths = {"pretrained_model_name_or_path": model, "instance_data_root": clips, "output_dir": output}
    for name, value in (paths | flags).items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def environment_of(threads):
    """The environment of every process that is started here."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run_program(line, output, threads):
    """Run a training to its end. Returns what was seen of it from outside.

    seconds_to_first_step: from launch to the first line of metrics.jsonl. peak_mib: of the largest trainer process.
    helpers_mib: the peaks of all other processes that it started, summed. others: share of the CPUs that others used.
    """
    metrics, first_step, peaks, usage = Path(output) / "metrics.jsonl", None, {}, None
    with tempfile.TemporaryFile() as log:
        started, busy = time.perf_counter(), busy_seconds()
        own = os.times()
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment_of(threads), cwd=ROOT)
        looked = 0.0
        try:
            while usage is None:
                if first_step is None and metrics.exists() and metrics.stat().st_size:
                    first_step = time.perf_counter() - started
                if time.perf_counter() - looked > 0.1:
                    looked = time.perf_counter()
                    peaks |= peaks_below(process.pid)
                time.sleep(0.02)
                # wait4 tells the process's exact peak and its CPU time, which Popen.wait would throw away.
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                usage = usage if pid else None
        except BaseException:
            process.terminate()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        used = usage.ru_utime + usage.ru_stime + sum(os.times()[:2]) - sum(own[:2])
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"ERROR: a run ended with code {process.returncode}:\n{log.read().decode(errors='replace')[-2000:]}")
    trainers = [peak for is_trainer, peak in peaks.values() if is_trainer]
    return {
        "seconds_to_first_step": first_step,
        "wall_seconds": wall,
        "peak_mib": max([*trainers, 0 if TORCHRUN[1] in line else usage.ru_maxrss]) / 1024,
        "helpers_mib": sum(peak for is_trainer, peak in peaks.values() if not is_trainer) / 1024,
        "others": others_share(busy, used, wall),
    }


def peaks_below(pid):
    """(pid, start time) -> (is it a trainer, peak resident memory so far in KiB), of a process and all below it (Linux)."""
    found = {}
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return found
    for process in processes:
        try:
            words, started = process.cmdline()[1:3], process.create_time()
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        except (psutil.Error, OSError, StopIteration):
            continue  # it ended meanwhile
        trains = any(word.endswith("train_cogvideox_lora.py") or word == "tools.reference" for word in words) or "-u" in words[:1]
        found[process.pid, started] = trains, peak
    return found


def busy_seconds():
    """CPU seconds that the machine has spent on anything since it started, all cores together; None where it does not tell."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, interrupt, soft_interrupt, stolen = map(int, fields)
    return (user + nice + system + interrupt + soft_interrupt + stolen) / os.sysconf("SC_CLK_TCK")


def others_share(busy_before, own_seconds, wall_seconds):
    """The share of all CPUs that other processes used in a span, of which `own_seconds` were ours."""
    if busy_before is None:
        return None
    return max(0.0, busy_seconds() - busy_before - own_seconds) / (wall_seconds * os.cpu_count())


def has_fast_bf16():
    """Whether bf16 products are faster than fp32 ones here. A CPU without instructions for them takes eight times as long."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"}) or bool(list(Path("/dev").glob("nvidia[0-9]*")))


def run_worker(job, threads):
    """Do one job in a process of its own; returns what it measured."""
    line = [sys.executable, "-m", "tools.benchmark", "worker", json.dumps(job)]
    with tempfile.TemporaryFile() as log:
        result = subprocess.run(line, stdout=subprocess.PIPE, stderr=log, env=environment_of(threads), cwd=ROOT, check=False)
        if result.returncode:
            log.seek(0)
            reason = "killed, perhaps for want of memory" if result.returncode == -9 else f"code {result.returncode}"
            name = " ".join(str(job.get(key)) for key in ("job", "variant", "size", "shape") if job.get(key))
            raise SystemExit(f"ERROR: the process of {name} ended ({reason}):\n{log.read().decode(errors='replace')[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


# -----------------------------------------------------------------------------
# In the worker: models and clocks


def now(clock):
    """Seconds, of the wall or of this process's CPUs."""
    return time.perf_counter() if clock == "wall" else time.process_time()


def seconds_of(call, count, clock):
    """Seconds of each of `count` calls, and the share of the CPUs that other processes used meanwhile."""
    busy, own, started, seconds = busy_seconds(), sum(os.times()[:4]), time.perf_counter(), []
    for _ in range(count):
        before = now(clock)
        call()
        seconds.append(now(clock) - before)
    return seconds, others_share(busy, sum(os.times()[:4]) - own, time.perf_counter() - started)


def matmul_peak(dtype, clock="wall", tries=5, budget=3.0):
    """The fastest matrix product [M, K] x [N, K]^T of several shapes that layers have here, in FLOP a second.

    budget: seconds, after which no further shape is tried (a CPU without bf16 instructions takes a minute for all).
    """
    import torch

    best, started = 0.0, time.perf_counter()
    for rows, inner, columns in ((1024, 1920, 1920), (1024, 1920, 7680), (1024, 7680, 1920), (1024, 4096, 4096)):
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).t()
        torch.mm(left, right)
        seconds, _ = seconds_of(functools.partial(torch.mm, left, right), tries, clock)
        best = max(best, 2 * rows * inner * columns / min(seconds))
        if time.perf_counter() - started > budget:
            break
    return best


def flop_counter():
    """torch's counter, taught the attention that CPUs run: it knows that of GPUs only."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def forward(query, key, value, *others, out_shape=None, **settings):
        return sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *others, out_shape=None, **settings):
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    own = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=own)


def count_flops(call):
    """FLOPs of one call; a multiplication with its addition counts as two."""
    with flop_counter() as counter:
        call()
    return counter.get_total_flops()


def random_model(build, dtype, seed=0):
    """A frozen model with random weights, in `dtype`, made at the speed of copying. build: () -> model.

    Numbers are drawn once and repeated: drawing the 4.9 G of a T5-XXL one by one takes minutes. Weights are scaled by the root
    of their inputs, one-dimensional ones are 1 and biases 0, so that activations stay of the size of 1.
    """
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = build()
    block = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            filled = torch.zeros(parameter.shape, dtype=dtype)
            if parameter.dim() > 1:
                flat, scale = filled.view(-1), (parameter.numel() / parameter.shape[0]) ** -0.5
                scaled = block * scale
                for start in range(0, flat.numel(), block.numel()):
                    part = flat[start : start + block.numel()]
                    part.copy_(scaled[: part.numel()])
            elif name == "weight":
                filled.fill_(1)
            setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.to(dtype).requires_grad_(False)


def make_transformer(size, dtype):
    """The transformer of a size."""
    from diffusers import CogVideoXTransformer3DModel

    return random_model(lambda: CogVideoXTransformer3DModel(**SIZES[size]["transformer"]), dtype)


def make_text_encoder(size, dtype):
    """The T5 encoder of a size."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**SIZES[size]["t5"], feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return random_model(lambda: T5EncoderModel(config), dtype).eval()


def make_vae(kind, dtype):
    """The VAE, small or real.

    A small one is made as the demo's, and stays fp32: on CPUs the bf16 convolution of so few channels takes seconds.
    """
    import torch
    from diffusers import AutoencoderKLCogVideoX

    from demo.make_model import imitate_trained_moments

    if kind == "real":
        return random_model(AutoencoderKLCogVideoX, dtype).eval()
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(**VAES[kind])
    imitate_trained_moments(vae)
    return vae.requires_grad_(False).eval()


def tokens_of(shape):
    """Tokens that a block sees: the text's and one for each 2 x 2 latents."""
    from cogvideox.folder import COGVIDEOX_2B, latent_shape

    frames, _, height, width = latent_shape(COGVIDEOX_2B, *shape)
    return TEXT_LENGTH + frames * (height // 2) * (width // 2)


# -----------------------------------------------------------------------------
# In the worker: the jobs


def write_model(job):
    """Write a model folder of a size, for runs of whole programs."""
    from diffusers import CogVideoXPipeline

    from cogvideox.folder import PRECISIONS, load_tokenizer
    from demo.make_model import make_scheduler

    dtype = PRECISIONS[job["precision"]]
    parts = make_text_encoder(job["size"], dtype), make_vae(job["vae"], dtype), make_transformer(job["size"], dtype)
    CogVideoXPipeline(load_tokenizer(ROOT / "demo"), *parts, make_scheduler()).save_pretrained(job["folder"])
    return {"folder": job["folder"]}


def captions_and_moments(job):
    """What both variants of a step train on: 4 captions and 4 random posteriors [2C, F', H', W'] of a shape."""
    import torch

    from cogvideox.folder import COGVIDEOX_2B, latent_shape

    captions = (ROOT / "demo/dataset/prompts.txt").read_text().splitlines()[:4]
    generator = torch.Generator().manual_seed(1)
    frames, channels, height, width = latent_shape(COGVIDEOX_2B, *job["shape"])
    means = torch.randn(4, channels, frames, height, width, generator=generator)
    return captions, torch.cat([means, torch.full_like(means, -8.0)], dim=1)


def our_step(job, folder):
    """(a function that trains one step as train_cogvideox_lora.py does, one that sets the checkpointing) on a cache in `folder`."""
    import torch
    from torch.utils.data import DataLoader

    import train_cogvideox_lora as script
    from cogvideox import encodings, engine, lora, order
    from cogvideox.folder import COGVIDEOX_2B, PRECISIONS
    from cogvideox.model import keep_position_tables
    from dataset import TrainingClips
    from demo.make_model import make_scheduler

    dtype, steps, batch_size = PRECISIONS[job["precision"]], job["steps"] + job["warmup"] + 1, job.get("batch", 1)
    everything = job.get("training_type", "lora") == "sft"
    args = script.parse_args(["--pretrained_model_name_or_path", "none", "--instance_data_root", "none", "--report_to", "none"])
    accelerator = script.start_processes(job["precision"], 1, 30.0)
    device, scheduler = accelerator.device, make_scheduler()
    rank, processes = accelerator.process_index, accelerator.num_processes
    script.torch.manual_seed(0)
    transformer = make_transformer(job["size"], script.torch.float32 if everything else dtype)
    keep_position_tables(transformer.patch_embed)  # as load_transformer does
    if everything:
        transformer.requires_grad_(True)
    else:
        lora.add_lora(transformer, job["rank"], job["rank"], 0.0, script.DEFAULT_TARGETS, args.seed)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    args.gradient_checkpointing = "none"  # set by the caller, once for each value that is timed
    script.prepare_transformer(transformer, args, accelerator, dtype, hold=job["variant"] != "ours, plain linears")
    compute_loss, _ = script.make_losses(args, transformer, scheduler, dtype, device)

    names = [f"{i:040d}" for i in range(4)]
    captions, moments = captions_and_moments(job)
    width = transformer.config.text_embed_dim
    for name, clip in zip(names, moments, strict=True):
        encodings.write_entry(encodings.entry_path(folder, "clips", name), clip.to(dtype))
        encodings.write_entry(encodings.entry_path(folder, "captions", name), torch.randn(TEXT_LENGTH, width).to(dtype))
    stored = encodings.Encodings(folder, names, names, names, names[0])
    plan = order.Plan(args.seed, tuple(range(len(names))), (0,) * len(names), batch_size * processes, len(names), steps)
    clips = TrainingClips(stored, plan.clip_of, args.seed, COGVIDEOX_2B.scaling_factor, scheduler.config.num_train_timesteps)
    batches = iter(DataLoader(clips, batch_sampler=list(order.positions_of(rank, processes, batch_size, 1, 0, steps))))
    optimizer = script.make_optimizer(args, parameters, args.learning_rate)
    schedule = script.make_schedule(args, optimizer, steps)
    model, optimizer, parameters = engine.prepare(accelerator, transformer, optimizer, batch_size, args.max_grad_norm, dtype)

    trained = engine.Trained(accelerator, transformer, model, parameters, optimizer, schedule, dtype=dtype)
    numbers = itertools.count(1)

    def step():
        result = script.train_step(args, trained, batches, compute_loss, next(numbers))
        return accelerator.reduce(result.losses[-1], "mean").item()  # as with --logging_steps 1

    blocks = len(transformer.transformer_blocks)
    return step, lambda: script.checkpoint_blocks(transformer, *script.blocks_to_recompute(job["gradient_checkpointing"], blocks))


def reference_step(job, folder):
    """(a function that trains one step as the original does, one that sets the checkpointing), its log in `folder`."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    from cogvideox.folder import COGVIDEOX_2B, PRECISIONS, load_tokenizer
    from demo.make_model import make_scheduler
    from tools import reference

    reference.set_seed(42)
    dtype = PRECISIONS[job["precision"]]
    accelerator = reference.start_accelerator(job["precision"])
    scheduler, tokenizer = make_scheduler(), load_tokenizer(ROOT / "demo")
    text_encoder = make_text_encoder(job["size"], dtype).to(accelerator.device)
    transformer = make_transformer(job["size"], dtype).to(accelerator.device)
    parameters = reference.add_lora(transformer, job["rank"])
    captions, moments = captions_and_moments(job)
    posteriors = [DiagonalGaussianDistribution(clip[None].to(dtype)) for clip in moments]
    loader = reference.batches_of(posteriors, captions, COGVIDEOX_2B.scaling_factor)
    model, optimizer, schedule = reference.prepare(accelerator, transformer, parameters)
    batches = (batch for _ in iter(int, 1) for batch in loader)
    log = (folder / "metrics.jsonl").open("w")

    def step():
        texts = tokenizer, text_encoder, next(batches), TEXT_LENGTH
        loss = reference.train_step(accelerator, model, scheduler, optimizer, schedule, parameters, *texts)
        log.write(json.dumps({"loss": loss, "learning_rate": schedule.get_last_lr()[0]}) + "\n")
        log.flush()
        return loss

    def checkpoint():
        if job["gradient_checkpointing"] != "none":
            transformer.enable_gradient_checkpointing()

    return step, checkpoint


def time_steps(job):
    """Seconds of optimizer steps of one variant; of ours also the FLOPs, counted without checkpointing."""
    from cogvideox.folder import PRECISIONS

    with tempfile.TemporaryDirectory() as folder:
        ours = job["variant"] != "reference"
        step, checkpoint = (our_step if ours else reference_step)(job, Path(folder))
        flops = count_flops(step) if ours else None
        checkpoint()
        for _ in range(job["warmup"]):
            step()
        gc.collect()
        peak = matmul_peak(PRECISIONS[job["precision"]], job["clock"])
        losses = []
        seconds, others = seconds_of(lambda: losses.append(step()), job["steps"], job["clock"])
    peak_mib = psutil.Process().memory_info().rss / 2**20
    measured = {"seconds": seconds, "flops": flops, "matmul_peak": peak, "others": others, "losses": losses, "rss_mib": peak_mib}
    return measured | machine_facts()


def machine_facts(threads=None):
    """What the figures depend on beside the code."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    kind = (models[0] if models else "CPU") + ("" if has_fast_bf16() else " without bf16 instructions")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers"))
    return {"machine": f"{kind}, {os.cpu_count()} cores, {threads or os.environ.get('OMP_NUM_THREADS', 'all')} threads, {versions}"}


def time_encoder(job):
    """Seconds a clip of the VAE or of T5, their FLOPs a clip, and the matmul peak of the dtype that they run in."""
    import numpy as np
    import torch

    from cogvideox import encodings, model
    from cogvideox.folder import PRECISIONS, load_tokenizer

    dtype = PRECISIONS[job["precision"]]
    if job["variant"] == "vae":
        vae, per_call = make_vae(job["vae"], dtype), 1
        dtype = vae.dtype
        frames = np.random.default_rng(0).integers(0, 256, (*job["shape"], 3), dtype=np.uint8)
        call = functools.partial(model.encode_frames, vae, frames)
    else:
        captions, per_call = (ROOT / "demo/dataset/prompts.txt").read_text().splitlines(), encodings.CAPTIONS_PER_BATCH
        text_encoder = make_text_encoder(job["size"], dtype)
        call = functools.partial(model.encode_captions, load_tokenizer(ROOT / "demo"), text_encoder, captions[:per_call], TEXT_LENGTH)
    flops = count_flops(torch.no_grad()(call))
    call()
    peak = matmul_peak(dtype, job["clock"])
    seconds, others = seconds_of(call, job["steps"], job["clock"])
    per_clip = [value / per_call for value in seconds]
    return {"seconds": per_clip, "flops": flops / per_call, "matmul_peak": peak, "others": others} | machine_facts()


def time_decoder(job):
    """Seconds a clip of decoding files in one way, and the bytes that a decoded clip takes."""
    from cogvideox.decode import Framing, read_clip

    (frames, height, width), kept = job["shape"], []
    framing = Framing(fps=job["fps"], max_num_frames=frames, sizes=((height, width),))
    files = sorted(str(path) for path in Path(job["folder"]).iterdir())
    if job["variant"] == "ours":
        one = lambda path: kept.append(read_clip(path, framing)[0].nbytes)  # noqa: E731
    elif job["variant"] == "decoder alone":
        import decord

        def one(path):
            video = decord.VideoReader(path, num_threads=1, width=width, height=height)
            kept.append(video.get_batch(range(min(frames, len(video)))).asnumpy().nbytes)
    elif job["variant"] in ("reference", "full size"):
        from tools import reference

        decode = reference.decode_clip if job["variant"] == "reference" else decode_at_full_size
        one = lambda path: kept.append(decode(path, height, width, frames).nbytes)  # noqa: E731
    if job["variant"] == "ours, in reader processes":
        from cogvideox.reader import Readers, decode_workers

        with Readers(decode_workers()) as readers:
            [readers.read(path, framing) for path in files[:2]]  # starts the processes

            def every():
                kept.extend(clip.nbytes for _, clip, _ in readers.read_all([(path, framing) for path in files]))

            # Their CPU time is seen only after they have ended, so what others used is not known.
            seconds, others = seconds_of(every, job["steps"], "wall")[0], None
    else:
        one(files[0])
        seconds, others = seconds_of(lambda: [one(path) for path in files], job["steps"], job["clock"])
    return {"seconds": [value / len(files) for value in seconds], "others": others, "bytes": max(kept)} | machine_facts()


def decode_at_full_size(path, height, width, max_num_frames):
    """fp32 pixels in [-1, 1], [F, 3, H, W], resized after they were decoded at the file's size: diffusers' example does so."""
    import decord
    import torch

    video = decord.VideoReader(path)
    frames = torch.from_numpy(video.get_batch(range(min(max_num_frames, len(video)))).asnumpy()).float()
    frames = frames.permute(0, 3, 1, 2)
    resized = [torch.nn.functional.interpolate(frame[None], (height, width), mode="bicubic", antialias=True)[0] for frame in frames]
    return torch.stack([frame / 255 * 2 - 1 for frame in resized])


def write_sources(job):
    """Write mp4 files of a size for the decoders: the demo's pictures, enlarged."""
    import numpy as np
    from PIL import Image

    from cogvideox.video import read_video, write_video

    frames, height, width = job["source"]
    for i, path in enumerate(sorted((ROOT / "demo/dataset/videos").glob("*.mp4"))[: job["clips"]]):
        small = read_video(path)
        pictures = [Image.fromarray(small[number % len(small)]).resize((width, height)) for number in range(frames)]
        write_video(Path(job["folder"]) / f"{i:02d}.mp4", [np.asarray(picture) for picture in pictures], job["fps"])
    return {"folder": job["folder"]}


JOBS = {"model": write_model, "sources": write_sources, "step": time_steps, "encode": time_encoder, "decode": time_decoder}
JOBS["scale"] = lambda job: time_scale(job)


# -----------------------------------------------------------------------------
# The measurements


def take_turns(options, jobs, run=None):
    """Run every job once in each turn. Returns the samples: each job with what was measured of it, and the turn."""
    samples = []
    turns = [(turn, job) for turn in range(options.repeats) for job in jobs]
    with progress(turns, f"measuring {options.what}", unit="run") as bar:
        for turn, job in bar:
            bar.set_postfix_str(job["variant"])
            measured = (run or run_worker)(job, options.threads)
            samples.append(job | measured | {"turn": turn})
    return samples


def of_kind(samples, **wanted):
    """The samples that have these values."""
    return [s for s in samples if all(s[name] == wish for name, wish in wanted.items())]


def paired_ratio(samples, value, variant, baseline, **wanted):
    """The median over the turns of baseline / variant, each the median of its samples in that turn."""
    ratios = []
    for turn in sorted({s["turn"] for s in samples}):
        of_turn = of_kind(samples, turn=turn, **wanted)
        values = [statistics.median(map(value, of_kind(of_turn, variant=name))) for name in (baseline, variant)]
        ratios.append(values[0] / values[1])
    return statistics.median(ratios)


def percent(share):
    """A share as a word for the table."""
    return "?" if share is None else f"{100 * share:.0f} %"


def others_of(samples):
    """The largest share of the CPUs that others used in any of the samples, as a word."""
    known = [sample["others"] for sample in samples if sample["others"] is not None]
    return percent(max(known, default=None)) + (" (disturbed)" if max(known, default=0) > DISTURBED else "")


def spell(shape):
    """(9, 96, 96) as 9x96x96."""
    return "x".join(map(str, shape))


def step_job(options, variant, shape):
    """The job of timing steps of one variant."""
    common = {name: getattr(options, name) for name in ("size", "precision", "gradient_checkpointing", "steps", "warmup", "clock")}
    common["rank"] = options.rank or SIZES[options.size]["rank"]
    return {"job": "step", "variant": variant, "shape": shape} | common


def measure_step(work, options):
    """Seconds of a step of the baseline and of ours, and the share of the peak that the useful FLOPs reach."""
    variants = ["reference", "ours"] + (["ours, plain linears"] if options.plain_linears else [])
    jobs = [step_job(options, v, shape) for shape in options.shape for v in variants]
    samples, rows = take_turns(options, jobs), []
    for shape in options.shape:
        of_shape = of_kind(samples, shape=shape)
        flops = next(s["flops"] for s in of_shape if s["flops"])
        for variant in variants:
            mine = of_kind(of_shape, variant=variant)
            every = sorted(value for s in mine for value in s["seconds"])
            rows.append(
                {
                    "shape": spell(shape),
                    "tokens": tokens_of(shape),
                    "variant": variant,
                    "seconds": round(statistics.median(every), 4),
                    "least": round(every[0], 4),
                    "most": round(every[-1], 4),
                    "ratio": round(paired_ratio(of_shape, lambda s: statistics.median(s["seconds"]), variant, "reference"), 3),
                    "useful_GFLOP": round(flops / 1e9, 1),
                    "GFLOP/s": round(flops / statistics.median(every) / 1e9, 1),
                    "peak_GFLOP/s": round(statistics.median(s["matmul_peak"] for s in mine) / 1e9, 1),
                    "of_peak": percent(statistics.median(flops / statistics.median(s["seconds"]) / s["matmul_peak"] for s in mine)),
                    "others": others_of(mine),
                }
            )
    return {"rows": rows, "samples": samples}


def fit_exponent(values, costs):
    """(the p of cost = c * value^p, by least squares of the logarithms, and the largest share by which a cost is off that curve)."""
    values, costs = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    slope, intercept = statistics.linear_regression(values, costs)
    off = max(abs(math.expm1(cost - intercept - slope * value)) for value, cost in zip(values, costs, strict=True))
    return slope, off


def measure_growth(work, options):
    """Seconds of our step with one quantity changed at a time, and the exponents that fit them."""
    frames, height, width = options.shape[0]
    base = step_job(options, "ours", options.shape[0]) | {"batch": 1}
    axes = {
        "frames": {n: base | {"shape": [n, height, width]} for n in options.frames},
        "height = width": {n: base | {"shape": [frames, n, n]} for n in options.sides},
        "rank": {n: base | {"rank": n} for n in options.ranks},
        "batch": {n: base | {"batch": n} for n in options.batches},
    }
    jobs = [job for points in axes.values() for job in points.values()]
    samples, rows, fits = take_turns(options, [job for i, job in enumerate(jobs) if job not in jobs[:i]]), [], []
    for axis, points in axes.items():
        found = [of_kind(samples, **job) for job in points.values()]
        values, tokens = list(points), [tokens_of(job["shape"]) for job in points.values()]
        seconds = [statistics.median(second for s in mine for second in s["seconds"]) for mine in found]
        flops = [mine[0]["flops"] for mine in found]
        for value, length, second, flop, mine in zip(values, tokens, seconds, flops, found, strict=True):
            row = {"axis": axis, "value": value, "tokens": length, "seconds": round(second, 4), "useful_GFLOP": round(flop / 1e9, 1)}
            rows.append(row | {"others": others_of(mine)})
        if len(values) > 1:
            exponent, off = fit_exponent(values, seconds)
            fits.append(
                {
                    "axis": axis,
                    "seconds_by_value": round(exponent, 2),
                    "worst_point": percent(off),
                    "seconds_by_tokens": round(fit_exponent(tokens, seconds)[0], 2) if len(set(tokens)) > 1 else "",
                    "GFLOP_by_value": round(fit_exponent(values, flops)[0], 2),
                }
            )
    return {"rows": rows, "fits": fits, "samples": samples}


def model_folder(work, options, size):
    """The model of whole runs: the one given, or a generated one."""
    if options.model:
        return options.model
    folder, vae = work / f"model-{size}", "small" if size == "tiny" else options.vae
    if not folder.exists():
        run_worker({"job": "model", "size": size, "vae": vae, "precision": options.precision, "folder": str(folder)}, options.threads)
    return folder


def run_flags(options, shape, steps):
    """The flags that ours and the baseline share."""
    frames, height, width = shape
    sizes = {"max_num_frames": frames, "height": height, "width": width, "rank": options.rank or SIZES[options.size]["rank"]}
    return sizes | {"max_train_steps": steps, "mixed_precision": options.precision}


def our_flags(options, flags):
    """The shared flags with those that only ours has."""
    return flags | {"report_to": "none", "eval_clips": 0, "gradient_checkpointing": options.gradient_checkpointing}


def reference_flags(options, flags):
    """The shared flags with those that only the baseline has."""
    return flags | ({} if options.gradient_checkpointing == "none" else {"gradient_checkpointing": True})


def program_of(work, model, options, flags, job, threads):
    """Run ours or the baseline as `job` says, in an output folder that is removed again."""
    output = Path(tempfile.mkdtemp(dir=work, prefix="out-"))
    clips = work / f"clips-{job['clips']}"
    if not clips.exists():
        make_clips(clips, job["clips"])
    if job["variant"] == "reference":
        line = reference_command(model, clips, output, reference_flags(options, flags))
    else:
        line = trainer_command(model, clips, output, work / job["cache"], job.get("processes", 1), our_flags(options, flags))
    measured = run_program(line, output, threads)
    shutil.rmtree(output, ignore_errors=True)
    return measured


def measure_start(work, options):
    """Seconds from launch to the first step."""
    model, samples, rows = model_folder(work, options, options.size), [], []
    flags = run_flags(options, options.shape[0], 1)
    variants = ("reference", "ours, empty cache", "ours, full cache")
    for count in options.clips:
        caches = iter(range(10**6))

        def run(job, threads, caches=caches):
            if job["variant"] == "ours, empty cache":
                run.cache = f"cache-{job['clips']}-{next(caches)}"  # the full one of the same turn is what it leaves
            return program_of(work, model, options, flags, job | {"cache": getattr(run, "cache", "")}, threads)

        samples += take_turns(options, [{"variant": v, "clips": count} for v in variants], run)
        for variant in variants:
            mine = of_kind(samples, variant=variant, clips=count)
            seconds = sorted(s["seconds_to_first_step"] for s in mine)
            ratio = paired_ratio(samples, lambda s: s["seconds_to_first_step"], variant, "reference", clips=count)
            rows.append(
                {
                    "clips": count,
                    "variant": variant,
                    "seconds_to_first_step": round(statistics.median(seconds), 2),
                    "least": round(seconds[0], 2),
                    "most": round(seconds[-1], 2),
                    "ratio": round(ratio, 2),
                    "others": others_of(mine),
                }
            )
    return {"rows": rows, "samples": samples}


def measure_memory(work, options):
    """Peak memory of whole runs of ours and of the baseline, and of ours by clips and processes."""
    rows, growth, samples = [], [], []
    if "runs" in options.part:
        count, model = min(options.clips), model_folder(work, options, options.size)
        flags = run_flags(options, options.shape[0], options.steps)
        flags |= {"validation_prompt": "a white rabbit smiles", "num_inference_steps": 2}
        turns = iter(range(10**6))

        def run(job, threads):
            return program_of(work, model, options, flags, job | {"cache": f"cache-memory-{next(turns)}"}, threads)

        samples = take_turns(options, [{"variant": v, "clips": count} for v in ("reference", "ours")], run)
        for variant in ("reference", "ours"):
            mine = of_kind(samples, variant=variant)
            rows.append(
                {
                    "variant": variant,
                    "clips": count,
                    "peak_mib": round(statistics.median(s["peak_mib"] for s in mine)),
                    "helpers_mib": round(statistics.median(s["helpers_mib"] for s in mine)),
                    "share": percent(1 / paired_ratio(samples, lambda s: s["peak_mib"], variant, "reference")),
                    "share_with_helpers": percent(
                        1 / paired_ratio(samples, lambda s: s["peak_mib"] + s["helpers_mib"], variant, "reference")
                    ),
                    "seconds": round(statistics.median(s["wall_seconds"] for s in mine), 1),
                    "others": others_of(mine),
                }
            )
    if "growth" in options.part:
        # A tiny model: what grows with the clips grows with any model, and shows best beside a small one.
        model, flags = model_folder(work, options, "tiny"), run_flags(options, options.shape[0], 1) | {"rank": SIZES["tiny"]["rank"]}
        plan = [(processes, count) for processes in options.processes for count in options.clips]
        for processes, count in progress(plan, "measuring growth", unit="run"):
            job = {"variant": "ours", "clips": count, "processes": processes, "cache": f"cache-{processes}-{count}"}
            measured = program_of(work, model, options, flags, job, 1)
            samples.append(job | measured | {"turn": None})
            base = next((r["peak_mib_of_a_process"] for r in growth if r["processes"] == processes), measured["peak_mib"])
            growth.append(
                {
                    "processes": processes,
                    "clips": count,
                    "peak_mib_of_a_process": round(measured["peak_mib"]),
                    "ratio": round(measured["peak_mib"] / base, 3),
                    "others": percent(measured["others"]),
                }
            )
    return {"rows": rows, "growth": growth, "samples": samples}


def measure_encode(work, options):
    """Clips a second of decoding, VAE and T5; a share of the decoder's own speed, or of the matmul peak."""
    rows, common = [], {name: getattr(options, name) for name in ("size", "precision", "vae", "steps", "clock")}
    common["shape"], common["fps"] = options.shape[0], options.fps
    folder = sources_folder(work, options)
    jobs = [{"job": "decode", "folder": folder, "variant": name} | common for name in ("ours", "decoder alone")]
    jobs += [{"job": "encode", "variant": name} | common for name in ("vae", "t5")]
    samples = take_turns(options, jobs)

    def row(name, mine, limit, words):
        seconds = statistics.median(value for s in mine for value in s["seconds"])
        rows.append(
            {
                "part": name,
                "clips_a_second": round(1 / seconds, 3),
                "GFLOP_a_clip": round(mine[0].get("flops", 0) / 1e9, 1) or "",
                "limit": words,
                "of_limit": percent(limit),
                "others": others_of(mine),
            }
        )

    decoded = of_kind(samples, variant="ours")
    alone = paired_ratio(samples, lambda s: statistics.median(s["seconds"]), "ours", "decoder alone")
    row("decode (1 process)", decoded, alone, "decord alone")
    for variant in ("vae", "t5"):
        mine = of_kind(samples, variant=variant)
        share = statistics.median(s["flops"] / statistics.median(s["seconds"]) / s["matmul_peak"] for s in mine)
        peak = statistics.median(s["matmul_peak"] for s in mine) / 1e9
        row({"vae": "VAE encode", "t5": "T5"}[variant], mine, share, f"{peak:.0f} GFLOP/s")
    return {"rows": rows, "samples": samples}


def sources_folder(work, options):
    """The folder of files to decode: the one given, or generated ones."""
    if options.data:
        return options.data
    job = {"job": "sources", "source": options.source[0], "clips": options.clips[0], "folder": str(work / "sources"), "fps": options.fps}
    return run_worker(job, options.threads)["folder"]


def measure_decode(work, options):
    """Clips a second of decoding, ours and others'."""
    variants, rows = ("full size", "reference", "ours", "ours, in reader processes", "decoder alone"), []
    common = {"job": "decode", "folder": sources_folder(work, options), "shape": options.shape[0], "fps": options.fps}
    common |= {"steps": options.steps, "clock": options.clock}
    samples = take_turns(options, [common | {"variant": variant} for variant in variants])
    for variant in variants:
        mine = of_kind(samples, variant=variant)
        rows.append(
            {
                "variant": variant,
                "clips_a_second": round(1 / statistics.median(value for s in mine for value in s["seconds"]), 2),
                "ratio": round(paired_ratio(samples, lambda s: statistics.median(s["seconds"]), variant, "reference"), 2),
                "mib_a_clip": round(mine[0]["bytes"] / 2**20, 1),
                "others": others_of(mine),
            }
        )
    return {"rows": rows, "samples": samples}


MEASUREMENTS = {
    "step": measure_step,
    "growth": measure_growth,
    "start": measure_start,
    "memory": measure_memory,
    "encode": measure_encode,
    "decode": measure_decode,
    "scale": lambda work, options: measure_scale(work, options),
}


def table(rows):
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])


# -----------------------------------------------------------------------------
# The command line


def parse_shape(word):
    """(frames, height, width) of FRAMESxHEIGHTxWIDTH."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", word)
    shape = list(map(int, match.groups())) if match else [0, 0, 0]
    if min(shape) < 1 or shape[0] % 4 != 1 or shape[1] % 16 or shape[2] % 16:
        raise argparse.ArgumentTypeError(f"{word}: FRAMESxHEIGHTxWIDTH in pixels, 4k + 1 frames, multiples of 16 (9x96x96)")
    return shape


def count(word):
    """A whole number of 1 or more."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: a whole number, at least 1")
    return int(word)


def build_parser():
    """One subcommand a measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measurements = parser.add_subparsers(dest="what", required=True, metavar="|".join(MEASUREMENTS))
    everything, summary = {}, "steps and seconds to a held-out loss, by settings"
    measurements.add_parser("quality", help=summary, add_help=False)  # has its own flags
    for name, summary, shape, repeats, steps in (
        ("step", "seconds of an optimizer step", "9x96x96 9x192x288", 3, 5),
        ("growth", "how the seconds of our step grow", "9x96x96", 2, 2),
        ("start", "seconds from launch to the first step", "9x96x96", 3, None),
        ("memory", "peak memory of whole runs", "9x96x96", 1, 4),
        ("encode", "clips a second of decoding, VAE and T5", "9x96x96", 3, 3),
        ("decode", "clips a second of decoding", "49x480x720", 3, 2),
        ("scale", "steps on several processes: time, bytes sent, memory", "9x96x96", 1, 3),
    ):
        everything[name] = measurements.add_parser(name, help=summary, description=summary)
        flag = everything[name].add_argument
        shapes = [parse_shape(word) for word in shape.split()]
        several = "+" if name == "step" else 1
        flag("--shape", type=parse_shape, nargs=several, default=shapes, help=f"FRAMESxHEIGHTxWIDTH in pixels (default: {shape})")
        flag("--repeats", type=count, default=repeats, help=f"turns of all variants (default: {repeats})")
        flag("--json", help="write all rows and samples here as well")
        flag("--threads", type=count, help="OMP_NUM_THREADS of the processes (default: all cores; 1 at size tiny)")
        if steps:
            flag("--steps", type=count, default=steps, help=f"what is timed: steps, or calls, a process (default: {steps})")
        if name != "decode":
            flag("--size", choices=list(SIZES), default="mid", help="2b: the real one; mid: its blocks, 4 of them; tiny (default: mid)")
            flag("--precision", choices=("bf16", "no"), help="of both variants (default: bf16 where this machine multiplies it fast)")
        if name in ("step", "growth", "start", "memory", "scale"):
            flag("--rank", type=count, help="rank of the LoRA (default: 128; 4 at size tiny)")
            flag("--gradient_checkpointing", choices=("none", "all"), default="none", help="of both variants (default: none)")
        if name not in ("start", "memory", "scale"):
            flag("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, for --threads 1 on a machine that is not quiet")
        if name in ("start", "memory"):
            clips = [16] if name == "start" else [16, 256]
            flag("--model", help="model folder (default: one is generated)")
            flag("--clips", type=count, nargs="+", default=clips, help=f"sizes of the data set (default: {' '.join(map(str, clips))})")
        if name in ("start", "memory", "encode"):
            size = "small" if name == "memory" else "real"
            flag("--vae", choices=list(VAES), default=size, help=f"of the generated model (default: {size}; small at size tiny)")
        if name in ("encode", "decode"):
            source = "49x720x1280"
            flag("--source", type=parse_shape, nargs=1, default=[parse_shape(source)], help=f"files to decode (default: {source})")
            flag("--data", help="folder of files to decode, and nothing else (default: some are generated)")
            flag("--clips", type=count, nargs=1, default=[4], help="files to generate (default: 4)")
            flag("--fps", type=count, default=8, help="frames a second, of the files and of the clips (default: 8)")
        if name in ("step", "growth", "scale"):
            words = "steps before those that are timed, beside the one that is counted (default: 1)"
            flag("--warmup", type=count, default=1, help=words)
    flag = everything["growth"].add_argument
    # Checked as parts of a shape.
    frames, side = (lambda word: parse_shape(f"{word}x16x16")[0]), (lambda word: parse_shape(f"1x{word}x{word}")[1])
    for name, kind, values, what in (
        ("frames", frames, [9, 17, 33], "frames of a clip"),
        ("sides", side, [96, 192, 288], "height and width of a square clip, pixels"),
        ("ranks", count, [32, 128, 512], "ranks of the LoRA"),
        ("batches", count, [1, 2, 4], "clips in a batch"),
    ):
        flag(
            f"--{name}",
            type=kind,
            nargs="+",
            default=values,
            help=f"{what}, all else as --shape and --rank (default: {' '.join(map(str, values))})",
        )
    flag = everything["step"].add_argument
    flag("--plain_linears", action="store_true", help="a third variant: ours without row-chunked linear layers")
    flag = everything["scale"].add_argument
    engines = ("ddp", "fsdp2", "zero2", "zero3")
    flag("--engines", nargs="+", choices=engines, default=["ddp", "fsdp2"], help="what runs the processes (default: ddp fsdp2)")
    flag("--processes", type=count, nargs="+", default=[1, 2, 4], help="how many of them (default: 1 2 4)")
    flag("--training_type", choices=("lora", "sft"), default="lora", help="a LoRA, or all weights (default: lora)")
    flag = everything["memory"].add_argument
    flag("--part", nargs="+", choices=("runs", "growth"), default=["runs", "growth"], help="whole runs; ours by clips and processes")
    flag("--processes", type=count, nargs="+", default=[1, 2], help="growth: processes of a run (default: 1 2)")
    for each in (parser, *everything.values()):
        each.error = functools.partial(end, each)
    return parser


def end(parser, message):
    """A mistake of the user: one sentence, exit code 2."""
    parser.exit(2, f"ERROR[2]: {message}\n")


def measure_scale(work, options):
    """Steps on several processes, under each engine: tools/scale.py."""
    from tools import scale

    return scale.measure_scale(work, options)


def time_scale(job):
    """The same in each of the processes."""
    from tools import scale

    return scale.time_scale(job)


def main(words=None):
    """The command line."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["worker"]:
        job = json.loads(words[1])
        print(json.dumps(JOBS[job["job"]](job)))
        return
    if words[:1] == ["quality"]:
        from tools import quality

        quality.main(words[1:])
        return
    parser = build_parser()
    options = parser.parse_args(words)
    for name in ("model", "data"):
        folder = getattr(options, name, None)
        if folder and not Path(folder).is_dir():
            parser.error(f"--{name} {folder}: no such folder")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: its folder is not there")
    if options.what not in ("step", "growth", "scale") and options.shape[0][2] in (16, 48):
        parser.error(f"--shape {spell(options.shape[0])}: decord, which the baseline decodes with, refuses this width; try 96")
    tiny = getattr(options, "size", None) == "tiny"
    options.threads = options.threads or (1 if tiny or options.what == "scale" else os.cpu_count())
    if "precision" in options and options.precision is None:
        options.precision = "bf16" if has_fast_bf16() else "no"
    if tiny and hasattr(options, "vae"):
        options.vae = "small"
    # So that a benchmark that is stopped leaves nothing running, and nothing on the disk.
    handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    work = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        result = MEASUREMENTS[options.what](work, options)
    finally:
        signal.signal(signal.SIGTERM, handler)
        shutil.rmtree(work, ignore_errors=True)
    machine = next((s["machine"] for s in result["samples"] if "machine" in s), machine_facts(options.threads)["machine"])
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "model", "data")}
    shown = [f"{name} {settings[name]}" for name in ("size", "precision", "vae", "gradient_checkpointing") if name in settings]
    print(f"{'; '.join([machine, *shown])}\n")
    print("\n\n".join(table(result[part]) for part in ("rows", "growth", "fits", "computed") if result.get(part)))
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "settings": settings} | result, indent=1))


if __name__ == "__main__":
    main()
