"""Starting a run: processes, the output folder, barriers."""

import errno
import ipaddress
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
import psutil
import torch
import torch.distributed as distributed
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers.training_utils import free_memory
from filelock import FileLock, Timeout

from cogvideox import owned
from cogvideox.console import BAD_FLAGS, BAD_OUTPUT, fail, rank, say, warn, without_line
from cogvideox.device import unusable_gpu
from cogvideox.files import FILE_LIST, LORA_FILE, list_files_in, still_missing, try_writing

# Their bars show short loads; ours show hours of work.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def check_gpu(cpu, problems):
    """End the run if this machine has a GPU that torch cannot use; `problems`, sentences, are printed too. cpu: --cpu.

    Before the processes meet: on several machines a process on a CPU could not join those on GPUs.
    """
    problem = unusable_gpu(cpu)
    end_before_meeting([problem] if problem else [], problems)


def end_before_meeting(own, problems):
    """End the run if this machine has problems of its `own`, sentences; `problems`, the same on all machines, are printed too."""
    if not own:
        return
    if rank() != 0 and os.environ.get("LOCAL_RANK", "0") == "0":  # rank 0 may be on another machine, without them
        print("".join(f"\nERROR[{BAD_FLAGS}]: {platform.node()}: {problem}" for problem in own), file=sys.stderr, flush=True)
    fail(BAD_FLAGS, [*own, *problems])


def use_deterministic_algorithms(wanted):
    """Have torch, cuDNN and cuBLAS use kernels that give the same bits each time, or any. Call it before a GPU starts.

    torch then raises RuntimeError for an operation without such a kernel, and gives attention's backward pass one, but not cuDNN's.
    """
    if wanted and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and only shows who reads such memory
    torch.backends.cudnn.benchmark = False  # it would choose kernels by their time


@without_line("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")  # on a CPU
def start_processes(mixed_precision, gradient_accumulation_steps, timeout_minutes, cpu=False):
    """Create the Accelerator, check the number of processes, and print each process and its device.

    Works with python, accelerate launch and torchrun, on CPUs (gloo) and on one or more GPUs. cpu: whether to leave the GPUs alone.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and os.environ.get("RANK", "0") != "0":
        wait_for_main_process()
    interface = choose_gloo_interface()
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        # accelerate's simple launcher silently drops --num_processes without a GPU.
        say(
            "note: the launcher set MASTER_ADDR but started one process; for several use "
            "--config_file accelerate_config_machine_multi.yaml --num_processes N"
        )
    on_cpu, timeout = cpu or not torch.cuda.is_available(), timedelta(minutes=timeout_minutes)
    if on_cpu and started > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        # FSDP2 works on CPUs, but accelerate allows it on GPUs only, and would silently train with DDP.
        PartialState(cpu=True, timeout=timeout).distributed_type = DistributedType.MULTI_GPU
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    for note in overruled_settings(mixed_precision):
        say(note)
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        # Every rank reads its weights here. With it, transformers may leave T5 empty on all ranks but one (some releases), and
        # accelerate takes each stored tensor for a shard, which the learned positions of an image-to-video model are not.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(
        # Without it, each of two processes on a CPU machine runs alone; DeepSpeed detects the CPU itself.
        cpu=on_cpu and not with_deepspeed,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        dynamo_backend="no",  # --compile decides: accelerate would compile the whole model around the trainer's compiled blocks
        kwargs_handlers=[
            # Every trained weight gets a gradient in every step, so there are no unused parameters. Buffers are position tables,
            # equal on all ranks: DDP would broadcast them in every forward pass (the 2B's are 65 MiB in bf16, its gradients 225).
            DistributedDataParallelKwargs(find_unused_parameters=False, gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timeout, **({"backend": "gloo"} if on_cpu and with_deepspeed else {})),
        ],
    )
    if with_deepspeed:
        # With ZeRO-3 transformers would shard T5 at loading, but T5 is frozen and each rank runs it independently.
        transformers.integrations.unset_hf_deepspeed_config()
    if accelerator.num_processes != started:
        fail(
            BAD_FLAGS,
            f"{started} processes were started but accelerate sees {accelerator.num_processes}: launch with a yaml file of this project",
        )
    device = accelerator.device
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    backend = f", {distributed.get_backend()}" if distributed.is_initialized() else ""
    backend += f", gloo over {interface}" if interface else ""
    place = f"process {accelerator.process_index} of {accelerator.num_processes}"
    say(f"{place} on {platform.node()}: {device} ({kind}){backend}", on_every_rank=True)
    return accelerator


def overruled_settings(mixed_precision, environment=os.environ):
    """A sentence for each setting of a saved accelerate config or of the environment that the flags overrule."""
    notes, precision = [], environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", mixed_precision):
        notes.append(
            f"note: the launcher's mixed precision {precision} is not used; this run computes in {mixed_precision.replace('no', 'fp32')} "
            "(--mixed_precision, or as the model is stored)"
        )
    if (backend := environment.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        notes.append(f"note: the launcher's dynamo backend {backend} is not used; --compile decides")
    if environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        notes.append("note: the config file's fsdp_cpu_ram_efficient_loading is switched off: every process reads the weights itself")
    return notes


def wait_for_main_process(seconds=120):
    """Fail with the address if the main process does not answer, instead of silently waiting for half an hour."""
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
        "the firewall, and NCCL_SOCKET_IFNAME if the machine has several networks",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(BAD_FLAGS)


def choose_gloo_interface(environment=os.environ):
    """On several machines, set GLOO_SOCKET_IFNAME to the interface towards MASTER_ADDR. Returns its name, or None if nothing is set.

    Unset, gloo takes the address of the host's name. On many machines that is a loopback address, which no other machine can
    reach, although NCCL connects (pytorch issue 68726). A value that the user set stays.
    """
    address, started = environment.get("MASTER_ADDR", ""), int(environment.get("WORLD_SIZE", "1"))
    one_machine = started <= int(environment.get("LOCAL_WORLD_SIZE", "1")) or re.match(r"127\.|localhost$|::1$", address)
    if not address or one_machine or environment.get("GLOO_SOCKET_IFNAME"):
        return None
    # On the first machine its own name may be a loopback address: then take the way to all other networks.
    name = interface_towards(address) or interface_towards("1.1.1.1")
    if name is None:
        warn(f"no network interface found towards MASTER_ADDR={address}: if the processes do not meet, set GLOO_SOCKET_IFNAME")
        return None
    environment["GLOO_SOCKET_IFNAME"] = name
    return name


def interface_towards(address):
    """The network interface from which this machine reaches an address; None if it is a loopback interface or there is no route."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # UDP: chooses the route and sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = psutil.net_if_addrs().items()
    names = [name for name, addresses in found if any(one.address.split("%")[0] == own for one in addresses)]
    return names[0] if names and not ipaddress.ip_address(own).is_loopback else None


def lock_folder(folder):
    """Lock a folder against a second run, while the returned object lives; the system releases the lock of a killed process.

    Returns None on a file system without locks. Raises Timeout if another run holds the lock, OSError if the folder is not writable.
    """
    # Its soft locks would survive a killed process, and keep a requeued job out.
    lock = FileLock(Path(folder) / ".lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warn(f"--output_dir {folder}: its file system has no locks ({error.strerror}); do not start a second run there")
        return None
    return lock


def claim_output_dir(args, accelerator, problems):
    """Create --output_dir and lock it. Returns the lock, which must be kept alive. Every rank calls it.

    Ends the run if it is a file, not writable, locked by another run, contains an earlier run that no flag resumes or deletes,
    or is not shared by all machines; then `problems`, sentences, are printed too.
    """
    output_dir, lock, problem = Path(args.output_dir), None, None
    if accelerator.is_main_process:
        try:
            for flag in ("encoding_cache_dir", "output_dir"):
                folder = f"--{flag} {getattr(args, flag)}"
                try_writing(Path(getattr(args, flag)))
            lock = lock_folder(output_dir)
            problem = occupied(args, output_dir)
        except Timeout:
            problem = f"--output_dir {output_dir}: another run is writing there"
        except OSError as error:
            problem = f"{folder}: cannot be written to ({error.strerror})"
    problems_here = [problem for problem in broadcast_object_list([problem]) if problem]
    list_files_in(output_dir)
    if not problems_here and accelerator.num_processes > 1:
        problems_here = folders_not_shared(accelerator, [("--output_dir", output_dir), ("--encoding_cache_dir", args.encoding_cache_dir)])
    if problems_here:
        fail(BAD_OUTPUT, problems_here + problems)
    return lock


def holds_earlier_run(output_dir):
    """The name of a result or checkpoint of an earlier run in a folder, or None."""
    known = owned.listed(output_dir)
    names = [path.parent.name for path in sorted(output_dir.glob("checkpoint-*/manifest.json"))]
    names += [name for name in (LORA_FILE, "transformer/config.json") if name in known]
    return next((name for name in names if (output_dir / name).exists()), None)


def occupied(args, output_dir):
    """Why a run may not write into a folder, as a sentence, or None: an earlier run, or files of somebody else that it would replace.

    Brings the list of runs' files up to date; those of a version without a list are listed now.
    """
    owned.forget_missing_files(output_dir)
    list_files_in(output_dir)
    if owned.holds_files_of_runs(output_dir) and not (output_dir / FILE_LIST).exists():
        owned.adopt_earlier_version(output_dir, args.logging_dir)
    foreign = owned.in_the_way(output_dir, args.training_type)
    if foreign and not (args.resume_from_checkpoint and owned.holds_files_of_runs(output_dir)):
        names = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        return f"--output_dir {output_dir}: holds files that no run wrote and this one would replace ({names}); choose another folder"
    earlier = holds_earlier_run(output_dir)
    if earlier and not (args.resume_from_checkpoint or args.overwrite_output_dir):
        return (
            f"--output_dir {output_dir}: contains an earlier run ({earlier}); resume it "
            "(--resume_from_checkpoint latest), delete it (--overwrite_output_dir), or choose another folder"
        )
    if owned.card_name(output_dir) != owned.CARD:
        say(f"--output_dir {output_dir}: its {owned.CARD} was not written by a run and stays; the model card will be {owned.OTHER_CARD}")
    return None


def remove_earlier_run(output_dir):
    """Delete the files that runs wrote into a folder, and no others.

    dataset.json and dataset_report.txt stay: the new run has already overwritten them.
    """
    for path in [path for path in output_dir.iterdir() if owned.CHECKPOINT.fullmatch(path.name)]:
        shutil.rmtree(path) if path.name.endswith(".partial") and not path.is_symlink() else owned.remove_checkpoint(path)
    owned.remove_files_of_runs(output_dir, keep=("dataset.json", "dataset_report.txt"))


def problem_of_any_rank(problem):
    """The first rank's problem that is not None, the same on every rank. A collective."""
    return next((problem for problem in gather_object([problem]) if problem), None)


def folders_not_shared(accelerator, folders):
    """A sentence for each (flag, folder) that some rank does not share with rank 0. Every rank calls it."""
    names = [None]
    if accelerator.is_main_process:
        names = [[Path(folder) / f".shared-{uuid.uuid4().hex}" for _, folder in folders]]
        for name in names[0]:
            name.parent.mkdir(parents=True, exist_ok=True)
            name.touch()
    names = broadcast_object_list(names)[0]
    missing = still_missing(names)
    missing = gather_object([(platform.node(), accelerator.process_index, [name in missing for name in names])])
    accelerator.wait_for_everyone()
    problems = []
    for number, (flag, folder) in enumerate(folders):
        if accelerator.is_main_process:
            names[number].unlink(missing_ok=True)
        ranks = [f"process {rank} on {host}" for host, rank, lacks in missing if lacks[number]]
        if ranks:
            problems.append(f"{flag} {folder}: must be on a file system that all machines share; {', '.join(ranks)} does not see it")
    return problems


def patient_barrier_maker():
    """A barrier without a timeout, for work that takes one rank much longer than another (encoding, validation).

    The collectives of the training loop keep their timeout. Returns a function that every rank must call.
    """
    if not distributed.is_initialized():
        return lambda: None
    # gloo even on GPUs: it waits on the CPU, and fails at once if a process dies.
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


def peak_memory_text(device, peak=None):
    """The peak as text. On a GPU also what torch reserved, which other programs and the driver see; tensors do not fill all of it.

    peak: GiB, as `peak_memory_gib` returned it earlier (default: now).
    """
    text = f"{peak_memory_gib(device) if peak is None else peak:.2f} GiB"
    if device.type != "cuda":
        return text
    reserved, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    return f"{text} in tensors, {reserved / 2**30:.2f} reserved, of {total / 2**30:.1f}"


def synchronize(device):
    """Wait for the work queued on a GPU; a CPU has none. device: a torch.device or its name."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def free(device):
    """Release the memory of a deleted model."""
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # log the peaks of training only
