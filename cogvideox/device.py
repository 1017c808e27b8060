"""Which device a run gets: whether torch can use this machine's GPUs, and if not, why.

As a program it prints how many processes a machine gets, one per GPU, for cogvideox/cluster.sh; --cpu: one. Its problems end it
with exit code 2. No imports of this project, and torch only where it is needed: the trainer hides the GPUs before it imports torch.
"""

import ctypes
import glob
import os
import re
import shutil
import subprocess
import sys

# Signs of an NVIDIA driver; a container that was started without its GPUs has the second only.
NVIDIA_FILES = ("/dev/nvidia[0-9]*", "/proc/driver/nvidia/version")


def cpu_is_wanted(flag=False, environment=os.environ):
    """Whether the user wants the CPU: by --cpu, by `use_cpu: true` in accelerate's config file, or by hiding all GPUs."""
    by_config = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return flag or by_config or environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")


def hide_gpus():
    """Hide the GPUs from torch and from all libraries of this process. Call it before torch first asks for a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def unusable_gpu(cpu=False):
    """A sentence if this machine has an NVIDIA GPU that torch cannot use, else None. cpu: whether the user wants the CPU.

    Otherwise the run would silently take the CPU, some hundred times slower.
    """
    import torch

    if cpu or cpu_is_wanted():
        return None
    if torch.cuda.is_available():
        return unsupported_gpu(torch)
    if not has_nvidia_driver():
        return None
    driver, name = driver_cuda_version(), f"torch {torch.__version__}"
    says = f"this machine's NVIDIA driver supports CUDA {driver}" if driver else "this machine has an NVIDIA driver"
    if torch.version.cuda is None:
        fitting = f"install a torch build for CUDA {driver.split('.')[0]} (pytorch.org)" if driver else "install a torch build for CUDA"
        return f"{name} is built without CUDA, but {says}: {fitting}, or give --cpu to train on the CPU"
    name += f" is built for CUDA {torch.version.cuda}"
    if driver and int(driver.split(".")[0]) < int(torch.version.cuda.split(".")[0]):
        newer = f"install a driver for CUDA {torch.version.cuda} or newer, or a torch build for CUDA {driver.split('.')[0]} (pytorch.org)"
        return f"{name}, but {says} at most: {newer}, or give --cpu to train on the CPU"
    return (
        f"{name} and {says}, but torch cannot use a GPU ({why_not(torch)}): make nvidia-smi list it (in a container: start it "
        "with its GPUs, such as docker run --gpus all), or give --cpu to train on the CPU"
    )


def unsupported_gpu(torch):
    """A sentence if this torch build has no kernels for a visible GPU, else None."""
    kernels = torch.cuda.get_arch_list()
    for number in range(torch.cuda.device_count()):
        if kernels and not runs_on(torch.cuda.get_device_capability(number), kernels):
            name, (major, minor) = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
            return (
                f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, has no kernels for the {name} (compute capability "
                f"{major}.{minor}; it has {', '.join(kernels)}): install a torch build that has them (pytorch.org), "
                "choose another GPU with CUDA_VISIBLE_DEVICES, or give --cpu to train on the CPU"
            )
    return None


def runs_on(capability, kernels):
    """Whether kernels such as sm_80 and compute_90 run on a GPU of this (major, minor) compute capability.

    Binary code (sm) runs on its own major version from its minor version on, PTX (compute) on every later GPU; CUDA C++ programming
    guide, "Binary compatibility" and "PTX compatibility".
    """
    for kernel in kernels:
        if match := re.match(r"(sm|compute)_(\d+)(\d)", kernel):
            built = int(match[2]), int(match[3])
            if built <= capability and (match[1] == "compute" or built[0] == capability[0]):
                return True
    return False


def has_nvidia_driver():
    """Whether this machine has an NVIDIA driver with a GPU."""
    if any(glob.glob(pattern) for pattern in NVIDIA_FILES):
        return True
    return "GPU " in nvidia_smi("-L")  # WSL has neither file


def nvidia_smi(*options):
    """What nvidia-smi prints, or "" if there is none or it fails."""
    if not shutil.which("nvidia-smi"):
        return ""
    try:
        done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def driver_cuda_version():
    """The newest CUDA version that the driver supports, such as 12.2, or None."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return f"{version.value // 1000}.{version.value % 1000 // 10}"
    except (OSError, AttributeError):  # a container without the driver's libraries
        pass
    match = re.search(r"CUDA[\w ]*Version\s*:\s*(\d+\.\d+)", nvidia_smi())
    return match[1] if match else None


def why_not(torch):
    """torch's own reason for not using a GPU."""
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError, AssertionError and torch's own
        return str(error).strip().splitlines()[0][:200].rstrip(". ")
    return "it finds none"


if __name__ == "__main__":
    if cpu_is_wanted("--cpu" in sys.argv):
        print(1)
    elif problem := unusable_gpu():
        print(f"ERROR[2]: {problem}", file=sys.stderr)
        raise SystemExit(2)
    else:
        import torch

        print(max(1, torch.cuda.device_count()))
