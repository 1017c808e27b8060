"""Stopping early without losing work: signals, the launcher's death, out of memory, the status file.

The first SIGTERM, SIGINT, SIGHUP (a closed terminal) or SIGUSR1 (Slurm's warning) sets a flag: the run finishes the current
step or clip, all ranks stop together, a checkpoint is written, and the exit code is 128 + the signal's number. A second signal
kills the process at once.
torch is imported inside functions, because `end_with_launcher` runs before the flags are parsed.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from cogvideox.console import rank, warn
from cogvideox.files import write_durably

NOHUP_IS_UNDONE = (
    "nohup does not keep this run from ending with its terminal (it would be saved): torch's launcher listens to SIGHUP again. "
    "Start it with setsid instead of nohup, with PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT before nohup (torch 2.13 knows it), "
    "or with finetune_single_gpu.sh or finetune_multi_gpus_1.sh, which do so"
)
ECHO_SECONDS = 2.0  # Ctrl-C reaches a process twice, from the terminal and from the launcher
received = {"signal": 0, "time": 0.0, "output_dir": None, "launcher": None}


def end_with_launcher():
    """End this process when its launcher dies, and at once on a signal, until `listen` is called.

    A killed launcher would leave its processes behind, each in its own session, still holding the GPU and the folder. A run
    started from a shell must survive the shell, and is not changed.
    """
    # Python raises KeyboardInterrupt only after a wait in C returns: half an hour, if it waits for other ranks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        with contextlib.suppress(OSError, AttributeError, TypeError):  # Linux only
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            received["launcher"] = os.getppid()


def listen(output_dir=None):
    """From now on, record signals instead of dying from them.

    output_dir: the folder of `status.json` if the run is stopped before training.
    """
    received["output_dir"] = output_dir
    if nohup_is_undone():
        warn(NOHUP_IS_UNDONE)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):  # Windows has not all of them
        number = getattr(signal, name, None)
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup: a hang-up is ignored
            signal.signal(number, note)


def nohup_is_undone():
    """Whether nohup started torch's launcher, which listens to SIGHUP all the same and gives it to its processes."""
    armed = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return armed and "TORCHELASTIC_RUN_ID" in os.environ and Path(os.environ.get("_", "")).name == "nohup"  # shells set _


def note(number, frame):
    """The handler, which only records the signal; the run checks `stop_requested` at safe points."""
    now = time.monotonic()
    launcher_died = received["launcher"] not in (None, os.getppid())  # it sends one SIGTERM, which is nobody's second signal
    if launcher_died:
        received["launcher"] = None
    elif received["signal"] and now - received["time"] > ECHO_SECONDS:
        os._exit(128 + number)
    if not received["signal"]:
        received.update(signal=number, time=now)
        text = f"\n{signal.Signals(number).name}: finishing the current step or clip, then saving (send it again to stop at once)\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


def stop_requested():
    """The number of the signal that this process received, or 0."""
    return received["signal"]


def stop_noticed():
    """The number of a signal that this process received or that another rank noticed here, or 0.

    Not a collective, so ranks with unequal work may call it any number of times: the ranks leave a note in the process group's store.
    """
    import torch.distributed as distributed

    if not distributed.is_initialized():
        return stop_requested()
    with contextlib.suppress(RuntimeError):  # the store ends with rank 0
        store = distributed.distributed_c10d._get_default_store()
        if stop_requested():
            store.set("stop", str(stop_requested()))
        elif store.check(["stop"]):
            return int(store.get("stop"))
    return stop_requested()


def raise_if_noticed():
    """Raise InterruptedError if a signal requested a stop, on this rank or another."""
    if number := stop_noticed():
        raise InterruptedError(f"{signal.Signals(number).name} requested a stop")


def stop_requested_anywhere(device):
    """The number of a signal that any rank received, or 0; the same on all ranks. Every rank calls it."""
    import torch
    import torch.distributed as distributed

    number = torch.tensor(stop_requested(), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
    return int(number)


@contextlib.contextmanager
def interruptible(module):
    """In the block, every forward pass of a module raises InterruptedError once a signal has requested a stop.

    For work of minutes that consists of many passes, such as the VAE's tiles: the launcher kills a process 30 seconds after a signal.
    """

    handle = module.register_forward_pre_hook(lambda *_: raise_if_noticed())
    try:
        yield
    finally:
        handle.remove()


def exit_if_requested():
    """End this process if it or another rank received a signal. Call it where all work is on disk."""
    if number := stop_noticed():
        if received["output_dir"] and rank() == 0:
            write_status(received["output_dir"], 128 + number, f"stopped by {signal.Signals(number).name} before training", None)
        raise SystemExit(128 + number)


def exit_if_requested_anywhere(device):
    """`exit_if_requested` on every rank if any rank received a signal. A collective."""
    if number := stop_requested_anywhere(device):
        received["signal"] = number
    exit_if_requested()


def write_status(output_dir, code, reason, step, checkpoint=None, **more):
    """Write `status.json`: how the run ended, because both launchers turn every failure's exit code into 1.

    more: further values.
    """
    content = {"code": code, "reason": reason, "step": step, "checkpoint": str(checkpoint) if checkpoint else None} | more
    with contextlib.suppress(OSError):  # a full disk; the terminal shows the same message
        write_durably(Path(output_dir) / "status.json", json.dumps(content, indent=1).encode())


OUT_OF_MEMORY = """out of memory ({where}). Flags that save memory, the largest saving first:
  --gradient_checkpointing all        keeps the activations of one block instead of all {blocks}
  --base_precision int8               halves the frozen weights; nf4 quarters them; --offload keeps two blocks on the GPU
  --train_batch_size 1                with --gradient_accumulation_steps for the same clips per step
  --max_num_frames, --height, --width activations grow with frames x height x width, attention with its square
  --use_8bit_adam                     quarters the optimizer states
  --rank                              LoRA, gradients and optimizer states are proportional to it
Peak so far: {peak}. {gpus}"""
MORE_GPUS = {
    True: "More GPUs shard the weights further; each still holds the activations of its own clips.",
    False: "With this engine every GPU needs this much, so more GPUs do not help (configs/fsdp2.yaml shards the weights).",
}


# The libraries below torch say it in their own words: CUDA, HIP and NCCL the first; cuBLAS, cuDNN and cuSOLVER a status; the CPU's
# allocator the next. cuBLAS that finds no room for its workspace is "not initialized", and cuDNN without room for any
# of its algorithms says that it does not support the operation.
NO_MEMORY = re.compile(
    r"out of memory|_ALLOC_FAILED|ALLOCATION_FAILED|can't allocate memory|not enough memory"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublas(Lt)?Create|cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"
)


def is_out_of_memory(error):
    """Whether an exception says that the memory of a GPU or of the host was not enough. Not all of them are torch.OutOfMemoryError."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    )


@contextlib.contextmanager
def explained_memory(where, blocks, peak, sharded=False):
    """On an out-of-memory error, print flags that would help. peak: () -> text. sharded: whether the engine shards the weights."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = OUT_OF_MEMORY.format(where=where, blocks=blocks, peak=peak(), gpus=MORE_GPUS[sharded])
        print(f"\nERROR[1]: {advice}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
