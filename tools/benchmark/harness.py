"""How measurements are made: jobs that take turns, each in a process of its own; clocks, medians and tables. Imports no torch.

A job is a dictionary that JSON can hold: `job` names a function of variants.py, `variant` what is compared, the rest says how.
A sample is a job together with what was measured of it and the number of its turn.
"""

import importlib.metadata
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cogvideox.console import fail, progress

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = "tools.benchmark.variants"  # the program that does a job
DISTURBED = 0.1  # share of the CPUs that other processes may use before a sample is called disturbed


# -----------------------------------------------------------------------------
# Processes


def environment_of(threads):
    """The environment of every process that is started here; what PYTHONPATH names stays there, as packages may lie in it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def run_worker(job, threads):
    """Do one job in a process of its own; returns what it measured. Ends the program where that process fails."""
    line = [sys.executable, "-m", WORKER, json.dumps(job)]
    with tempfile.TemporaryFile() as log:
        result = subprocess.run(line, stdout=subprocess.PIPE, stderr=log, env=environment_of(threads), cwd=ROOT, check=False)
        if result.returncode:
            log.seek(0)
            reason = "killed, perhaps for want of memory" if result.returncode == -9 else f"code {result.returncode}"
            name = " ".join(str(job.get(key)) for key in ("job", "variant", "size", "shape") if job.get(key))
            fail(1, f"the process of {name} ended ({reason}):\n{log.read().decode(errors='replace')[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def run_workers(job, threads):
    """Do one job on job["processes"] processes under accelerate and the config file job["config"].

    Returns what the main one wrote to the file job["result"]. Ends the program where one fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / job["config"])]
    line += ["--num_processes", str(job["processes"]), "--main_process_port", str(port), "--module", WORKER, json.dumps(job)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment_of(threads), cwd=ROOT, check=False)
    result = Path(job["result"])
    if done.returncode or not result.exists():
        fail(1, f"{job['variant']} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    measured = json.loads(result.read_text())
    result.unlink()
    return measured


def take_turns(options, jobs, run=None):
    """Run every job once in each of options.repeats turns (A B C A B C ...). Returns the samples.

    run: a function of (job, threads), to what it measured (default: `run_worker`).
    """
    samples = []
    turns = [(turn, job) for turn in range(options.repeats) for job in jobs]
    with progress(turns, f"measuring {options.what}", unit="run") as bar:
        for turn, job in bar:
            bar.set_postfix_str(job["variant"])
            measured = (run or run_worker)(job, options.threads)
            samples.append(job | measured | {"turn": turn})
    return samples


# -----------------------------------------------------------------------------
# Clocks and the machine


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


def busy_seconds():
    """CPU seconds that the machine has spent on anything since it started, all cores together; None where it does not tell."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, interrupt, soft_interrupt, stolen = map(int, fields)
    return (user + nice + system + interrupt + soft_interrupt + stolen) / os.sysconf("SC_CLK_TCK")


def others_share(busy_before, own_seconds, wall_seconds):
    """The share of all CPUs that other processes used in a span of which `own_seconds` were ours; None where that is not known."""
    if busy_before is None:
        return None
    return max(0.0, busy_seconds() - busy_before - own_seconds) / (wall_seconds * os.cpu_count())


def has_fast_bf16():
    """Whether bf16 products are faster than fp32 ones here. A CPU without instructions for them takes eight times as long."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"}) or bool(list(Path("/dev").glob("nvidia[0-9]*")))


def machine_facts(threads=None):
    """What the figures depend on beside the code: {"machine": CPU, cores, threads, versions}."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    kind = (models[0] if models else "CPU") + ("" if has_fast_bf16() else " without bf16 instructions")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers"))
    return {"machine": f"{kind}, {os.cpu_count()} cores, {threads or os.environ.get('OMP_NUM_THREADS', 'all')} threads, {versions}"}


# -----------------------------------------------------------------------------
# Samples and tables


def select(samples, **values):
    """The samples that have these values."""
    return [sample for sample in samples if all(sample[name] == value for name, value in values.items())]


def median_seconds(sample):
    """The median of the seconds of a sample's calls."""
    return statistics.median(sample["seconds"])


def all_seconds(samples):
    """The seconds of all calls of these samples, sorted."""
    return sorted(seconds for sample in samples for seconds in sample["seconds"])


def paired_ratio(samples, value, variant, baseline):
    """The median over the turns of baseline / variant, each the median of value(sample) in that turn."""
    ratios = []
    for turn in sorted({sample["turn"] for sample in samples}):
        values = [statistics.median(map(value, select(samples, turn=turn, variant=name))) for name in (baseline, variant)]
        ratios.append(values[0] / values[1])
    return statistics.median(ratios)


def percent(share):
    """A share as a word for the table."""
    return "?" if share is None else f"{100 * share:.0f} %"


def others_of(samples):
    """The largest share of the CPUs that others used in any of the samples, as a word."""
    known = [sample["others"] for sample in samples if sample["others"] is not None]
    return percent(max(known, default=None)) + (" (disturbed)" if max(known, default=0) > DISTURBED else "")


def fit_exponent(values, costs):
    """(the p of cost = c * value^p, by least squares of the logarithms, and the largest share by which a cost is off that curve)."""
    values, costs = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    slope, intercept = statistics.linear_regression(values, costs)
    off = max(abs(math.expm1(cost - intercept - slope * value)) for value, cost in zip(values, costs, strict=True))
    return slope, off


def table(rows):
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])
