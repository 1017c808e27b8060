"""Ending early without losing work: signals, out of memory, the status file.

The first SIGTERM, SIGINT or SIGUSR1 (Slurm's warning) is only noted; the run finishes the step or the clip at hand, all
processes agree, a checkpoint is written, and the exit code is 128 + the signal's number. A second one ends it at once.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as distributed

from cogvideox.files import write_durably

ECHO_SECONDS = 2.0  # Ctrl-C reaches a process twice, from the terminal and from the launcher
received = {"signal": 0, "time": 0.0, "output_dir": None}


def listen(output_dir=None):
    """Note signals from now on instead of dying of them. Before there is something to lose, they end the process at once.

    output_dir: where to leave word of a run that is stopped before its training.
    """
    received["output_dir"] = output_dir
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # Windows has no SIGUSR1
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), note)


def note(number, frame):
    """The handler. It only writes down what came: whoever is at a safe place asks `wanted`."""
    now = time.monotonic()
    if received["signal"] and now - received["time"] > ECHO_SECONDS:
        os._exit(128 + number)
    if not received["signal"]:
        received.update(signal=number, time=now)
        text = f"\n{signal.Signals(number).name}: finishing what is at hand, then saving (again to end at once)\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


def wanted():
    """The number of the signal that came to this process, 0 if none did."""
    return received["signal"]


def agreed(device):
    """The number of a signal that came to any process, the same on all; 0 if none did. Every process calls it."""
    number = torch.tensor(wanted(), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
    return int(number)


def leave_if_wanted():
    """End this process if a signal came, at a place where nothing that is not on disk would be lost."""
    if wanted():
        if received["output_dir"] and int(os.environ.get("RANK", "0")) == 0:
            write_status(received["output_dir"], 128 + wanted(), f"stopped by {signal.Signals(wanted()).name} before training", None)
        raise SystemExit(128 + wanted())


def write_status(output_dir, code, reason, step, checkpoint=None, **more):
    """`status.json`: how the run ended, for whoever started it. Both launchers turn every exit code into 1. more: further values."""
    content = {"code": code, "reason": reason, "step": step, "checkpoint": str(checkpoint) if checkpoint else None} | more
    with contextlib.suppress(OSError):  # a full disk; the message on the terminal says the same
        write_durably(Path(output_dir) / "status.json", json.dumps(content, indent=1).encode())


OUT_OF_MEMORY = """out of memory ({where}). In the order of what they save:
  --gradient_checkpointing all        activations of one block instead of all {blocks}
  --base_precision int8               half of the frozen weights; nf4 a quarter; --offload all but what one layer needs
  --train_batch_size 1                and --gradient_accumulation_steps for the same clips a step
  --max_num_frames, --height, --width activations grow with frames x height x width, attention with its square
  --use_8bit_adam                     a quarter of the optimizer's state
  --rank                              LoRA, gradients and optimizer state are proportional to it
Peak so far: {peak:.2f} GiB. Every process needs this much: more GPUs do not help."""


@contextlib.contextmanager
def explained_memory(where, blocks, peak):
    """Turn an out-of-memory error into flags that would help. peak: () -> GiB."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(f"\nERROR[1]: {OUT_OF_MEMORY.format(where=where, blocks=blocks, peak=peak())}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what the CPU allocator says
            raise
        print(f"\nERROR[1]: {OUT_OF_MEMORY.format(where=where, blocks=blocks, peak=peak())}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
