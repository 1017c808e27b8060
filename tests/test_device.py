"""The device of a run: a GPU that torch cannot use ends the run, unless the user wants the CPU. torch.cuda is a stand-in."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogvideox import device, launch
from tests.conftest import ROOT, environment, words
from tests.test_cluster import program
from tools import generate


@pytest.fixture
def machine(monkeypatch):
    """A function that sets what a machine has: a driver for a CUDA version (None: no driver), and a torch build."""

    def has(driver="12.2", built="13.0", usable=False, capability=(8, 0), kernels=("sm_75", "sm_80", "sm_90")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.setattr(device, "NVIDIA_FILES", (sys.executable if driver else "/no/such/file",))
        monkeypatch.setattr(device, "nvidia_smi", lambda *options: "")
        monkeypatch.setattr(device, "driver_cuda_version", lambda: driver or None)
        monkeypatch.setattr(device, "why_not", lambda torch: "Error 802: system not yet initialized")
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(kernels))

    return has


@pytest.mark.parametrize(
    ("facts", "sentences"),
    [
        ({}, ["is built for CUDA 13.0", "supports CUDA 12.2 at most", "install a driver for CUDA 13.0 or newer"]),
        ({"built": None}, ["is built without CUDA", "supports CUDA 12.2", "install a torch build for CUDA 12 "]),
        (
            {"driver": "13.1"},
            ["is built for CUDA 13.0", "supports CUDA 13.1", "(Error 802: system not yet initialized)", "docker run --gpus"],
        ),
        (
            {"usable": True, "capability": (12, 0)},
            ["built for CUDA 13.0, has no kernels for the a GPU (compute capability 12.0", "sm_75, sm_80, sm_90", "CUDA_VISIBLE_DEVICES"],
        ),
    ],
    ids=["an old driver", "a build for CPUs", "a hidden GPU", "no kernels"],
)
def test_a_gpu_that_torch_cannot_use_ends_the_run_with_both_versions_and_the_way_out(machine, capsys, facts, sentences):
    machine(**facts)
    with pytest.raises(SystemExit) as stop:
        launch.check_gpu(False, ["another problem"])
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert told.startswith(f"\nERROR[2]: torch {torch.__version__}")
    assert told.count("ERROR[2]") == 2  # the other problem too
    assert all(sentence in told for sentence in [*sentences, "or give --cpu to train on the CPU"]), told


def test_no_driver_a_usable_gpu_and_the_wish_for_the_cpu_are_no_problem(machine, monkeypatch):
    machine()
    assert device.unusable_gpu()
    assert device.unusable_gpu(cpu=True) is None
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("CUDA_VISIBLE_DEVICES", "")):
        monkeypatch.setenv(name, value)
        assert device.unusable_gpu() is None
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert device.unusable_gpu()
    machine(driver=None)
    assert device.unusable_gpu() is None
    monkeypatch.setattr(device, "nvidia_smi", lambda *options: "GPU 0: a GPU (UUID: GPU-1)\n")  # WSL
    assert device.unusable_gpu()
    machine(usable=True)
    assert device.unusable_gpu() is None


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((12, 0), ["sm_90a", "sm_120"], True),
        ((7, 0), ["sm_75", "compute_120"], False),
    ],
)
def test_kernels_run_on_later_minor_versions_and_as_ptx_on_all_later_gpus(capability, kernels, runs):
    assert device.runs_on(capability, kernels) is runs


@pytest.mark.parametrize("rank", ["0", "8", "9"])
def test_one_process_of_each_machine_tells_of_its_gpu(machine, monkeypatch, capsys, rank):
    """Eight processes a machine; the first machine may be without the fault."""
    machine()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", str(int(rank) % 8))
    with pytest.raises(SystemExit):
        launch.check_gpu(False, [])
    assert capsys.readouterr().err.count("ERROR[2]") == (0 if rank == "9" else 1)


def test_the_cpu_flag_reaches_accelerate_and_hides_the_gpus(monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def fake(**settings):
        seen.append(settings["cpu"])
        raise Stop

    monkeypatch.setattr(launch, "Accelerator", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for cpu in (False, True):
        with pytest.raises(Stop):
            launch.start_processes("no", 1, 7.5, cpu)
    assert seen == [False, True]
    # torch is imported after the flags are read: this one stands for it, and tells what it would see.
    code = "import os, runpy, sys\nsys.modules['torch'] = None\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "except ImportError:\n    print('GPUs:', os.environ.get('CUDA_VISIBLE_DEVICES'))"
    line = [sys.executable, "-c", code, "train_cogvideox_lora.py", *words("m", "d", "o", "c")]
    for more, told in (([], "GPUs: 3\n"), (["--cpu"], "GPUs: \n")):
        settings = environment() | {"CUDA_VISIBLE_DEVICES": "3"}
        done = subprocess.run([*line, *more], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60)
        assert done.stdout == told, done.stderr


def test_the_tool_that_makes_videos_refuses_such_a_gpu_too(machine, capsys):
    machine()
    for more, refused in (([], True), (["--cpu"], False)):
        args = generate.build_parser().parse_args(["--lora", "x", "--prompt", "a", "--pretrained_model_name_or_path", "m", *more])
        assert any("is built for CUDA 13.0" in problem for problem in generate.check_flags(args)) is refused


# The torch of a machine whose driver is too old, in a folder of its own.
TORCH = """
from types import SimpleNamespace
__version__, version = "9.9.0", SimpleNamespace(cuda="99.0")
def init():
    raise RuntimeError("the driver is too old")
cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0, init=init, get_arch_list=lambda: [])
"""
NVIDIA_SMI = "#!/usr/bin/env bash\necho 'GPU 0: a GPU | Driver Version: 535.104.05   CUDA Version: 12.2 |'\n"


def test_the_scripts_do_not_start_one_process_where_the_gpus_cannot_be_used(tmp_path):
    fake = tmp_path / "fake"
    program(fake, "accelerate", "#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    program(fake, "nvidia-smi", NVIDIA_SMI)
    program(fake, "python", f'#!/usr/bin/env bash\nPYTHONPATH={shlex.quote(str(tmp_path))} exec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "torch.py").write_text(TORCH)
    variables = {"PATH": f"{fake}:/usr/bin:/bin", "HOME": str(tmp_path)}

    def start(*words, **more):
        line = ["bash", ROOT / "finetune_multi_gpus_1.sh", *words]
        return subprocess.run(line, env=variables | more, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    done = start()
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR[2]: torch 9.9.0 is built for CUDA 99.0, but this machine's NVIDIA driver supports CUDA "), (
        done.stderr
    )
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    for done in (start("--cpu"), start(CUDA_VISIBLE_DEVICES=""), start(ACCELERATE_USE_CPU="true")):
        assert done.returncode == 0, done.stderr
        assert "--num_processes\n1\n" in done.stdout
        assert "1 process each (the GPUs here)" in done.stderr
    (fake / "nvidia-smi").unlink()
    if not device.has_nvidia_driver():
        assert start().returncode == 0


@pytest.mark.slow
def test_a_run_ends_before_it_reads_the_clips_and_cpu_lets_it_go_on(forked, tiny_model, six_clips, encodings, tmp_path):
    driver = "import cogvideox.device as device\ndevice.NVIDIA_FILES = ('/',)\ndevice.driver_cuda_version = lambda: '12.2'\n"
    line = words(tiny_model, six_clips, tmp_path / "out", encodings)
    codes, output = forked.run(line, processes=2, before=driver)
    assert codes == [2, 2]
    assert output.count("ERROR[2]: torch") == 1
    assert "supports CUDA 12.2" in output
    assert not Path(tmp_path / "out").exists()
    codes, output = forked.run([*line, "--cpu"], processes=2, before=driver)
    assert codes == [0, 0], output[-2000:]
