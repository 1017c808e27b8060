"""Ending early without losing work: signals, the launcher's death, out of memory, the status file.

The first SIGTERM, SIGINT or SIGUSR1 (Slurm's warning) is only noted; the run finishes the step or the clip at hand, all
processes agree, a checkpoint is written, and the exit code is 128 + the signal's number. A second one ends it at once.
torch is imported where it is needed: `end_with_launcher` runs before the flags are read.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from cogvideox.console import rank
from cogvideox.files import write_durably

ECHO_SECONDS = 2.0  # Ctrl-C reaches a process twice, from the terminal and from the launcher
received = {"signal": 0, "time": 0.0, "output_dir": None}


def end_with_launcher():
    """Let the launcher's death end this process too, and a signal end it at once, until the run listens for signals.

    A launcher that is killed would leave its processes behind, each in a session of its own, with the GPU and the folder
    still taken. A run that was started from a shell has to survive the shell and is left alone.
    """
    # Python would raise KeyboardInterrupt, and not before a wait in C (for the other processes, half an hour) is over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        with contextlib.suppress(OSError, AttributeError, TypeError):  # Linux only
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def listen(output_dir=None):
    """Note signals from now on instead of dying of them. Before there is something to lose, they end the process at once.

    output_dir: where `status.json` goes if a run is stopped before its training.
    """
    received["output_dir"] = output_dir
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # Windows has no SIGUSR1
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), note)


def note(number, frame):
    """The handler. It only writes down which signal came; the run asks `stop_requested` where it is safe to end."""
    now = time.monotonic()
    if received["signal"] and now - received["time"] > ECHO_SECONDS:
        os._exit(128 + number)
    if not received["signal"]:
        received.update(signal=number, time=now)
        text = f"\n{signal.Signals(number).name}: finishing the step or the clip at hand, then saving (again to end at once)\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


def stop_requested():
    """The number of the signal that came to this process, 0 if none did."""
    return received["signal"]


def stop_requested_anywhere(device):
    """The number of a signal that came to any process, the same on all; 0 if none did. Every process calls it."""
    import torch
    import torch.distributed as distributed

    number = torch.tensor(stop_requested(), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
    return int(number)


def exit_if_requested():
    """End this process if a signal came, at a place where nothing that is not on disk would be lost."""
    if number := stop_requested():
        if received["output_dir"] and rank() == 0:
            write_status(received["output_dir"], 128 + number, f"stopped by {signal.Signals(number).name} before training", None)
        raise SystemExit(128 + number)


def write_status(output_dir, code, reason, step, checkpoint=None, **more):
    """`status.json`: how the run ended, for the program that started it. Both launchers turn every exit code into 1.

    more: further values.
    """
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
Peak so far: {peak:.2f} GiB. {gpus}"""
MORE_GPUS = {
    True: "More GPUs shard the weights further; each still holds the activations of its own clips.",
    False: "Every process needs this much: with this engine more GPUs do not help (configs/fsdp2.yaml shards the weights).",
}


@contextlib.contextmanager
def explained_memory(where, blocks, peak, sharded=False):
    """Turn an out-of-memory error into flags that would help. peak: () -> GiB. sharded: whether the engine shards the weights."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error)):
            raise
        words = OUT_OF_MEMORY.format(where=where, blocks=blocks, peak=peak(), gpus=MORE_GPUS[sharded])
        print(f"\nERROR[1]: {words}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
