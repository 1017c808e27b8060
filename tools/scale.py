"""What more processes cost and bring, for `python -m tools.benchmark scale`: seconds a step, bytes sent, memory of each process.

The bytes are counted by torch's profiler: every collective of one optimizer step, with the size of what it is given. How
many of them a process sends follows from the ring that NCCL uses for large tensors; what that means for more machines
than there are here is computed from it, and marked so.
"""

import collections
import contextlib
import gc
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.benchmark import ROOT, SIZES, environment_of, machine_facts, now, of_kind, our_step, take_turns

CONFIGS = {
    "ddp": "accelerate_config_machine_multi.yaml",
    "fsdp2": "configs/fsdp2.yaml",
    "zero2": "configs/zero2.yaml",
    "zero3": "configs/zero3.yaml",
}
BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "long": 8, "int": 4}
KINDS = {"gloo:all_reduce": "all_reduce", "gloo:all_gather": "all_gather", "gloo:broadcast": "broadcast"}
# What is computed: name -> (processes, Gbit/s of the slowest link that a ring of them has, one way, for each process).
TARGETS = {"8 GPUs, NVLink 2400 Gbit/s": (8, 2400), "16 nodes x 8 GPUs, 100 Gbit/s a GPU": (128, 100)}


# -----------------------------------------------------------------------------
# In each process


def time_scale(job):
    """Measure seconds of steps, the bytes given to collectives in one of them, and what each process holds; the main one writes them."""
    import torch.distributed as distributed

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        step, checkpoint = our_step(job, Path(folder))
        checkpoint()
        for _ in range(job["warmup"]):
            step()
        counted = count_collectives(step)
        seconds = []
        for _ in range(job["steps"]):
            before = now("wall")
            step()
            seconds.append(now("wall") - before)
        held = [tensors_mib()]
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            held = [None] * distributed.get_world_size()
            distributed.all_gather_object(held, tensors_mib())
            distributed.barrier()
    if os.environ.get("RANK", "0") == "0":  # lines of several processes on one output get mixed
        Path(job["result"]).write_text(json.dumps({"seconds": seconds, "payload": counted, "held_mib": held} | machine_facts()))


def tensors_mib():
    """MiB of all tensors that live in this process between two steps: weights, optimizer states, tables; not activations."""
    import torch
    from torch.distributed.tensor import DTensor

    sizes = {}
    for thing in gc.get_objects():
        # Not `isinstance`, which asks lazy modules for their class. A DTensor's part is a tensor of its own.
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), DTensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values()) / 2**20


def count_collectives(step):
    """Bytes given to each kind of collective during one step: all_reduce, reduce_scatter, broadcast what goes in, all_gather what
    comes out. And `calls`, how many there were."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    seen = collections.Counter()
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "c10d::_reduce_scatter_base_":
            seen["reduce_scatter", math.prod(event.shapes()[1]) * BYTES[event.dtypes()[1]]] += 1
        elif event.name() in KINDS and event.shapes()[0]:
            size = math.prod(event.shapes()[0]) * BYTES[event.dtypes()[0]]
            seen[KINDS[event.name()], size * (world if event.name() == "gloo:all_gather" else 1)] += 1
    for (kind, size), times in list(seen.items()):
        if kind == "reduce_scatter":  # which gloo does with an all_reduce of the same size
            seen["all_reduce", size] -= times
    bytes_of = collections.Counter({"calls": sum(seen.values())})
    for (kind, size), times in seen.items():
        bytes_of[kind] += size * times
    return {name: size for name, size in bytes_of.items() if size}


def sent_on_a_ring(payload, processes):
    """Bytes that one of `processes` sends on a ring for the payloads that were counted (Patarasuk & Yuan, 2009, for all_reduce)."""
    share = (processes - 1) / processes
    kinds = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
    return sum(payload.get(kind, 0) * times * share for kind, times in kinds.items())


# -----------------------------------------------------------------------------
# The measurement


def run_processes(job, threads):
    """Do a job on several processes under an engine; returns what the main one measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / CONFIGS[job["engine"]]),
        "--num_processes",
        str(job["processes"]),
    ]
    line += ["--main_process_port", str(port), "--module", "tools.benchmark", "worker", json.dumps(job)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment_of(threads), cwd=ROOT, check=False)
    result = Path(job["result"])
    if done.returncode or not result.exists():
        raise SystemExit(f"ERROR: {job['variant']} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    measured = json.loads(result.read_text())
    result.unlink()
    return measured


def measure_scale(work, options):
    """Steps of ours on 1, 2, ... processes under each engine; every process trains a batch of its own."""
    common = {name: getattr(options, name) for name in ("size", "precision", "gradient_checkpointing", "steps", "warmup", "training_type")}
    common |= {"result": str(work / "result.json")}
    common |= {"job": "scale", "shape": options.shape[0], "rank": options.rank or SIZES[options.size]["rank"], "variant": "ours"}
    plans = [(engine, processes) for engine in options.engines for processes in options.processes]
    jobs = [common | {"engine": e, "processes": n, "variant": f"{e} x {n}"} for e, n in plans]
    samples, rows, computed = take_turns(options, jobs, run_processes), [], []
    for engine, processes in plans:
        mine = of_kind(samples, engine=engine, processes=processes)
        seconds = statistics.median(value for s in mine for value in s["seconds"])
        alone = of_kind(samples, engine=engine, processes=options.processes[0])
        base = statistics.median(value for s in alone for value in s["seconds"])
        payload = mine[0]["payload"]
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
                "tensors_MiB_a_process": round(max(held for one in mine for held in one["held_mib"])),
            }
        )
    for engine in options.engines:
        counted = [s for s in of_kind(samples, engine=engine) if s["processes"] > 1]
        for name, (processes, gbits) in TARGETS.items():
            if counted:
                sent = sent_on_a_ring(counted[-1]["payload"], processes)
                row = {"engine": engine, "computed_for": name, "sent_MiB": round(sent / 2**20, 1)}
                computed.append(row | {"seconds_on_the_wire": f"{sent * 8 / gbits / 1e9:.4f}"})
    return {"rows": rows, "computed": computed, "samples": samples}


def spell_payload(payload):
    """all_reduce 1.2, all_gather 3.4"""
    parts = [f"{kind} {size / 2**20:.2f}" for kind, size in sorted(payload.items()) if kind != "calls"]
    return ", ".join(parts) or "none"
