"""The measurements: which jobs take turns, and the rows of the tables that their samples make.

Each is a function of (work, options), a temporary folder and the flags of its command. It returns {"rows": ..., "samples": ...}
and the rows of further tables.
"""

import itertools
import statistics

from cogvideox.console import progress
from tools.benchmark import harness
from tools.benchmark.harness import all_seconds, fit_exponent, median_seconds, others_of, paired_ratio, percent, select, take_turns
from tools.benchmark.programs import model_folder, run_flags, run_variant
from tools.benchmark.sizes import SIZES, rank_of, spell, tokens_of

CONFIGS = {
    "ddp": "accelerate_config_machine_multi.yaml",
    "fsdp2": "configs/fsdp2.yaml",
    "zero2": "configs/zero2.yaml",
    "zero3": "configs/zero3.yaml",
}
# What scale computes: name -> (processes, Gbit/s of the slowest link that a ring of them has, one way, for each process).
CLUSTERS = {"8 GPUs, NVLink 2400 Gbit/s": (8, 2400), "16 nodes x 8 GPUs, 100 Gbit/s a GPU": (128, 100)}


def values_of(options, *names):
    """Some of the flags, as a part of a job."""
    return {name: getattr(options, name) for name in names}


# -----------------------------------------------------------------------------
# Steps


def step_job(options, variant, shape):
    """The job of timing steps of one variant."""
    common = values_of(options, "size", "precision", "gradient_checkpointing", "steps", "warmup", "clock")
    return {"job": "step", "variant": variant, "shape": shape, "rank": rank_of(options)} | common


def measure_step(work, options):
    """Seconds of a step of the baseline and of ours, and the share of the peak that the useful FLOPs reach."""
    variants = ["reference", "ours"] + (["ours, plain linears"] if options.plain_linears else [])
    jobs = [step_job(options, variant, shape) for shape in options.shape for variant in variants]
    samples, rows = take_turns(options, jobs), []
    for shape in options.shape:
        of_shape = select(samples, shape=shape)
        flops = next(sample["flops"] for sample in of_shape if sample["flops"])
        for variant in variants:
            found = select(of_shape, variant=variant)
            seconds = all_seconds(found)
            rows.append(
                {
                    "shape": spell(shape),
                    "tokens": tokens_of(shape),
                    "variant": variant,
                    "seconds": round(statistics.median(seconds), 4),
                    "least": round(seconds[0], 4),
                    "most": round(seconds[-1], 4),
                    "ratio": round(paired_ratio(of_shape, median_seconds, variant, "reference"), 3),
                    "useful_GFLOP": round(flops / 1e9, 1),
                    "GFLOP/s": round(flops / statistics.median(seconds) / 1e9, 1),
                    "peak_GFLOP/s": round(statistics.median(sample["matmul_peak"] for sample in found) / 1e9, 1),
                    "of_peak": percent(statistics.median(flops / median_seconds(sample) / sample["matmul_peak"] for sample in found)),
                    "others": others_of(found),
                }
            )
    return {"rows": rows, "samples": samples}


def measure_growth(work, options):
    """Seconds of our step with one quantity changed at a time, and the exponents that fit them."""
    frames, height, width = options.shape[0]
    base = step_job(options, "ours", options.shape[0]) | {"batch": 1}
    axes = {
        "frames": {value: base | {"shape": [value, height, width]} for value in options.frames},
        "height = width": {value: base | {"shape": [frames, value, value]} for value in options.sides},
        "rank": {value: base | {"rank": value} for value in options.ranks},
        "batch": {value: base | {"batch": value} for value in options.batches},
    }
    jobs = [job for points in axes.values() for job in points.values()]
    samples, rows, fits = take_turns(options, [job for i, job in enumerate(jobs) if job not in jobs[:i]]), [], []
    for axis, points in axes.items():
        of_axis, seconds, flops, tokens = [], [], [], []
        for value, job in points.items():
            found = select(samples, **job)
            seconds.append(statistics.median(all_seconds(found)))
            flops.append(found[0]["flops"])
            tokens.append(tokens_of(job["shape"]))
            row = {"axis": axis, "value": value, "tokens": tokens[-1], "seconds": round(seconds[-1], 4)}
            of_axis.append(row | {"useful_GFLOP": round(flops[-1] / 1e9, 1), "others": others_of(found)})
        rows += of_axis
        if len(points) > 1:
            exponent, off = fit_exponent(points, seconds)
            fits.append(
                {
                    "axis": axis,
                    "seconds_by_value": round(exponent, 2),
                    "worst_point": percent(off),
                    "seconds_by_tokens": round(fit_exponent(tokens, seconds)[0], 2) if len(set(tokens)) > 1 else "",
                    "GFLOP_by_value": round(fit_exponent(points, flops)[0], 2),
                }
            )
    return {"rows": rows, "fits": fits, "samples": samples}


# -----------------------------------------------------------------------------
# Whole runs


def measure_start(work, options):
    """Seconds from launch to the first step."""
    model, samples, rows = model_folder(work, options, options.size), [], []
    flags = run_flags(options, options.shape[0], 1)
    variants, turns = ("reference", "ours, empty cache", "ours, full cache"), itertools.count()
    cache = ""

    def run(job, threads):
        nonlocal cache
        if job["variant"] == "ours, empty cache":
            cache = f"cache-{job['clips']}-{next(turns)}"  # the full one of the same turn is what it leaves
        return run_variant(work, model, options, flags, job | {"cache": cache}, threads)

    for clips in options.clips:
        of_size = take_turns(options, [{"variant": variant, "clips": clips} for variant in variants], run)
        samples += of_size
        for variant in variants:
            found = select(of_size, variant=variant)
            seconds = sorted(sample["seconds_to_first_step"] for sample in found)
            rows.append(
                {
                    "clips": clips,
                    "variant": variant,
                    "seconds_to_first_step": round(statistics.median(seconds), 2),
                    "least": round(seconds[0], 2),
                    "most": round(seconds[-1], 2),
                    "ratio": round(paired_ratio(of_size, lambda sample: sample["seconds_to_first_step"], variant, "reference"), 2),
                    "others": others_of(found),
                }
            )
    return {"rows": rows, "samples": samples}


def measure_memory(work, options):
    """Peak memory of whole runs of ours and of the baseline, and of ours by clips and processes."""
    rows, samples = compare_memory(work, options) if "runs" in options.part else ([], [])
    growth, more = grow_memory(work, options) if "growth" in options.part else ([], [])
    return {"rows": rows, "growth": growth, "samples": samples + more}


def compare_memory(work, options):
    """(rows, samples) of whole runs of ours and of the baseline: encoding, training and a validation video."""
    clips, model = min(options.clips), model_folder(work, options, options.size)
    flags = run_flags(options, options.shape[0], options.steps)
    flags |= {"validation_prompt": "a white rabbit smiles", "num_inference_steps": 2}
    turns, rows = itertools.count(), []

    def run(job, threads):
        return run_variant(work, model, options, flags, job | {"cache": f"cache-memory-{next(turns)}"}, threads)

    def share(variant, value):
        return percent(1 / paired_ratio(samples, value, variant, "reference"))

    samples = take_turns(options, [{"variant": variant, "clips": clips} for variant in ("reference", "ours")], run)
    for variant in ("reference", "ours"):
        found = select(samples, variant=variant)
        rows.append(
            {
                "variant": variant,
                "clips": clips,
                "peak_mib": round(statistics.median(sample["peak_mib"] for sample in found)),
                "helpers_mib": round(statistics.median(sample["helpers_mib"] for sample in found)),
                "share": share(variant, lambda sample: sample["peak_mib"]),
                "share_with_helpers": share(variant, lambda sample: sample["peak_mib"] + sample["helpers_mib"]),
                "seconds": round(statistics.median(sample["wall_seconds"] for sample in found), 1),
                "others": others_of(found),
            }
        )
    return rows, samples


def grow_memory(work, options):
    """(rows, samples) of ours by clips and processes, on a tiny model: what grows with the clips shows best beside a small one."""
    model, flags = model_folder(work, options, "tiny"), run_flags(options, options.shape[0], 1) | {"rank": SIZES["tiny"]["rank"]}
    plan, rows, samples = list(itertools.product(options.processes, options.clips)), [], []
    for processes, clips in progress(plan, "measuring growth", unit="run"):
        job = {"variant": "ours", "clips": clips, "processes": processes, "cache": f"cache-{processes}-{clips}"}
        measured = run_variant(work, model, options, flags, job, 1)
        samples.append(job | measured | {"turn": None})
        base = select(samples, processes=processes)[0]["peak_mib"]
        rows.append(
            {
                "processes": processes,
                "clips": clips,
                "peak_mib_of_a_process": round(measured["peak_mib"]),
                "ratio": round(measured["peak_mib"] / base, 3),
                "others": percent(measured["others"]),
            }
        )
    return rows, samples


# -----------------------------------------------------------------------------
# Encoding and decoding


def sources_folder(work, options):
    """The folder of files to decode: the one given, or generated ones."""
    if options.data:
        return options.data
    job = {"job": "sources", "source": options.source[0], "clips": options.clips[0], "folder": str(work / "sources"), "fps": options.fps}
    return harness.run_worker(job, options.threads)["folder"]


def measure_encode(work, options):
    """Clips a second of decoding, VAE and T5; a share of the decoder's own speed, or of the matmul peak."""
    common, rows = values_of(options, "size", "precision", "vae", "steps", "clock", "fps") | {"shape": options.shape[0]}, []
    folder = sources_folder(work, options)
    jobs = [{"job": "decode", "folder": folder, "variant": variant} | common for variant in ("ours", "decoder alone")]
    jobs += [{"job": "encode", "variant": variant} | common for variant in ("vae", "t5")]
    samples = take_turns(options, jobs)
    for name, variant in (("decode (1 process)", "ours"), ("VAE encode", "vae"), ("T5", "t5")):
        found = select(samples, variant=variant)
        row = {"part": name, "clips_a_second": round(1 / statistics.median(all_seconds(found)), 3)}
        if variant == "ours":
            share = paired_ratio(samples, median_seconds, "ours", "decoder alone")
            row |= {"GFLOP_a_clip": "", "limit": "decord alone", "of_limit": percent(share)}
        else:
            share = statistics.median(sample["flops"] / median_seconds(sample) / sample["matmul_peak"] for sample in found)
            peak = statistics.median(sample["matmul_peak"] for sample in found) / 1e9
            row |= {"GFLOP_a_clip": round(found[0]["flops"] / 1e9, 1), "limit": f"{peak:.0f} GFLOP/s", "of_limit": percent(share)}
        rows.append(row | {"others": others_of(found)})
    return {"rows": rows, "samples": samples}


def measure_decode(work, options):
    """Clips a second of decoding, ours and others'."""
    variants, rows = ("full size", "reference", "ours", "ours, in reader processes", "decoder alone"), []
    common = {"job": "decode", "folder": sources_folder(work, options), "shape": options.shape[0]}
    common |= values_of(options, "fps", "steps", "clock")
    samples = take_turns(options, [common | {"variant": variant} for variant in variants])
    for variant in variants:
        found = select(samples, variant=variant)
        rows.append(
            {
                "variant": variant,
                "clips_a_second": round(1 / statistics.median(all_seconds(found)), 2),
                "ratio": round(paired_ratio(samples, median_seconds, variant, "reference"), 2),
                "mib_a_clip": round(found[0]["bytes"] / 2**20, 1),
                "others": others_of(found),
            }
        )
    return {"rows": rows, "samples": samples}


# -----------------------------------------------------------------------------
# Several processes


def measure_scale(work, options):
    """Steps of ours on 1, 2, ... processes under each engine; every process trains a batch of its own.

    Rows: seconds a step, bytes given to collectives, memory of tensors. Computed: bytes and seconds on a larger ring of processes.
    """
    common = values_of(options, "size", "precision", "gradient_checkpointing", "steps", "warmup", "training_type")
    common |= {"job": "scale", "result": str(work / "result.json"), "shape": options.shape[0], "rank": rank_of(options)}
    jobs = [
        common | {"engine": engine, "config": CONFIGS[engine], "processes": processes, "variant": f"{engine} x {processes}"}
        for engine, processes in itertools.product(options.engines, options.processes)
    ]
    samples, rows = take_turns(options, jobs, harness.run_workers), []
    for job in jobs:
        engine, processes = job["engine"], job["processes"]
        found = select(samples, engine=engine, processes=processes)
        seconds = statistics.median(all_seconds(found))
        base = statistics.median(all_seconds(select(samples, engine=engine, processes=options.processes[0])))
        payload = found[0]["payload"]
        rows.append(
            {
                "engine": engine,
                "processes": processes,
                "seconds_a_step": round(seconds, 3),
                "clips_a_second": round(processes / seconds, 3),
                "of_the_first_row's": f"{processes / options.processes[0] * base / seconds:.2f}",
                "collectives": payload.get("calls", 0),
                "payload_MiB": spell_payload(payload),
                "sent_MiB": round(sent_on_a_ring(payload, processes) / 2**20, 2),
                "tensors_MiB_a_process": round(max(held for sample in found for held in sample["held_mib"])),
            }
        )
    return {"rows": rows, "computed": compute_clusters(options.engines, samples), "samples": samples}


def compute_clusters(engines, samples):
    """For each engine the bytes that one process sends in a step on the rings of CLUSTERS, computed from the last payload of several."""
    rows = []
    for engine in engines:
        counted = [sample for sample in select(samples, engine=engine) if sample["processes"] > 1]
        for name, (processes, gigabits) in CLUSTERS.items() if counted else ():
            sent = sent_on_a_ring(counted[-1]["payload"], processes)
            row = {"engine": engine, "computed_for": name, "sent_MiB": round(sent / 2**20, 1)}
            rows.append(row | {"seconds_on_the_wire": f"{sent * 8 / gigabits / 1e9:.4f}"})
    return rows


def sent_on_a_ring(payload, processes):
    """Bytes that one of `processes` sends for the counted payloads on a ring, as NCCL uses it for large tensors.

    Patarasuk & Yuan (2009) for all_reduce.
    """
    share = (processes - 1) / processes
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
    return sum(payload.get(kind, 0) * times * share for kind, times in passes.items())


def spell_payload(payload):
    """all_reduce 1.2, all_gather 3.4"""
    parts = [f"{kind} {size / 2**20:.2f}" for kind, size in sorted(payload.items()) if kind != "calls"]
    return ", ".join(parts) or "none"


MEASUREMENTS = {
    "step": measure_step,
    "growth": measure_growth,
    "start": measure_start,
    "memory": measure_memory,
    "encode": measure_encode,
    "decode": measure_decode,
    "scale": measure_scale,
}
