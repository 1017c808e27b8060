"""What the shell scripts start, under Slurm, Kubernetes and torchrun's variables; examples/slurm.sbatch; a validation that takes long.

Nothing here has a cluster: `srun` and `scontrol` are small programs which do what the real ones are documented to do. Most
tests ask for what a script would start, and an `accelerate` that only prints its arguments answers.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from torch.distributed.launcher.api import LaunchConfig

import train_cogvideox_lora as script
from cogvideox.folder import facts_of, fill_in_defaults
from cogvideox.memory import PRESETS
from demo.make_model import TRANSFORMERS
from tests.conftest import ROOT, environment, example_of, lora_of, same, words
from tests.forked import free_port
from tests.test_launch import GUIDE
from tools.processes import family, strike

SMALL = ["--height", "32", "--width", "48", "--max_num_frames", "9", "--rank", "4", "--learning_rate", "1e-2", "--mixed_precision", "no"]
SMALL += ["--num_inference_steps", "2", "--eval_clips", "0", "--gradient_checkpointing", "none", "--report_to", "none"]
SMALL += ["--validation_prompt", "a rabbit"]

# Prints its arguments and what of its environment could confuse a trainer; `python` stands for the count of GPUs.
ACCELERATE = """#!/usr/bin/env bash
printf 'ARGUMENT %s\\n' "$@"
env | sed 's/^/VARIABLE /'
"""
# Tells of each signal that reaches it, and ends with 7 a moment after as many as SIGNALS says.
LISTENER = f"""#!{sys.executable}
import os, signal, sys, time
came = []
def note(number, frame):
    came.append(number)
    os.write(1, f'signal {{int(number)}}\\n'.encode())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, note)
print('listening', flush=True)
deadline = time.monotonic() + 60
while len(came) < int(os.environ['SIGNALS']) and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(7)
"""
PYTHON = "#!/usr/bin/env bash\necho 3\n"

# Starts the command once for each of two nodes. Like the real one it hands most signals on to the tasks (to each task's first
# process, or, with another plugin, to all of them), and kills the tasks when it gets SIGTERM.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, psutil
words = sys.argv[1:]
options = []
while words[0].startswith('--'):
    options.append(words.pop(0))
with open(os.environ['FAKE_LOG'], 'a') as log:
    print('srun', *options, file=log)
tasks = []
def hand_on(number, frame):
    for task in tasks:
        everyone = [psutil.Process(task.pid)] if task.poll() is None else []
        if everyone and (os.environ['FAKE_REACH'] == 'all' or number == signal.SIGKILL):
            everyone += everyone[0].children(recursive=True)
        for process in everyone:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass
signal.signal(signal.SIGUSR1, hand_on)
signal.signal(signal.SIGTERM, lambda number, frame: hand_on(signal.SIGKILL, frame))
nodes = int(os.environ['SLURM_NNODES'])
for node in range(nodes):
    step = {{'STEP_ID': 0, 'STEP_NUM_NODES': nodes, 'STEP_NODELIST': 'host[1-2]', 'STEP_TASKS_PER_NODE': '1(x2)', 'NODEID': node, 'LOCALID': 0}}
    tasks.append(subprocess.Popen(words, env=os.environ | {{f'SLURM_{{name}}': str(value) for name, value in step.items()}}))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") printf '127.0.0.1\\nelsewhere\\n' ;;
  *) echo "scontrol $*" >> "$FAKE_LOG" ;;
esac
"""


def program(folder, name, text):
    """Write an executable file."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def ask(tmp_path):
    """Run a shell script with these variables and nothing else, with a launcher that only tells how it was called.

    Returns (exit code, its messages, the flags of the launcher and the trainer, its environment). A flag given twice has its last
    value, as argparse takes it.
    """
    program(tmp_path / "fake", "accelerate", ACCELERATE)
    program(tmp_path / "fake", "python", PYTHON)

    def run(script="finetune_multi_gpus_1.sh", *words, **variables):
        base = {"PATH": f"{tmp_path / 'fake'}:/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(["bash", ROOT / script, *words], env=base | variables, capture_output=True, text=True, timeout=30)
        arguments = re.findall("^ARGUMENT (.*)$", done.stdout, re.M)
        told = dict(line.split("=", 1) for line in re.findall("^VARIABLE (.*=.*)$", done.stdout, re.M))
        return done.returncode, done.stderr, flags_of(arguments), told

    return run


def flags_of(words):
    """flag -> its value, "" for a switch."""
    following = [*words[1:], "--"]  # the last one has no value after it
    return {word: "" if after.startswith("--") else after for word, after in zip(words, following, strict=False) if word.startswith("--")}


def guide_flags(home="~"):
    """The flags of the guide's command."""
    found = flags_of(shlex.split(GUIDE.replace("\\\n", " ").replace("~", str(home))))
    assert len(found) == 31
    return found


def machines(flags):
    """What the launcher was told: machines, which of them, processes in all, address and port."""
    names = ("--num_machines", "--machine_rank", "--num_processes", "--main_process_ip", "--main_process_port")
    return tuple(flags[name] for name in names)


STEP = {"SLURM_JOB_ID": "4019512", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "4", "SLURM_NNODES": "4", "SLURM_NODEID": "1"}
STEP |= {"SLURM_STEP_NODELIST": "node[01-04]", "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8"}
OLD_STEP = {"SLURM_STEPID": "0", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu7,gpu9"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node3", "SLURM_NTASKS_PER_NODE": "8"}
POD = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
KUBEFLOW = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4", "PET_MASTER_ADDR": "m", "PET_MASTER_PORT": "23456"}
ELASTIC = {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "4", "MASTER_ADDR": "m"}
OWN = {"NNODES": "2", "NODE_RANK": "1", "GPUS_PER_NODE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"}


# -----------------------------------------------------------------------------
# The scripts as pages to edit, and the signals they pass on

SCRIPTS = ("finetune_single_gpu.sh", "finetune_multi_gpus_1.sh")


def test_the_single_gpu_script_starts_the_guides_command(ask, tmp_path):
    code, messages, flags, told = ask("finetune_single_gpu.sh")
    assert code == 0, messages
    expected = guide_flags(tmp_path)
    del expected["--multi_gpu"]  # of the yaml, for accelerate
    del expected["--mixed_precision"]  # as stored: the 2B is in fp16
    expected["--instance_data_root"] = expected["--instance_data_root"].rstrip("/")
    expected["--config_file"] = str(ROOT / expected["--config_file"])
    assert {name: flags[name] for name in expected} == expected
    assert "--mixed_precision" not in flags
    assert flags.keys() - expected.keys() == {"--gradient_checkpointing"}
    assert told["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert ask("finetune_single_gpu.sh", PYTORCH_CUDA_ALLOC_CONF="backend:native")[3]["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_user_can_edit_each_flag_of_the_guide_in_each_script(name):
    import train_cogvideox_lora as script

    text = (ROOT / name).read_text()
    assert text.index("set -euo pipefail") < text.index("export PYTORCH_CUDA_ALLOC_CONF=") < text.index("\nsource ")
    used = re.findall("^  (--[a-z_0-9]+)", text.split("\nsource ")[0], re.M)
    assert len(used) == len(set(used))
    assert set(used) <= {option for action in script.build_parser()._actions for option in action.option_strings}
    assert guide_flags().keys() - {"--config_file", "--multi_gpu", "--mixed_precision"} <= set(used)
    assert "  # No --mixed_precision: it computes as the model is stored" in text
    assert text.endswith('  "$@"\n')
    assert {"MODEL_PATH", "DATASET_PATH", "OUTPUT_PATH", "CACHE_PATH"} <= set(re.findall(r'^([A-Z_]+)="\$\{', text, re.M))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_guides_rate_is_left_out_where_the_user_chooses_prodigy_or_all_weights(ask, name):
    def rate(*words):
        return ask(name, *words)[2].get("--learning_rate")

    assert rate() == rate("--optimizer", "Adam") == rate("--use_8bit_adam", "--id_token", "prodigy") == "1e-4"
    for choice in (["--optimizer", "Prodigy"], ["--optimizer=prodigy", "--rank", "4"], ["--training_type", "sft"]):
        assert rate(*choice) is None
        assert rate(*choice, "--learning_rate", "0.5") == "0.5"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_rank_given_to_a_script_is_trained_at_the_strength_of_the_guides(ask, name):
    import train_cogvideox_lora as script

    def strength(*words):
        told = ask(name, *words)[2]
        own = [word for flag in ("--pretrained_model_name_or_path", "--instance_data_root") for word in (flag, told[flag])]
        own += [word for flag in ("--rank", "--lora_alpha") if flag in told for word in (flag, told[flag])]
        args = script.parse_args(own)
        return args.rank, args.lora_alpha / args.rank

    assert strength() == (128, 1)
    assert strength("--rank", "64") == (64, 1)
    assert strength("--rank", "64", "--lora_alpha", "32") == (64, 0.5)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("words", [[], ["--training_type", "sft"], ["--max_train_steps", "9", "--validation_steps", "3"]], ids=" ".join)
def test_no_flag_of_a_script_is_told_to_do_nothing(ask, name, words, tmp_path):
    import train_cogvideox_lora as script

    told = ask(name, *words)[2]
    own = [
        word for flag, value in told.items() if flag.removeprefix("--") in script.build_parser().declared for word in (flag, value) if word
    ]
    args = script.parse_args(own)
    assert script.notes_on_flags(args) == []
    assert args.learning_rate == (1e-5 if "sft" in words else 1e-4)


def test_both_scripts_and_that_for_all_weights_differ_in_their_purpose_only(ask):
    single, multi, sft = (ask(name)[2] for name in (*SCRIPTS, "examples/finetune_sft.sh"))
    counts = {"--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port"}
    assert {name for name in multi if single.get(name) != multi[name]} == counts | {"--config_file", "--output_dir"}
    assert {name for name in sft if multi.get(name) != sft[name]} == {
        *("--config_file", "--output_dir", "--training_type", "--learning_rate", "--lr_scheduler", "--lr_warmup_steps", "--ema_decay"),
        "--checkpoints_total_limit",
    }
    assert ask("finetune_single_gpu.sh", "--rank", "64", MODEL_PATH="mine")[2]["--rank"] == "64"
    assert ask("examples/finetune_sft.sh", "--learning_rate", "2e-5", MODEL_PATH="mine")[2]["--learning_rate"] == "2e-5"
    assert ask("examples/finetune_sft.sh", MODEL_PATH="mine")[2]["--pretrained_model_name_or_path"] == "mine"


@pytest.mark.parametrize("name", sorted(name for name in TRANSFORMERS if name != "2b"))
def test_the_example_of_a_family_gives_what_its_model_would_choose(ask, name):
    example = example_of(name)
    advised = SimpleNamespace(**dict.fromkeys(("height", "width", "max_num_frames", "fps", "validation_scheduler", "use_dynamic_cfg")))
    fill_in_defaults(advised, facts_of(PRESETS[name]["transformer"], PRESETS[name]["vae"]))
    for shell_script in SCRIPTS:
        told = ask(example, SCRIPT=shell_script)[2]
        own = [word for flag, value in told.items() if flag.removeprefix("--") in script.build_parser().declared for word in (flag, value)]
        args = script.parse_args([word for word in own if word])
        assert vars(advised).items() <= vars(args).items()
        assert args.pretrained_model_name_or_path.lower().replace("thudm/cogvideox", "").strip("-") == name
        plain = ask(shell_script)[2]
        changed = {flag for flag in told if told[flag] != plain.get(flag)}
        assert {"--pretrained_model_name_or_path", "--output_dir"} <= changed
        assert changed <= {
            "--pretrained_model_name_or_path",
            "--output_dir",
            *(f"--{flag}" for flag in vars(advised)),
            "--noised_image_dropout",
        }
        assert ("--noised_image_dropout" in changed) == name.endswith("i2v")
    assert ask(example, "--max_num_frames", "17", MODEL_PATH="mine")[2]["--max_num_frames"] == "17"
    whole = ask(example, SCRIPT="examples/finetune_sft.sh")[2]
    assert (whole["--training_type"], whole["--pretrained_model_name_or_path"]) == ("sft", told["--pretrained_model_name_or_path"])


def start_listener(tmp_path, script, signals=1):
    """Start a shell script with a launcher that listens for so many signals; returns the process once it does."""
    program(tmp_path / "fake", "accelerate", LISTENER)
    variables = {"PATH": f"{tmp_path / 'fake'}:/usr/bin:/bin", "HOME": str(tmp_path), "GPUS_PER_NODE": "1", "SIGNALS": str(signals)}
    process = subprocess.Popen(["bash", ROOT / script], env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "listening\n"
    return process


@pytest.mark.parametrize("script", [*SCRIPTS, "examples/finetune_sft.sh"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_scripts_pass_each_signal_on_as_sigterm_and_end_with_the_launchers_exit_code(tmp_path, script, number):
    process = start_listener(tmp_path, script)
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"signal {int(signal.SIGTERM)}\n"
    assert process.returncode == 7


@pytest.mark.skipif(shutil.which("setsid") is None, reason="without setsid the launcher hears the terminal too")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_scripts_whole_group_reaches_its_launcher_once(tmp_path, number):
    """As Ctrl-C and a closed terminal send it: at a second signal torch's launcher would leave its trainers."""
    process = start_listener(tmp_path, "finetune_single_gpu.sh")
    os.killpg(process.pid, number)
    assert process.communicate(timeout=30)[0] == f"signal {int(signal.SIGTERM)}\n"
    assert process.returncode == 7


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_launcher_waits_five_minutes_for_a_step_unless_told_otherwise(ask, monkeypatch, script):
    assert ask(script)[3]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "300"
    assert ask(script, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="9")[3]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "9"
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    if not hasattr(config, "shutdown_timeout"):
        pytest.skip("this torch always waits 30 seconds")
    assert config.shutdown_timeout == 300


def test_a_second_signal_does_not_end_the_script_before_its_launcher(tmp_path):
    process = start_listener(tmp_path, "finetune_single_gpu.sh", signals=3)
    for _ in range(3):  # two of a kind that wait to be handled are one
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "signal 15\n"
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 7


def test_sigusr1_to_every_process_does_not_reach_the_launcher(tmp_path):
    process = start_listener(tmp_path, "finetune_multi_gpus_1.sh")
    strike(family(process.pid)[1:], signal.SIGUSR1)
    time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    assert process.communicate(timeout=30)[0] == "signal 15\n"


@pytest.mark.parametrize("code", [0, 1, 130])
def test_the_exit_code_of_a_script_is_its_launchers(tmp_path, ask, code):
    program(tmp_path / "fake", "accelerate", f"#!/usr/bin/env bash\nexit {code}\n")
    assert [ask(script)[0] for script in (*SCRIPTS, "examples/finetune_sft.sh")] == [code] * 3


# -----------------------------------------------------------------------------
# The machines


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("1", "0", "3", "127.0.0.1", "29500")),
        ({"NNODES": "", "GPUS_PER_NODE": "02"}, ("1", "0", "2", "127.0.0.1", "29500")),
        (OWN, ("2", "1", "4", "a", "5")),
        (STEP, ("4", "1", "32", "node01", "29512")),
        (OLD_STEP, ("2", "1", "6", "gpu7", "29500")),
        (JOB, ("1", "0", "3", "127.0.0.1", "10007")),
        (STEP | {"SLURM_STEP_ID": "2"}, ("4", "1", "32", "node01", str(10000 + (4019512 + 2018) % 20000))),
        (STEP | {"SLURM_NNODES": "16"}, ("4", "1", "32", "node01", "29512")),
        (STEP | {"MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "32", "RANK": "0"}, ("4", "1", "32", "10.0.0.1", "29512")),
        (POD, ("2", "1", "6", "job-master-0", "23456")),
        (POD | {"WORLD_SIZE": "1", "RANK": "0"}, ("1", "0", "3", "job-master-0", "23456")),
        (POD | {"LOCAL_RANK": "0"}, ("2", "1", "6", "job-master-0", "23456")),
        (KUBEFLOW, ("2", "1", "8", "m", "23456")),
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "auto"}, ("2", "1", "6", "m", "23456")),
        (KUBEFLOW | {"WORLD_SIZE": "8", "RANK": "1"}, ("2", "1", "8", "m", "23456")),
        (KUBEFLOW | {"WORLD_SIZE": "2", "RANK": "1"}, ("2", "1", "8", "m", "23456")),
        (ELASTIC, ("2", "1", "8", "m", "29500")),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "m"}, ("2", "1", "8", "m", "29500")),
    ],
)
def test_the_machines_come_from_whoever_started_the_script(ask, variables, expected):
    code, messages, flags, _ = ask(**variables)
    assert code == 0, messages
    assert machines(flags) == expected
    assert flags["--checkpointing_steps"] == "500"
    assert messages.startswith(f"machine {expected[1]} of {expected[0]} (")
    assert messages.count("\n") == 1


def test_one_line_says_what_came_from_where(ask):
    line = "machine 1 of 4 (SLURM_NODEID, SLURM_STEP_NUM_NODES), 8 processes each (SLURM_GPUS_ON_NODE), "
    assert ask(**STEP)[1] == line + "main at node01:29512 (SLURM_STEP_NODELIST, SLURM_JOB_ID)\n"
    line = "machine 0 of 1 (default, default), 3 processes each (the GPUs here), main at 127.0.0.1:29500 (default, default)\n"
    assert ask()[1] == line


def test_what_the_user_sets_wins_with_a_note(ask):
    code, messages, flags, _ = ask(**STEP | {"NNODES": "2", "GPUS_PER_NODE": "4"})
    assert code == 0
    assert machines(flags) == ("2", "1", "8", "node01", "29512")
    assert "note: NNODES=2 is used, not SLURM_STEP_NUM_NODES=4\n" in messages
    assert "note: GPUS_PER_NODE=4 is used, not SLURM_GPUS_ON_NODE=8\n" in messages
    code, messages, flags, _ = ask(**POD | {"NNODES": "2", "NODE_RANK": "0", "WORLD_SIZE": "5"})
    assert code == 0
    assert machines(flags)[:3] == ("2", "0", "6")
    assert "are used, not WORLD_SIZE=5" in messages
    assert "note: MASTER_ADDR=localhost is this machine itself" in ask(**OWN | {"MASTER_ADDR": "localhost"})[1]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"NNODES": "two"}, "NNODES=two must be a whole number from 1 to 99999: set NNODES"),
        ({"NNODES": "0"}, "NNODES=0 must be a whole number from 1"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0 must be a whole number from 1 to 1024: set GPUS_PER_NODE"),
        ({"GPUS_PER_NODE": "8,8"}, "GPUS_PER_NODE=8,8 must be a whole number"),
        ({"NODE_RANK": "-1"}, "NODE_RANK=-1 must be a whole number from 0 to 0: NNODES is 1 (default); set NODE_RANK"),
        (OWN | {"NODE_RANK": "2"}, "NODE_RANK=2 must be a whole number from 0 to 1: NNODES is 2 (NNODES)"),
        (OWN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must be a whole number from 1 to 65535: set MASTER_PORT"),
        (OWN | {"MASTER_ADDR": ""}, "MASTER_ADDR must be set, because NNODES=2: the address at which"),
        (OWN | {"NODE_RANK": ""}, "NODE_RANK must be set, because NNODES=2: give each machine its own, from 0 to 1"),
        (
            {"WORLD_SIZE": "8", "MASTER_ADDR": "m"},
            "NODE_RANK must be set, because WORLD_SIZE=8: give each machine its own, from 0 to 7, or set",
        ),
        (POD | {"MASTER_ADDR": ""}, "MASTER_ADDR must be set, because WORLD_SIZE=2"),
        (POD | {"RANK": "2"}, "RANK=2 must be a whole number from 0 to 1: NNODES is 2 (WORLD_SIZE); set NODE_RANK"),
        (KUBEFLOW | {"PET_NNODES": "1:4"}, "PET_NNODES=1:4 must be a whole number from 1 to 99999: set NNODES"),
        (KUBEFLOW | {"WORLD_SIZE": "7"}, "WORLD_SIZE=7 must be 2, the machines (PET_NNODES), or 8, with 4 processes on each"),
        ({"WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "4"}, "WORLD_SIZE=7 must be a multiple of LOCAL_WORLD_SIZE=4: set NNODES"),
        (
            KUBEFLOW | {"RANK": "0", "WORLD_SIZE": "2"},
            "RANK=0 and PET_NODE_RANK=1 must be equal: unset the wrong one, or set NODE_RANK",
        ),
        (STEP | {"PET_NNODES": "2"}, "PET_NNODES=2 and SLURM_STEP_NUM_NODES=4 must be equal"),
        (STEP | {"SLURM_NODEID": "4"}, "SLURM_NODEID=4 must be a whole number from 0 to 3"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, "SLURM_STEP_TASKS_PER_NODE=8(x4) must be 1: this script starts the processes"),
        (OLD_STEP | {"SLURM_TASKS_PER_NODE": "2(x2)"}, "SLURM_TASKS_PER_NODE=2(x2) must be 1"),
        (OLD_STEP | {"SLURM_NTASKS_PER_NODE": "4"}, "SLURM_NTASKS_PER_NODE=4 must be 1: this script starts the processes"),
        (STEP | {"SLURM_LOCALID": "3"}, "SLURM_LOCALID=3 must be 0: this script starts the processes"),
        (STEP | {"SLURM_STEP_ID": ""}, "SLURM_STEP_NUM_NODES=4 must be 1 if srun did not start this script"),
        (POD | {"LOCAL_RANK": "1"}, "LOCAL_RANK=1 must be 0: this script starts the processes"),
        ({"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, "LOCAL_RANK=0 with TORCHELASTIC_RUN_ID must be unset: torchrun or"),
    ],
)
def test_what_does_not_add_up_is_refused_in_one_sentence(ask, variables, sentence):
    code, messages, flags, _ = ask(**variables)
    assert code == 2
    assert messages.startswith(f"ERROR[2]: {sentence}")
    assert messages.count("\n") == 1
    assert not flags


@pytest.mark.parametrize("script", ["finetune_multi_gpus_1.sh", "finetune_single_gpu.sh"])
def test_the_trainers_do_not_see_what_another_launcher_said(ask, script):
    strange = dict.fromkeys(("ROLE_RANK", "ROLE_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"), "1")
    strange |= {"PET_MAX_RESTARTS": "3", "PET_RDZV_BACKEND": "c10d"}
    code, messages, _, told = ask(script, **ELASTIC | KUBEFLOW | strange)
    assert code == 0, messages
    assert told.pop("PET_SIGNALS_TO_HANDLE") == "SIGTERM,SIGINT,SIGQUIT"  # the script's own
    assert not [name for name in told if re.match("PET_|TORCHELASTIC_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$", name)]


def test_the_single_gpu_script_is_not_started_once_a_process_either(ask):
    assert ask("finetune_single_gpu.sh", SLURM_STEP_ID="0", SLURM_STEP_TASKS_PER_NODE="8")[0] == 2
    assert ask("finetune_single_gpu.sh", SLURM_STEP_ID="0", SLURM_STEP_TASKS_PER_NODE="1", SLURM_NNODES="1")[0] == 0


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("node7", "node7"),
        ("node[01-04,7]", "node01"),
        ("node[09,11-12],login", "node09"),
        ("login,node[1-2]", "login"),
        ("gpu-a-3,gpu-b-1", "gpu-a-3"),
        ("rack[1-2]-node[3,4]-ib,x[1]", "rack1-node3-ib"),
        ("n[001].site.org", "n001.site.org"),
    ],
)
def test_the_first_host_of_a_list_without_scontrol(ask, listed, first):
    assert machines(ask(**STEP | {"SLURM_STEP_NODELIST": listed})[2])[3] == first


def test_the_first_host_of_a_list_from_scontrol(ask, tmp_path):
    program(tmp_path / "fake", "scontrol", SCONTROL)
    assert machines(ask(**STEP)[2])[3] == "127.0.0.1"
    program(tmp_path / "fake", "scontrol", "#!/usr/bin/env bash\nexit 1\n")
    assert machines(ask(**STEP)[2])[3] == "node01"


# -----------------------------------------------------------------------------
# examples/slurm.sbatch


class Batch:
    """The batch script as Slurm would start it: from a copy in another folder, with two nodes, both of them this machine."""

    def __init__(self, folder, reach="first", **settings):
        self.folder, self.output, self.processes = folder, folder / "out", []
        program(folder / "fake", "srun", SRUN)
        program(folder / "fake", "scontrol", SCONTROL)
        program(folder / "spool", "slurm_script", (ROOT / "examples/slurm.sbatch").read_text())
        (folder / "calls").touch()
        base = environment()
        self.variables = base | {"PATH": f"{folder / 'fake'}:{base['PATH']}", "FAKE_LOG": str(folder / "calls"), "FAKE_REACH": reach}
        self.variables |= {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "4"}
        self.variables |= {"OUTPUT_PATH": str(self.output), "CACHE_PATH": str(folder / "cache"), "GPUS_PER_NODE": "1"}
        self.variables |= {"MASTER_PORT": str(free_port())} | {name: str(value) for name, value in settings.items()}

    def start(self, *flags):
        process = subprocess.Popen(
            ["bash", self.folder / "spool/slurm_script", *flags],
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def clear(self):
        """Leave no process behind where a test has failed."""
        for process in self.processes:
            if process.poll() is None:
                strike(family(process.pid), signal.SIGKILL)
                process.communicate()

    def run(self, *flags):
        """Start it and wait for its end. Returns (exit code, output)."""
        process = self.start(*flags)
        output = process.communicate(timeout=400)[0]
        return process.returncode, output

    def requeued(self):
        return (self.folder / "calls").read_text().count("scontrol requeue 77\n")

    def steps(self):
        path = self.output / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def status(self):
        return json.loads((self.output / "status.json").read_text())

    def wait_for_steps(self, number, process):
        deadline = time.monotonic() + 300
        while self.steps() < number:
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def batch_of(tmp_path):
    """Make a Batch in a folder below tmp_path."""
    made = []

    def make(name="batch", **settings):
        (tmp_path / name).mkdir()
        made.append(Batch(tmp_path / name, **settings))
        return made[-1]

    yield make
    for batch in made:
        batch.clear()


# Writes status.json as the trainer would, at the signal or at once, without any training.
STAND_IN = """#!/usr/bin/env bash
mkdir -p "$OUTPUT_PATH"
finish() {
  if [[ -n "$STATUS" ]]; then printf '{\\n "code": %s,\\n "step": 3\\n}' "$STATUS" > "$OUTPUT_PATH/status.json"; fi
  exit "$CODE"
}
trap finish TERM
touch "$OUTPUT_PATH/started-$$"
if [[ -z "$WAITS" ]]; then finish; fi
for _ in {1..400}; do sleep 0.05; done  # no longer, if nobody ends it
exit 9
"""


@pytest.mark.parametrize(
    ("number", "settings", "requeued", "code"),
    [
        (signal.SIGUSR1, {"STATUS": "143", "CODE": "1", "WAITS": "yes"}, 1, 0),
        (signal.SIGUSR1, {"STATUS": "138", "CODE": "1", "WAITS": "yes"}, 1, 0),
        (signal.SIGUSR1, {"STATUS": "0", "CODE": "0", "WAITS": "yes"}, 0, 0),
        (signal.SIGUSR1, {"STATUS": "4", "CODE": "1", "WAITS": "yes"}, 0, 1),
        (signal.SIGUSR1, {"STATUS": "", "CODE": "1", "WAITS": "yes"}, 0, 1),
        (signal.SIGTERM, {"STATUS": "143", "CODE": "1", "WAITS": "yes"}, 0, 1),
        (None, {"STATUS": "143", "CODE": "1", "WAITS": ""}, 0, 1),
        (None, {"STATUS": "5", "CODE": "1", "WAITS": ""}, 0, 1),
        (None, {"STATUS": "", "CODE": "1", "WAITS": ""}, 0, 1),
        (None, {"STATUS": "0", "CODE": "0", "WAITS": ""}, 0, 0),
    ],
)
def test_only_a_run_that_was_stopped_by_the_time_limit_goes_back_into_the_queue(batch_of, number, settings, requeued, code):
    batch = batch_of(**settings)
    program(batch.folder / "fake", "accelerate", STAND_IN)
    batch.output.mkdir()
    (batch.output / "status.json").write_text('{\n "code": 143,\n "step": 2\n}')  # an earlier start's
    process = batch.start()
    if number:
        deadline = time.monotonic() + 20
        while len(list(batch.output.glob("started-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert batch.requeued() == requeued, output
    assert process.returncode == code, output
    assert "machine 1 of 2 (SLURM_NODEID, SLURM_STEP_NUM_NODES), 1 process each (GPUS_PER_NODE), main at 127.0.0.1:" in output


@pytest.mark.slow
@pytest.mark.parametrize("reach", ["first", "all"], ids=["to the scripts", "to every process"])
def test_the_time_limit_saves_requeues_and_the_next_start_goes_on_to_the_end(
    forked, tiny_model, six_clips, encodings, batch_of, tmp_path, reach
):
    batch = batch_of(reach=reach, MODEL_PATH=tiny_model, DATASET_PATH=six_clips)
    flags = [*SMALL, "--max_train_steps", "150", "--validation_steps", "1000", "--lora_alpha", "4", "--seed", "42"]
    process = batch.start(*flags)
    batch.wait_for_steps(3, process)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 0, output[-3000:]
    assert batch.requeued() == 1
    status = batch.status()
    assert status["code"] in (128 + signal.SIGUSR1, 128 + signal.SIGTERM)
    assert 3 <= status["step"] < 150
    assert (batch.output / f"checkpoint-{status['step']}/manifest.json").exists()
    assert "process 1 of 2" in output
    if reach == "all":
        return

    batch.variables["SLURM_RESTART_COUNT"] = "1"
    code, output = batch.run(*flags)
    assert code == 0, output[-3000:]
    assert f"from step {status['step']}" in output
    assert batch.requeued() == 1
    assert (batch.status()["code"], batch.status()["step"], batch.steps()) == (0, 150, 150)
    paths = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_root", six_clips, "--output_dir", tmp_path / "straight"]
    codes, output = forked.run([*paths, "--encoding_cache_dir", encodings, *flags], processes=2)
    assert codes == [0, 0], output[-3000:]
    assert same(lora_of(batch.output), lora_of(tmp_path / "straight"))


def test_a_run_whose_trainer_fails_does_not_come_back(tiny_model, six_clips, batch_of):
    batch = batch_of(MODEL_PATH=tiny_model, DATASET_PATH=six_clips)
    trainer_only = f'#!/usr/bin/env bash\nwhile [[ "$1" != *.py ]]; do shift; done\nexec {sys.executable} "$@"\n'
    program(batch.folder / "fake", "accelerate", trainer_only)
    code, output = batch.run(*SMALL, "--rank", "0")
    assert code != 0
    assert "ERROR[2]: --rank 0" in output
    assert batch.requeued() == 0


def test_the_batch_script_asks_slurm_for_what_it_relies_on():
    text = (ROOT / "examples/slurm.sbatch").read_text()
    for option in ("--ntasks-per-node=1", "--signal=B:USR1@120", "--requeue", "--open-mode=append"):
        assert re.search(f"^#SBATCH {option}$", text, re.M)
    for name in ("examples/slurm.sbatch", "examples/finetune_sft.sh", "cogvideox/cluster.sh", "cogvideox/launch.sh", *SCRIPTS):
        assert subprocess.run(["bash", "-n", ROOT / name]).returncode == 0
    first_command = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert text.index(first_command) > text.rindex("#SBATCH")  # Slurm reads no further than the first command


# -----------------------------------------------------------------------------
# A validation that takes longer than a collective may

SLOW_VIDEOS = """
import os, time
from datetime import timedelta
import torch.distributed.distributed_c10d as collectives
import cogvideox.launch as launch
import cogvideox.validation as validation
sample = validation.sample_latents
def slow(*positional, **named):
    if rank == 1:
        time.sleep(float(os.environ['SLOW_SECONDS']))
    return sample(*positional, **named)
validation.sample_latents = slow
validate = validation.validate
def told(folder, jobs, rank, world_size, *rest):
    failures = validate(folder, jobs, rank, world_size, *rest)
    for job in jobs[rank::world_size]:
        print(f"made by {rank}: {folder.name}/{job['name']}", flush=True)
    return failures
validation.validate = told
generate = validation.Validator.generate
def limited(*positional, **named):  # a busy machine may need more than three seconds for all else
    collectives._set_pg_timeout(timedelta(seconds=3))
    generate(*positional, **named)
    collectives._set_pg_timeout(timedelta(minutes=30))
validation.Validator.generate = limited
if os.environ.get('PLAIN_BARRIER'):  # what a barrier with the limit of the training loop would do
    launch.patient_barrier_maker = lambda: launch.distributed.barrier
"""


@pytest.mark.slow
def test_a_validation_longer_than_the_collectives_limit_leaves_the_videos_of_every_process(
    forked, tiny_model, six_clips, encodings, tmp_path
):
    """Two processes, five videos at two validations, and a limit of three seconds; process 1 waits before each video."""
    flags = {"validation_prompt": "a:::b:::c:::d:::e", "max_train_steps": 1}
    settings = {"processes": 2, "before": SLOW_VIDEOS, "timeout": 170, "SLOW_SECONDS": 4}
    codes, output = forked.run(words(tiny_model, six_clips, tmp_path / "out", encodings, **flags), **settings)
    assert codes == [0, 0], output[-3000:]
    made = {rank: set(re.findall(f"made by {rank}: (.*)", output)) for rank in (0, 1)}
    assert [len(made[rank]) for rank in (0, 1)] == [6, 4]  # five prompts, before the first and after the last step
    on_disk = {f"{path.parent.name}/{path.name}" for path in (tmp_path / "out/validation").rglob("*.mp4")}
    assert on_disk == made[0] | made[1]
    assert all(path.stat().st_size > 0 for path in (tmp_path / "out/validation").rglob("*.mp4"))
    assert json.loads((tmp_path / "out/status.json").read_text())["code"] == 0

    # Other prompts, or the videos of the base model would come from the cache.
    line = words(tiny_model, six_clips, tmp_path / "plain", encodings, **flags | {"validation_prompt": "f:::g:::h:::i:::j"})
    codes, output = forked.run(line, **settings, PLAIN_BARRIER=1)
    assert all(codes), "a plain barrier was to run out of time: the limit above shows nothing"
    assert "imed out" in output, output[-3000:]
    assert "made by 0: step-000000/" in output  # it came as far as the validation
    assert "made by 0: step-000001/" not in output
    assert not (tmp_path / "plain/status.json").exists()
