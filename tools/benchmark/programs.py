"""Whole trainings, ours and the baseline's, seen from outside: seconds to the first step, peak memory. Imports no torch."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from cogvideox.console import fail
from tools.benchmark import harness
from tools.benchmark.harness import ROOT, busy_seconds, environment_of, others_share
from tools.benchmark.sizes import rank_of

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
TRAINER, REFERENCE = "train_cogvideox_lora.py", "tools.benchmark.reference"


# -----------------------------------------------------------------------------
# What runs need


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


def model_folder(work, options, size):
    """The model of whole runs: the one given, or a generated one."""
    if options.model:
        return options.model
    folder, vae = work / f"model-{size}", "small" if size == "tiny" else options.vae
    if not folder.exists():
        harness.run_worker(
            {"job": "model", "size": size, "vae": vae, "precision": options.precision, "folder": str(folder)}, options.threads
        )
    return folder


def run_flags(options, shape, steps):
    """The flags that ours and the baseline share."""
    frames, height, width = shape
    sizes = {"max_num_frames": frames, "height": height, "width": width, "rank": rank_of(options)}
    return sizes | {"max_train_steps": steps, "mixed_precision": options.precision}


def our_flags(options, flags):
    """The shared flags with those that only ours has."""
    return flags | {"report_to": "none", "eval_clips": 0, "gradient_checkpointing": options.gradient_checkpointing}


def reference_flags(options, flags):
    """The shared flags with those that only the baseline has."""
    return flags | ({} if options.gradient_checkpointing == "none" else {"gradient_checkpointing": True})


def command_line(program, values):
    """The command line of a Python program. program: its file, or -m and its module; values: of its flags, True for one without."""
    line = [sys.executable, *program]
    for name, value in values.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def trainer_command(model, clips, output, cache, processes, flags):
    """The command line of a training on one process or several."""
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    paths = {"pretrained_model_name_or_path": model, "instance_data_root": clips, "output_dir": output, "encoding_cache_dir": cache}
    return command_line([*launcher, str(ROOT / TRAINER)], paths | flags)


def reference_command(model, clips, output, flags):
    """The command line of the baseline."""
    paths = {"pretrained_model_name_or_path": model, "instance_data_root": clips, "output_dir": output}
    return command_line(["-m", REFERENCE], paths | flags)


# -----------------------------------------------------------------------------
# Runs


def run_variant(work, model, options, flags, job, threads):
    """Run ours or the baseline as `job` says, in an output folder that is removed again. Returns what `run_program` does."""
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
            fail(1, f"a run ended with code {process.returncode}:\n{log.read().decode(errors='replace')[-2000:]}")
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
        found[process.pid, started] = any(word.endswith(TRAINER) or word == REFERENCE for word in words), peak
    return found
