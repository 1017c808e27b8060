"""How a run starts: processes, the banner, the output folder, barriers."""

import os
import platform
import re
import shutil
import socket
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import torch.distributed as distributed
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers.training_utils import free_memory
from filelock import FileLock, Timeout

from cogvideox.console import BAD_FLAGS, BAD_OUTPUT, fail, say
from cogvideox.files import LORA_FILE, try_writing

# Their bars would tell of files of a second; ours tell of work of hours.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def start_processes(mixed_precision, gradient_accumulation_steps, timeout_minutes):
    """Make the Accelerator, check that the launcher started what it says it did, and print who takes part.

    The same call serves python, accelerate launch and torchrun, on no GPU (gloo), one or many.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and os.environ.get("RANK", "0") != "0":
        wait_for_main_process()
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        # accelerate's simple launcher drops --num_processes where it finds no GPU, and says nothing.
        say(
            "note: the launcher set MASTER_ADDR but started one process; for several use "
            "--config_file accelerate_config_machine_multi.yaml --num_processes N"
        )
    on_cpu, timeout = not torch.cuda.is_available(), timedelta(minutes=timeout_minutes)
    if on_cpu and started > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        # FSDP2 works on CPUs, but accelerate takes it for GPUs only, and would train with DDP without a word.
        PartialState(cpu=True, timeout=timeout).distributed_type = DistributedType.MULTI_GPU
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    accelerator = Accelerator(
        # Without it, two processes on a CPU machine each believe to be alone; DeepSpeed sees for itself.
        cpu=on_cpu and not with_deepspeed,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[
            # Every trained weight takes part in every step, so nothing has to be searched for. Buffers are position tables, the
            # same everywhere: DDP would send them in every forward pass (the 2B's are 65 MiB in bf16, its gradients 225).
            DistributedDataParallelKwargs(find_unused_parameters=False, gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timeout, **({"backend": "gloo"} if on_cpu and with_deepspeed else {})),
        ],
    )
    if with_deepspeed:
        # Under ZeRO-3 transformers would split T5 while it loads, which is not trained and runs on one process at a time.
        transformers.integrations.unset_hf_deepspeed_config()
    if accelerator.num_processes != started:
        fail(
            BAD_FLAGS,
            f"{started} processes were started but accelerate sees {accelerator.num_processes}: launch with one of the yaml files here",
        )
    device = accelerator.device
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    backend = f", {distributed.get_backend()}" if distributed.is_initialized() else ""
    rank = f"process {accelerator.process_index} of {accelerator.num_processes}"
    say(f"{rank} on {platform.node()}: {device} ({kind}){backend}", on_every_rank=True)
    return accelerator


def wait_for_main_process(seconds=120):
    """Fail with the address where the main process does not answer, instead of waiting half an hour without a word."""
    address, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", 0))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=5):
                return
        except OSError as error:
            reason = error
            time.sleep(1)
    print(
        f"\nERROR[2]: process {os.environ['RANK']} on {platform.node()} got no answer from the main process at {address}:{port} "
        f"in {seconds} seconds ({reason}): check MASTER_ADDR, MASTER_PORT, "
        "the firewall, and NCCL_SOCKET_IFNAME where there are several networks",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(BAD_FLAGS)


def lock_folder(folder):
    """Keep a second run out of a folder for as long as the returned object lives; the system lets go of it when a process is killed.

    Returns None on a file system without locks. Raises Timeout if another run has the folder, OSError if it is not writable.
    """
    lock = FileLock(Path(folder) / ".lock", timeout=0)
    try:
        lock.acquire()
    except NotImplementedError:
        return None
    return lock


def claim_output_dir(args, accelerator, problems):
    """Make --output_dir and keep other runs out of it. Returns the lock, which lasts as long as its object. Every process calls it.

    Ends the run where it is a file, not writable, in use by another run, holds an earlier run that was not asked for, or is not
    shared by all machines. problems: sentences that are printed too in that case.
    """
    output_dir, lock, problem = Path(args.output_dir), None, None
    if accelerator.is_main_process:
        try:
            for flag in ("encoding_cache_dir", "output_dir"):
                tried = f"--{flag} {getattr(args, flag)}"
                try_writing(Path(getattr(args, flag)))
            lock = lock_folder(output_dir)
        except Timeout:
            problem = f"--output_dir {output_dir}: another run is writing there"
        except OSError as error:
            problem = f"{tried}: cannot be written to ({error.strerror})"
        else:
            earlier = holds_earlier_run(output_dir)
            if earlier and not (args.resume_from_checkpoint or args.overwrite_output_dir):
                problem = (
                    f"--output_dir {output_dir}: holds an earlier run ({earlier}); go on with it "
                    "(--resume_from_checkpoint latest), remove it (--overwrite_output_dir), or name another folder"
                )
    found = [problem for problem in broadcast_object_list([problem]) if problem]
    if not found and accelerator.num_processes > 1:
        found = folders_not_shared(accelerator, [("--output_dir", output_dir), ("--encoding_cache_dir", args.encoding_cache_dir)])
    if found:
        fail(BAD_OUTPUT, found + problems)
    return lock


def holds_earlier_run(output_dir):
    """The name of something that would be lost if another run wrote into a folder; None if there is nothing."""
    kept = [path.parent.name for path in sorted(output_dir.glob("checkpoint-*/manifest.json"))] + [LORA_FILE, "transformer"]
    return next((name for name in kept if (output_dir / name).exists()), None)


def remove_earlier_run(output_dir, logging_dir):
    """Delete what a run writes, and nothing else, from a folder that holds one.

    dataset.json and dataset_report.txt stay: the new run's check of the clips has written over them already.
    """
    names = [LORA_FILE, "transformer", "README.md", "report.html", "run.json", "metrics.jsonl", "loss.png", "status.json"]
    names += ["validation", "encoded", "best", logging_dir]
    checkpoints = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+(\.partial|\.abandoned)?", path.name)]
    for path in [*checkpoints, *(output_dir / name for name in names)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def folders_not_shared(accelerator, folders):
    """A sentence for each (flag, folder) that a process cannot see as the main one does. Every process calls it."""
    names = [None]
    if accelerator.is_main_process:
        names = [[Path(folder) / f".shared-{uuid.uuid4().hex}" for _, folder in folders]]
        for name in names[0]:
            name.parent.mkdir(parents=True, exist_ok=True)
            name.touch()
    names = broadcast_object_list(names)[0]
    missing = gather_object([(platform.node(), accelerator.process_index, [not name.exists() for name in names])])
    accelerator.wait_for_everyone()
    problems = []
    for place, (flag, folder) in enumerate(folders):
        if accelerator.is_main_process:
            names[place].unlink(missing_ok=True)
        blind = [f"process {rank} on {host}" for host, rank, lacks in missing if lacks[place]]
        if blind:
            problems.append(f"{flag} {folder}: has to lie on a file system that all machines share; {', '.join(blind)} does not see it")
    return problems


def patient_barrier_maker():
    """A barrier without a deadline, for work that takes one process much longer than another (encoding, validation).

    The collectives of the training loop keep theirs. Returns a function to be called by every process.
    """
    if not distributed.is_initialized():
        return lambda: None
    # gloo even on GPUs: it waits on the CPU, and notices a process that died at once.
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    return lambda: distributed.barrier(group=group)


def peak_memory_gib(device):
    """Peak memory in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def free(device):
    """Give memory back that a model just left."""
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the peaks that are logged are those of training
