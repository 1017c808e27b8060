"""What a call costs beside its seconds: FLOPs, bytes given to collectives, memory of tensors; and what the machine can do at most."""

import collections
import functools
import gc
import math
import os
import time

import torch
from diffusers import CogVideoXDDIMScheduler
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cogvideox.launch import synchronize
from tools.benchmark.harness import seconds_of

BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "long": 8, "int": 4}
# What torch calls them: with gloo (CPUs) and with NCCL (GPUs). A gather's recorded input is one process's part.
COLLECTIVES = {"gloo:all_reduce": "all_reduce", "gloo:all_gather": "all_gather", "gloo:broadcast": "broadcast"}
COLLECTIVES |= {"nccl:all_reduce": "all_reduce", "nccl:all_gather": "all_gather", "nccl:broadcast": "broadcast"}
COLLECTIVES |= {"nccl:_all_gather_base": "all_gather"}
# [M, K] x [N, K]^T of layers of the 2B: attention, the feed-forward's two, the captions' projection.
PRODUCTS = ((1024, 1920, 1920), (1024, 1920, 7680), (1024, 7680, 1920), (1024, 4096, 4096))
# 1024 rows do not fill a GPU: the rows of a clip of 49x480x720, and a square that reaches what the makers publish.
GPU_PRODUCTS = ((17776, 1920, 7680), (17776, 7680, 1920), (8192, 8192, 8192))


def waited(call, device):
    """`call`, followed by waiting for the device: a GPU's work goes on after the call has returned."""

    def run():
        result = call()
        synchronize(device)
        return result

    return run


def matmul_peak(dtype, clock="wall", tries=5, budget=3.0, device="cpu"):
    """The fastest matrix product of several shapes that layers have here, in FLOP a second.

    budget: seconds, after which no further shape is tried (a CPU without bf16 instructions takes a minute for all).
    """
    best, started = 0.0, time.perf_counter()
    for rows, inner, columns in PRODUCTS if torch.device(device).type == "cpu" else GPU_PRODUCTS:
        left, right = torch.randn(rows, inner, device=device).to(dtype), torch.randn(columns, inner, device=device).to(dtype).t()
        product = waited(functools.partial(torch.mm, left, right), device)
        product()
        seconds, _ = seconds_of(product, tries, clock)
        best = max(best, 2 * rows * inner * columns / min(seconds))
        if time.perf_counter() - started > budget:
            break
    return best


def flop_counter():
    """torch's counter, taught the attention that CPUs run: it knows that of GPUs only."""

    def forward(query, key, value, *others, out_shape=None, **settings):
        return sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *others, out_shape=None, **settings):
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    on_cpus = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpus)


def count_flops(call):
    """FLOPs of one call; a multiplication with its addition counts as two."""
    with flop_counter() as counter:
        call()
    return counter.get_total_flops()


def step_flops(configs, args, compute_loss, shape):
    """FLOPs of a forward and backward pass in which nothing is recomputed, counted without data and without memory for it.

    configs, args, compute_loss: as `cogvideox.memory.predict` has them. shape: [F', C, H', W'] of the latents.
    """
    from cogvideox import memory  # not at the top: the baseline's process does without our trainer

    layers = memory.layers_of(configs)
    transformer = memory.define_transformer(configs, args, "cpu", layers)
    with memory.counting():
        memory.prepare_transformer(transformer, args, "cpu")
        batch = memory.make_batch(configs, args.train_batch_size, shape)
        constant = memory.constant_inputs(transformer, torch.device("cpu"))(batch)
        dtype = memory.PRECISIONS[args.mixed_precision]
        return count_flops(lambda: compute_loss(transformer, CogVideoXDDIMScheduler(), batch, constant, dtype).mean().backward())


def peak_above(call):
    """The highest sum of allocations above the start, in bytes, that the CPU's allocator reports to the profiler during `call()`."""
    gc.collect()  # what is collected during the call would count as freed by it
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    finally:
        if was_enabled:
            gc.enable()
    found, waiting = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.typed[1].alloc_size))
    total = peak = 0
    for _, size in sorted(found, key=lambda pair: pair[0]):
        total += size
        peak = max(peak, total)
    return peak


def peak_bytes(call, device, resident=0):
    """(allocated, reserved): the peaks of the device's memory during `call()`, in bytes, with what was there before.

    Reserved is what the allocator holds, and what another program cannot have. On a CPU both are what `call` allocates, above the
    `resident` bytes.
    """
    if torch.device(device).type == "cpu":
        peak = resident + peak_above(call)
        return peak, peak
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def count_collectives(step):
    """Bytes given to each kind of collective during one step: all_reduce, reduce_scatter, broadcast what goes in, all_gather what
    comes out. And `calls`, how many there were."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    seen = collections.Counter()
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "c10d::_reduce_scatter_base_":
            seen["reduce_scatter", math.prod(event.shapes()[1]) * BYTES[event.dtypes()[1]]] += 1
        elif event.name() in COLLECTIVES and event.shapes()[0]:
            size = math.prod(event.shapes()[0]) * BYTES[event.dtypes()[0]]
            seen[COLLECTIVES[event.name()], size * (world if COLLECTIVES[event.name()] == "all_gather" else 1)] += 1
    for (kind, size), times in list(seen.items()):
        if kind == "reduce_scatter" and seen["all_reduce", size] >= times:  # which gloo does with an all_reduce of the same size
            seen["all_reduce", size] -= times
    bytes_of = collections.Counter({"calls": sum(seen.values())})
    for (kind, size), times in seen.items():
        bytes_of[kind] += size * times
    return {name: size for name, size in bytes_of.items() if size}


def tensors_mib():
    """MiB of all tensors that live in this process between two steps: weights, optimizer states, tables; not activations."""
    sizes = {}
    for held in gc.get_objects():
        # Not `isinstance`, which asks lazy modules for their class. A DTensor's part is a tensor of its own.
        if issubclass(type(held), torch.Tensor) and not issubclass(type(held), DTensor) and held.device.type != "meta":
            storage = held.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values()) / 2**20
