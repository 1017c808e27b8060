"""Cases of optimizer steps: against the baseline, under each flag, with offloaded weights, on several GPUs."""

import contextlib
import importlib.util
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

import train_cogvideox_lora as script
from cogvideox import memory, rehearsal
from cogvideox.launch import synchronize
from tools.benchmark import harness, variants
from tools.benchmark.counters import peak_bytes, step_flops
from tools.benchmark.harness import seconds_of
from tools.benchmark.measurements import CONFIGS, sent_on_a_ring
from tools.benchmark.sizes import spell
from tools.gpu_check.rows import not_run, row, unit_of, within
from tools.gpu_check.worker import OUT_OF_MEMORY, attempt, configs_of, reason_of, resident_bytes, start_afresh, step_job

# The variants of `flags`: flags on top of the plain step's, how far the losses of two steps may be off, as a share, and whether a
# step takes less memory. Recomputing, offloading and compiling change no number but by rounding; the first loss under an 8-bit
# optimizer is the plain one. The loss on weights of fewer bits differs by their rounding: 0.4 % of a weight for int8, 3 % for fp8,
# 8 % for nf4.
ROUNDING = 2e-3
VARIANTS = {
    "--gradient_checkpointing all": (["--gradient_checkpointing", "all"], ROUNDING, True),
    "--gradient_checkpointing attention": (["--gradient_checkpointing", "attention"], ROUNDING, True),
    "--gradient_checkpointing 1": (["--gradient_checkpointing", "1"], ROUNDING, True),
    "--gradient_checkpointing auto": (["--gradient_checkpointing", "auto"], ROUNDING, False),
    "--offload": (["--offload"], ROUNDING, True),
    "--base_precision int8": (["--base_precision", "int8"], 1e-2, True),
    "--base_precision fp8": (["--base_precision", "fp8"], 3e-2, True),
    "--base_precision nf4": (["--base_precision", "nf4"], 1e-1, True),
    "--optimizer AdamW8bit": (["--optimizer", "AdamW8bit"], ROUNDING, True),
    "--optimizer Adam8bit": (["--optimizer", "Adam8bit"], ROUNDING, True),
    "--compile": (["--compile"], ROUNDING, False),
}
NEEDS = {"AdamW8bit": "bitsandbytes", "Adam8bit": "bitsandbytes", "nf4": "bitsandbytes"}
PROCESSES = 2  # of `engines`


# -----------------------------------------------------------------------------
# Against the baseline


def check_step(job):
    """Steps of ours and of the baseline at the largest shape and the least recomputation that the card has memory for."""
    claim = "a step against the baseline's"
    configs, (frames, height, width) = configs_of(job), step_job(job)["shape"]
    shapes = [
        (frames, height, width),
        ((frames // 8) * 4 + 1, height, width),
        ((frames // 16) * 4 + 1, height // 32 * 16, width // 32 * 16),
    ]
    for shape, checkpointing in itertools.product(shapes, ("none", "all")):
        chosen = step_job(job, shape=list(shape), gradient_checkpointing=checkpointing)
        chosen["flops"] = step_flops(configs, variants.our_flags(chosen), script.velocity_loss, memory.latents_of(configs, *shape))
        try:
            theirs, ours = (time_variant(chosen | {"variant": variant}) for variant in ("reference", "ours"))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if (reason := reason_of(error)).startswith(OUT_OF_MEMORY):
                continue
            raise
        yield from compare_steps(spell(shape), checkpointing, theirs, ours)
        return
    yield not_run(claim, f"the card has no memory for the baseline at {spell(shape)} either: {reason}")


def time_variant(chosen):
    """What `time_steps` measures of one variant; on a GPU with `peak`: (allocated, reserved) bytes."""
    start_afresh()
    measured = variants.time_steps(chosen)
    if torch.cuda.is_available():
        measured["peak"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return measured


def compare_steps(shape, checkpointing, theirs, ours):
    """The rows of `check_step`."""
    seconds, baseline = statistics.median(ours["seconds"]), statistics.median(theirs["seconds"])
    peak, reached = ours["matmul_peak"] / 1e12, ours["flops"] / seconds / 1e12
    settings = f"{shape}, --gradient_checkpointing {checkpointing}"
    samples, on_gpu = {"ours": ours, "baseline": theirs}, "peak" in ours
    yield row(
        f"baseline's seconds / ours, {settings}", "1.0 or more" if on_gpu else None, baseline / seconds, "",
        baseline >= seconds if on_gpu else None, f"{seconds:.3f} s a step, the baseline {baseline:.3f} s", samples=samples,
    )  # fmt: skip
    share = f"{100 * reached / peak:.0f} % of the {peak:.1f} TFLOP/s of the fastest matrix product"
    yield row("useful TFLOP/s of a step", None, reached, "TFLOP/s", remark=share, matmul_peak=ours["matmul_peak"], flops=ours["flops"])
    if on_gpu:
        (allocated, reserved), (their_allocated, _) = ours["peak"], theirs["peak"]
        remark = f"{reserved / 2**30:.2f} GiB reserved"
        most = their_allocated / 2**30
        yield row(f"peak memory, at most the baseline's, {settings}", most, allocated / 2**30, "GiB", allocated <= their_allocated, remark)


# -----------------------------------------------------------------------------
# Under each flag


def check_flags(job):
    """Two steps with each flag that changes how a step is computed, against the plain step."""
    plain = {}
    yield from attempt("the plain step", measure_plain(job, plain))
    if not plain:
        return
    for name, (words, share, saves) in VARIANTS.items():
        saves = saves and job["device"] == "cuda"  # a CPU offloads nothing, and the states of a tiny LoRA have no 8 bits
        claim = f"{name}: the plain step's loss{', in less memory' if saves else ''}"
        package = NEEDS.get(words[-1])
        if package and importlib.util.find_spec(package) is None:
            yield not_run(claim, f"{package} is not installed")
        else:
            yield from attempt(claim, compare_with_plain(job, claim, words, share, saves, plain), promised=True)


def measure_plain(job, plain):
    """Fill `plain` with what was measured of a step with no such flag."""
    plain |= measure_steps(job, ["--gradient_checkpointing", "none"])
    remark = spell_cost(plain)
    yield row("the plain step: its loss", None, plain["losses"][-1], remark=remark, **plain)


def compare_with_plain(job, claim, words, share, saves, plain):
    """The row of one flag; with --compile, a second one of its graphs."""
    measured = measure_steps(job, words)
    both = list(zip(plain["losses"], measured["losses"], strict=True))
    off = max(abs(ours - theirs) / abs(theirs) for theirs, ours in both)
    remark = f"off by {100 * off:.2g} %, at most {100 * share:g} %; {spell_cost(measured)}"
    holds = off <= share and (not saves or measured["allocated"] < plain["allocated"])
    yield row(claim, plain["losses"][-1], measured["losses"][-1], "", holds, remark, off=off, **measured)
    if "--compile" in words:
        graphs = measured["graphs"]
        yield row("--compile: one graph for all blocks, at most 2", 1, graphs, "", 1 <= graphs <= 2, remark="graphs that Dynamo made")


def measure_steps(job, words):
    """Losses of two steps, then seconds and peak bytes of one, with these flags."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    chosen = step_job(job, short=True, steps=4, flags=words)
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        run = variants.our_run(chosen, Path(folder))
        setting = run.args.gradient_checkpointing
        if setting == "auto":
            batch = fixed_batch(run)
            rehearsal.fit_to_memory(run.args, run.trained, lambda: run.compute_loss(run.trained.model, batch))
        losses = [run.step(), run.step()]
        seconds, _ = seconds_of(run.step, 1, "wall")
        allocated, reserved = peak_bytes(run.step, job["device"], resident_bytes(run.trained))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"losses": losses, "seconds": seconds[0], "allocated": allocated, "reserved": reserved, "graphs": graphs}


def fixed_batch(run):
    """The first batch on the device, as the rehearsal has one."""
    batch = next(variants.our_batches(run.encodings, run.args.seed, run.trained.accelerator, 1, 1, run.scheduler))
    return {name: value.to(run.trained.device) for name, value in batch.items()}


def spell_cost(measured):
    """Seconds and memory in words."""
    return f"{measured['seconds']:.3f} s, {measured['allocated'] / 2**30:.2f} GiB allocated, {measured['reserved'] / 2**30:.2f} reserved"


# -----------------------------------------------------------------------------
# Copies of offloaded weights


def check_overlap(job):
    """The share of the time of copying offloaded weights that a step does not wait for."""
    claim = "--offload: share of the copies' time that is hidden"
    plain, offloaded = (median_step(job, words) for words in ([], ["--offload"]))
    bytes_copied = 2 * offloaded_bytes(job)  # for the forward pass and for the backward one
    speed = copy_speed(job["device"])
    copying = bytes_copied / speed
    hidden = 1 - (offloaded - plain) / copying
    remark = f"{plain:.3f} s a step, offloaded {offloaded:.3f} s; {bytes_copied / 2**30:.2f} GiB of copies take {copying:.3f} s"
    numbers = {"seconds": plain, "seconds_offloaded": offloaded, "bytes": bytes_copied, "bytes_a_second": speed}
    if job["device"] == "cpu":
        yield row(claim, None, hidden, "", None, "a CPU copies nothing: no claim", **numbers)
    else:
        yield row(claim, 0.5, hidden, "", hidden >= 0.5, remark, **numbers)


def median_step(job, words):
    """Median seconds of three steps at the smaller shape with these flags, nothing recomputed."""
    start_afresh()
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        run = variants.our_run(step_job(job, short=True, steps=5, flags=words), Path(folder))
        run.step()
        seconds, _ = seconds_of(run.step, 3, "wall")
    return statistics.median(seconds)


def offloaded_bytes(job):
    """Bytes of the frozen weights that --offload leaves in host memory, as cogvideox.memory counts them: a block's, times the blocks."""
    configs, sizes = configs_of(job), []
    layers = memory.layers_of(configs)
    for words in ([], ["--offload"]):
        args = variants.our_flags(step_job(job, short=True, flags=words))
        _, start = memory.training_pieces(configs, args, script.velocity_loss, memory.latents_of(configs, 9, 32, 48), 0, True, "cuda")
        sizes.append(start["base_of_block"])
    return layers * (sizes[0] - sizes[1])


def copy_speed(device, size=1 << 28):
    """Bytes a second of copying from host memory to a device; from pinned memory, if it is a GPU."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    target.copy_(host)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(4):
        target.copy_(host, non_blocking=True)
    synchronize(device)
    return 4 * size / (time.perf_counter() - started)


# -----------------------------------------------------------------------------
# Several GPUs


def check_engines(job):
    """Steps under each engine on two processes, against one process with the clips of both."""
    cards = torch.cuda.device_count()
    if job["device"] == "cuda" and cards < PROCESSES:
        for engine in CONFIGS:
            yield not_run(f"{engine} on {PROCESSES} GPUs trains what one process trains", f"this machine has {cards} GPU")
        return
    one = {}
    yield from attempt("one process", measure_one_process(job, one))
    for engine in CONFIGS if one else ():
        claim = f"{engine} on {PROCESSES} processes: the loss of one process with the same clips"
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            yield not_run(claim, "deepspeed is not installed")
        else:
            yield from attempt(claim, compare_with_one(job, engine, claim, one))


def measure_one_process(job, one):
    """Fill `one` with what was measured of one process, whose batch has the clips of all."""
    one |= measure_engine(job, "ddp", 1)
    yield row("one process: its loss", None, one["losses"][-1], remark=f"{statistics.median(one['seconds']):.3f} s a step", **one)


def compare_with_one(job, engine, claim, one):
    """The rows of one engine."""
    measured = measure_engine(job, engine, PROCESSES)
    off = max(abs(ours / loss - 1) for loss, ours in zip(one["losses"], measured["losses"], strict=True))
    sent, held = sent_on_a_ring(measured["payload"], PROCESSES), max(measured["held_mib"])
    seconds = statistics.median(measured["seconds"])
    remark = f"off by {100 * off:.2g} %; {seconds:.3f} s a step, {sent / 2**20:.1f} MiB sent a process, {held:.0f} MiB of tensors in each"
    yield row(claim, one["losses"][-1], measured["losses"][-1], "", off <= ROUNDING, remark, sent=sent, **measured)
    if engine == "ddp":
        gradients, reduced = adapters_bytes(job), measured["payload"].get("all_reduce", 0)
        unit, size = unit_of(gradients)
        yield row("ddp: what is reduced are the gradients", gradients / size, reduced / size, unit, within(gradients, reduced, 0.01))


def adapters_bytes(job):
    """Bytes of the LoRA's gradients."""
    configs, args = configs_of(job), variants.our_flags(step_job(job, short=True))
    _, start = memory.training_pieces(configs, args, script.velocity_loss, memory.latents_of(configs, 9, 32, 48), 0, True)
    return start["adapters"]


def measure_engine(job, engine, processes):
    """What `time_scale` measures: steps under an engine, on so many processes."""
    chosen = step_job(job, short=True, steps=2, warmup=2, batch=PROCESSES // processes, gradient_checkpointing="all") | {
        "job": "scale", "engine": engine, "config": CONFIGS[engine], "processes": processes, "variant": f"{engine} x {processes}",
        "result": str(Path(job["folder"]) / "engine.json"),
    }  # fmt: skip
    with contextlib.suppress(FileNotFoundError):
        Path(chosen["result"]).unlink()
    return harness.run_workers(chosen, job["threads"])
