"""The launchers: python, torchrun, accelerate launch, the shipped scripts, the guide's command; one process and two."""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from cogvideox.files import read_json_lines
from tests.conftest import ROOT, STEADY_ADAM, STEADY_BOUND, environment, lora_of, same, words
from tests.forked import free_port
from tests.stand_ins import LateNames, OneProcess

SMALL = words("MODEL", "DATA", "OUT", "CACHE")[8:]  # the size and the flags that make a run short
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_cogvideox_lora.py"]


def run(command, timeout=240, **variables):
    """Run a command in the repository; returns (exit code, output)."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    return done.returncode, done.stdout


def variables(model, data, output, cache, **more):
    """The shell scripts' variables."""
    return {"MODEL_PATH": str(model), "DATASET_PATH": str(data), "OUTPUT_PATH": str(output), "CACHE_PATH": str(cache), **more}


def worst_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, tiny_model, six_clips, encodings):
    """Runs of one process with batches of two clips, and with another seed."""
    from accelerate.state import AcceleratorState, GradientState

    import train_cogvideox_lora as script

    outputs = []
    for seed in (42, 43):
        outputs.append(tmp_path_factory.mktemp("one") / "run")
        flags = {"train_batch_size": 2, "max_train_steps": 4, "validation_prompt": "a rabbit:::a bird", "seed": seed} | STEADY_ADAM
        script.main(script.parse_args(words(tiny_model, six_clips, outputs[-1], encodings, **flags)))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return outputs


@pytest.mark.numeric
@pytest.mark.slow
def test_two_processes_train_what_one_does_and_resume_bit_for_bit(forked, tiny_model, six_clips, tmp_path, one_process):
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_prompt": "a rabbit:::a bird"} | STEADY_ADAM
    code, output = run([*TORCHRUN, *words(tiny_model, six_clips, tmp_path / "two", tmp_path / "cache", **flags)])
    assert code == 0, output[-3000:]
    assert "process 0 of 2" in output
    assert "process 1 of 2" in output
    assert "gloo" in output
    two, (one, other) = lora_of(tmp_path / "two"), map(lora_of, one_process)
    assert worst_difference(two, one) < STEADY_BOUND
    assert worst_difference(two, other) > 1e-3
    made = {p.name for p in (tmp_path / "two/validation/step-000004").glob("*.mp4")}
    assert made == {p.name for p in (one_process[0] / "validation/step-000004").glob("*.mp4")}
    assert len(made) == 2
    losses = [[line["loss"] for line in read_json_lines(f / "metrics.jsonl") if "loss" in line] for f in (tmp_path / "two", one_process[0])]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    (tmp_path / "two/checkpoint-4/manifest.json").unlink()
    line = words(tiny_model, six_clips, tmp_path / "two", tmp_path / "cache", resume_from_checkpoint="latest", **flags)
    codes, output = forked.run(line, processes=2)
    assert codes == [0, 0], output[-3000:]
    assert "checkpoint-2, step 2" in output
    assert same(lora_of(tmp_path / "two"), two)


@pytest.mark.numeric
@pytest.mark.slow
def test_the_noise_of_two_processes_differs(forked, tiny_model, six_clips, encodings, tmp_path):
    """Two processes with one clip each must not train what one process with one clip does."""
    for processes in (1, 2):
        line = words(tiny_model, six_clips, tmp_path / f"run-{processes}", encodings, max_train_steps=1)
        codes, output = forked.run(line, processes)
        assert codes == [0] * processes, output[-3000:]
    assert worst_difference(lora_of(tmp_path / "run-1"), lora_of(tmp_path / "run-2")) > 1e-4


@pytest.mark.numeric
@pytest.mark.slow
def test_the_multi_gpu_script_runs_two_processes_on_one_machine(tiny_model, six_clips, tmp_path, one_process):
    settings = variables(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache", GPUS_PER_NODE="2", MASTER_PORT=str(free_port()))
    code, output = run(["bash", "finetune_multi_gpus_1.sh", *SMALL, *MATCHING], **settings)
    assert code == 0, output[-3000:]
    assert "process 1 of 2" in output
    assert worst_difference(lora_of(tmp_path / "out"), lora_of(one_process[0])) < STEADY_BOUND


# What the scripts set and the reference run does not.
MATCHING = ["--max_train_steps", "4", "--lora_alpha", "4", "--mixed_precision", "no", "--seed", "42", "--validation_steps", "9"]
MATCHING += ["--adam_epsilon", str(STEADY_ADAM["adam_epsilon"])]


@pytest.mark.numeric
@pytest.mark.slow
def test_the_multi_gpu_script_runs_as_two_machines(tiny_model, six_clips, tmp_path, one_process):
    """The first is told its place by its user, the second by Kubernetes, as a pod of a PyTorchJob."""
    port = str(free_port())
    settings = variables(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache", GPUS_PER_NODE="1", MASTER_PORT=port)
    settings["MASTER_ADDR"] = "127.0.0.1"
    places = ({"NNODES": "2", "NODE_RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "1"})
    nodes = [
        subprocess.Popen(
            ["bash", "finetune_multi_gpus_1.sh", *SMALL, *MATCHING],
            cwd=ROOT,
            env=environment() | settings | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in places
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    assert "process 0 of 2" in outputs[0]
    assert "process 1 of 2" in outputs[1]
    assert "machine 1 of 2 (RANK, WORLD_SIZE)" in outputs[1]
    assert worst_difference(lora_of(tmp_path / "out"), lora_of(one_process[0])) < STEADY_BOUND


GUIDE = """
accelerate launch --config_file accelerate_config_machine_single.yaml --multi_gpu \\
train_cogvideox_lora.py \\
--pretrained_model_name_or_path THUDM/CogVideoX-2b \\
--cache_dir ~/.cache \\
--enable_tiling \\
--enable_slicing \\
--instance_data_root ~/disney/ \\
--caption_column prompts.txt \\
--video_column videos.txt \\
--validation_prompt "Mickey with the captain and friends:::Mickey and the bear" \\
--validation_prompt_separator ::: \\
--num_validation_videos 1 \\
--validation_epochs 2 \\
--seed 3407 \\
--rank 128 \\
--mixed_precision bf16 \\
--output_dir cogvideox-lora-single-gpu \\
--height 480 \\
--width 720 \\
--fps 8 \\
--max_num_frames 49 \\
--skip_frames_start 0 \\
--skip_frames_end 0 \\
--train_batch_size 1 \\
--num_train_epochs 10 \\
--checkpointing_steps 500 \\
--gradient_accumulation_steps 1 \\
--learning_rate 1e-4 \\
--optimizer AdamW \\
--adam_beta1 0.9 \\
--adam_beta2 0.95 """


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_guides_long_command_runs_as_it_stands(tiny_model, six_clips, tmp_path):
    """On a copy of the repository's files, with the home folder, the model's hub cache and the clips where it says."""
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(six_clips, home / "disney")
    snapshot = home / ".cache/models--THUDM--CogVideoX-2b/snapshots/abc"
    shutil.copytree(tiny_model, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("abc")
    here.mkdir()
    for name in ("train_cogvideox_lora.py", "dataset.py", "accelerate_config_machine_single.yaml"):
        shutil.copy(ROOT / name, here)
    shutil.copytree(ROOT / "cogvideox", here / "cogvideox")
    short = "--height 32 --width 48 --max_num_frames 9 --num_inference_steps 2 --num_train_epochs 2"
    settings = environment() | {"HOME": str(home), "PYTHONPATH": ""}
    done = subprocess.run(
        ["bash", "-c", f"cd {shlex.quote(str(here))} && {GUIDE} {short}"], env=settings, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 0 of 1" in done.stderr
    output = here / "cogvideox-lora-single-gpu"
    assert all(t.shape[0] == 128 for name, t in lora_of(output).items() if ".lora_A." in name)
    assert {p.name for p in (output / "validation").iterdir()} == {"step-000000", "step-000012"}  # 2 epochs of 6 clips
    flags = json.loads((output / "checkpoint-12/manifest.json").read_text())["flags"]
    assert (flags["seed"], flags["mixed_precision"], flags["adam_beta2"]) == (3407, "bf16", 0.95)


def test_both_yaml_files_load_in_accelerate_and_describe_what_they_run():
    from accelerate.commands.config.config_args import load_config_from_file

    for name, processes in (("single", 1), ("multi", 8)):
        path = ROOT / f"accelerate_config_machine_{name}.yaml"
        config = load_config_from_file(str(path))
        assert (config.num_processes, config.num_machines, str(config.distributed_type).split(".")[-1]) == (processes, 1, "MULTI_GPU")
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"


@pytest.mark.slow
def test_processes_that_do_not_see_each_other_are_refused(forked, tiny_model, six_clips, tmp_path):
    """A launcher that starts two trainers which each believe to be alone would let both write one folder."""
    alone = "import cogvideox.launch as launch\nclass Alone(launch.Accelerator):\n    num_processes = 1\nlaunch.Accelerator = Alone\n"
    codes, output = forked.run(words(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache"), processes=2, before=alone)
    assert codes == [2, 2]
    assert "2 processes were started but accelerate sees 1" in output
    assert not (tmp_path / "out").exists()


def test_the_process_timeout_reaches_the_process_group(monkeypatch):
    from cogvideox import launch

    seen = {}

    class Stop(Exception):
        pass

    def fake(**settings):
        seen.update(settings)
        raise Stop

    monkeypatch.setattr(launch, "Accelerator", fake)
    with pytest.raises(Stop):
        launch.start_processes("no", 1, 7.5)
    timeouts = [h.timeout.total_seconds() for h in seen["kwargs_handlers"] if hasattr(h, "timeout")]
    assert timeouts == [450]
    assert seen["cpu"] is not torch.cuda.is_available()


def test_the_trainer_overrules_a_saved_configs_precision_dynamo_and_partial_loading_and_it_is_told():
    from cogvideox.launch import overruled_settings

    def told(precision, **environment):
        return overruled_settings(precision, {f"ACCELERATE_{name}": value for name, value in environment.items()})

    [note] = told("no", MIXED_PRECISION="bf16")
    assert "mixed precision bf16 is not used; this run computes in fp32" in note
    [note] = told("bf16", MIXED_PRECISION="fp8", DYNAMO_BACKEND="no")
    assert "fp8 is not used; this run computes in bf16" in note
    [note] = told("bf16", MIXED_PRECISION="bf16", DYNAMO_BACKEND="EAGER")
    assert "dynamo backend EAGER is not used" in note
    assert told("bf16", MIXED_PRECISION="no") == told("no") == []
    [note] = overruled_settings("no", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})
    assert "fsdp_cpu_ram_efficient_loading is switched off" in note
    assert overruled_settings("no", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}) == []


@pytest.mark.slow
def test_a_precision_in_the_environment_does_not_change_what_is_trained(forked, tiny_model, six_clips, encodings, tmp_path):
    results = {}
    for name, flags, settings in (
        ("plain", {}, {}),
        ("saved", {}, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "EAGER"}),
        ("flag", {"mixed_precision": "bf16"}, {}),
    ):
        line = words(tiny_model, six_clips, tmp_path / name, encodings, **({"mixed_precision": "no"} | flags))
        codes, output = forked.run(line, **settings)
        assert codes == [0], output[-3000:]
        assert ("bf16 is not used" in output) is (name == "saved")
        results[name] = lora_of(tmp_path / name)
    assert same(results["plain"], results["saved"])
    assert not same(results["plain"], results["flag"])


@pytest.fixture
def network(monkeypatch):
    """A function that sets which of this machine's addresses leads to each address; eth0, ib0 and lo have one each."""
    from cogvideox import launch

    def has(**routes):
        class Probe(contextlib.nullcontext):
            def __init__(self, *kind):
                pass

            def __enter__(self):
                return self

            def connect(self, target):
                if target[0] not in routes:
                    raise OSError(errno.ENETUNREACH, "no route")
                self.own = routes[target[0]]

            def getsockname(self):
                return self.own, 40000

        addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "fe80::7%ib0"}
        monkeypatch.setattr(launch.socket, "socket", Probe)
        monkeypatch.setattr(launch.socket, "getaddrinfo", lambda name, port, type: [(0, type, 0, "", (name, port))])
        monkeypatch.setattr(
            launch.psutil, "net_if_addrs", lambda: {name: [SimpleNamespace(address=address)] for name, address in addresses.items()}
        )

    return has


@pytest.mark.parametrize(
    ("address", "route", "name"),
    [
        ("10.0.0.1", "10.0.0.5", "eth0"),
        ("fe80::1", "fe80::7", "ib0"),
        ("node01", "127.0.0.1", "eth0"),  # the first machine's own name, a loopback address: the way out of this machine
    ],
)
def test_gloo_takes_the_interface_towards_the_main_machine(network, address, route, name):
    from cogvideox import launch

    network(**{address: route, "1.1.1.1": "10.0.0.5"})
    machines = {"MASTER_ADDR": address, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert launch.choose_gloo_interface(machines) == machines["GLOO_SOCKET_IFNAME"] == name


def test_gloo_is_left_alone_on_one_machine_where_the_user_has_chosen_and_without_a_route(network, capsys):
    from cogvideox import launch

    network(**{"10.0.0.1": "10.0.0.5", "127.0.0.1": "127.0.0.1"})
    machines = {"MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for change in ({"LOCAL_WORLD_SIZE": "4"}, {"MASTER_ADDR": "127.0.0.1"}, {"GLOO_SOCKET_IFNAME": "ib0"}, {"MASTER_ADDR": ""}):
        variables = machines | change
        assert launch.choose_gloo_interface(variables) is None
        assert variables == machines | change
    assert capsys.readouterr().err == ""
    assert launch.choose_gloo_interface(machines | {"MASTER_ADDR": "10.9.9.9"}) is None
    assert "no network interface found towards MASTER_ADDR=10.9.9.9: if the processes do not meet, set GLOO_SOCKET_IFNAME" in (
        capsys.readouterr().err
    )


# Tells on which addresses a process listens once the barrier's group is there: gloo's own, and that of the store.
LISTENING = """
import psutil
import cogvideox.launch as launch
make = launch.patient_barrier_maker
def told():
    barrier = make()
    addresses = {one.laddr.ip for one in psutil.Process().net_connections() if one.status == 'LISTEN'}
    print('listens on:', *sorted(addresses), flush=True)
    return barrier
launch.patient_barrier_maker = told
"""


@pytest.mark.slow
def test_processes_on_two_machines_meet_on_the_network_between_them(forked, tiny_model, six_clips, encodings, tmp_path):
    """Each process believes to be alone on its machine."""
    import psutil

    addresses = {name: [one.address for one in found if one.family.name == "AF_INET"] for name, found in psutil.net_if_addrs().items()}
    outward = [(name, found[0]) for name, found in addresses.items() if found and not found[0].startswith("127.")]
    if not outward:
        pytest.skip("this machine has a loopback interface only")
    name, address = outward[0]
    line = words(tiny_model, six_clips, tmp_path / "out", encodings, max_train_steps=1, overwrite_output_dir=True)
    for chosen, listens in (({}, address), ({"GLOO_SOCKET_IFNAME": "lo"}, "127.0.0.1")):
        settings = {"MASTER_ADDR": address, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0} | chosen
        codes, output = forked.run(line, processes=2, before=LISTENING, **settings)
        assert codes == [0, 0], output[-3000:]
        assert output.count(f", gloo, gloo over {name}\n") == (0 if chosen else 2)
        told = [set(found.split()) for found in re.findall("listens on: (.*)", output)]
        assert len(told) == 2
        assert all(listens in found for found in told), told


@pytest.mark.slow
def test_a_bad_folder_prints_sentences_and_no_traceback(forked, clips, tiny_model, tmp_path):
    (clips / "videos/05.mp4").write_bytes(b"")
    codes, output = forked.run(words(tiny_model, clips, tmp_path / "out", tmp_path / "cache"))
    assert codes == [3]
    assert output.rstrip().splitlines()[-1].startswith("ERROR[3]: videos.txt:3: videos/05.mp4: empty file")
    assert "Traceback" not in output
    assert set(os.listdir(tmp_path / "out")) == {".lock", ".files_of_runs.jsonl", "dataset.json", "dataset_report.txt"}


@pytest.mark.parametrize(("seconds", "shared"), [(50, True), (95, False)])
def test_a_folder_that_another_machine_has_just_made_is_waited_for(tmp_path, monkeypatch, seconds, shared):
    """Rank 1 of two, whose file system shows the file of rank 0 late."""
    from cogvideox import launch

    probe = tmp_path / "out/.shared-1"

    def write():
        probe.parent.mkdir()
        probe.touch()

    monkeypatch.setattr(launch, "broadcast_object_list", lambda values: [[probe]])
    monkeypatch.setattr(launch, "gather_object", lambda values: values)
    client = LateNames(monkeypatch, seconds, write)
    problems = launch.folders_not_shared(OneProcess(process_index=1), [("--output_dir", tmp_path / "out")])
    assert client.now == min(seconds, 90)
    assert len(problems) == (0 if shared else 1)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EROFS])
def test_a_file_system_without_locks_is_used_with_a_warning(number, tmp_path, monkeypatch, capsys):
    from cogvideox import launch

    def refuse(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(launch.FileLock, "_acquire_native", refuse)
    if number == errno.EROFS:
        with pytest.raises(OSError, match="Read-only"):
            launch.lock_folder(tmp_path)
        return
    assert launch.lock_folder(tmp_path) is None
    assert "its file system has no locks" in capsys.readouterr().err
