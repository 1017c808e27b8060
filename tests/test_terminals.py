"""Closed terminals, readers that end, trackers that fail, and what is printed: none of them ends a run or loses its work."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios

import pytest

from tests.conftest import ROOT, environment, lora_of, words
from tests.forked import free_port
from tests.test_faults import kill_all_of, start, steps_of, wait_for

TRAINER = ROOT / "train_cogvideox_lora.py"
ACCELERATE = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
PORT = ["--main_process_port", str(free_port())]  # another run's on the default one would be told
LAUNCHES = {
    "python": [sys.executable, TRAINER],
    "accelerate": [*ACCELERATE, TRAINER],
    "accelerate's yaml": ["accelerate", "launch", "--config_file", ROOT / "accelerate_config_machine_single.yaml", *PORT, TRAINER],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAINER],
    "fsdp2": ["accelerate", "launch", "--config_file", ROOT / "configs/fsdp2.yaml", "--num_processes", "2", *PORT, TRAINER],
    "single script": ["bash", ROOT / "finetune_single_gpu.sh"],
    "multi script": ["bash", ROOT / "finetune_multi_gpus_1.sh"],
}


class Terminal:
    """A run on a terminal of its own, whose closing the system tells it by SIGHUP, as for a window or a connection.

    shielded: whether hang-ups are ignored on entry, as nohup has it.
    """

    def __init__(self, launch, line, folder, shielded=False, **variables):
        self.master, slave = pty.openpty()

        def take_terminal():
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, signal.SIG_IGN if shielded else signal.SIG_DFL)

        self.process = subprocess.Popen(
            [str(word) for word in [*LAUNCHES[launch], *line]],
            cwd=folder,
            env=environment() | {"GPUS_PER_NODE": "2", "MASTER_PORT": str(free_port())} | variables,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        kill_all_of(self.process)
        self.close()
        self.process.wait(20)

    def read_until(self, condition):
        """Take what is written, so that the writer does not wait, until something is so."""
        os.set_blocking(self.master, False)

        def reached():
            with contextlib.suppress(BlockingIOError, OSError):
                while os.read(self.master, 1 << 16):
                    pass
            return condition()

        wait_for(reached)

    def close(self):
        """Close the window. Call it again without harm."""
        if self.master is not None:
            os.close(self.master)
            self.master = None


def line_for(launch, model, data, output, cache, **flags):
    """(flags, variables) of a small run: the scripts take their folders from variables."""
    line = words(model, data, output, cache, validation_epochs=0, **flags)
    names = ("MODEL_PATH", "DATASET_PATH", "OUTPUT_PATH", "CACHE_PATH")
    scripted = "script" in launch
    values = [str(value) for value in (model, data, output, cache)]
    return (line[8:], dict(zip(names, values, strict=True))) if scripted else (line, {})


def some_long(*names):
    """The names of all launches; these are run by `make test-long` only."""
    return [pytest.param(name, marks=[pytest.mark.long] if name in names else []) for name in LAUNCHES if name != "fsdp2"]


@pytest.mark.slow
@pytest.mark.parametrize("launch", some_long("multi script", "accelerate's yaml"))
def test_a_closed_terminal_stops_a_run_with_a_checkpoint(tiny_model, six_clips, encodings, tmp_path, launch):
    output = tmp_path / "out"
    line, variables = line_for(launch, tiny_model, six_clips, output, encodings, max_train_steps=20000, checkpointing_steps=20000)
    with Terminal(launch, line, tmp_path, **variables) as run:
        run.read_until(lambda: len(steps_of(output)) >= 3)
        run.close()
        run.process.wait(90)
        if launch == "accelerate":  # this launcher dies at once, and the trainer ends its step without it
            wait_for(lambda: (output / "status.json").exists())
        status = json.loads((output / "status.json").read_text())
    assert status["code"] in (128 + signal.SIGHUP, 128 + signal.SIGTERM)
    assert status["reason"].startswith("stopped by SIG")
    assert 3 <= status["step"] < 20000
    assert status["checkpoint"] == str(output / f"checkpoint-{status['step']}")
    assert len(lora_of(output)) == 16


@pytest.mark.slow
@pytest.mark.parametrize("launch", some_long("multi script", "accelerate's yaml", "python"))
def test_a_run_that_ignores_hang_ups_outlives_its_terminal(tiny_model, six_clips, encodings, tmp_path, launch):
    output = tmp_path / "out"
    line, variables = line_for(launch, tiny_model, six_clips, output, encodings, max_train_steps=60, checkpointing_steps=1000)
    if launch in ("accelerate's yaml", "torchrun"):  # what the warning tells to give
        variables["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
    with Terminal(launch, line, tmp_path, shielded=True, **variables) as run:
        run.read_until(lambda: len(steps_of(output)) >= 3)
        run.close()
        os.killpg(run.process.pid, signal.SIGHUP)
        assert run.process.wait(120) == 0
    assert json.loads((output / "status.json").read_text())["reason"] == "done"
    assert steps_of(output) == list(range(1, 61))


@pytest.mark.slow
def test_ctrl_c_that_ends_tee_as_well_leaves_a_checkpoint(tiny_model, six_clips, encodings, tmp_path):
    line = words(tiny_model, six_clips, tmp_path / "out", encodings, max_train_steps=20000)
    pipeline = 'set -o pipefail; "$0" train_cogvideox_lora.py "$@" 2>&1 | tee "$LOG"'
    run = start(["bash", "-c", pipeline, sys.executable], line, LOG=str(tmp_path / "log"))
    wait_for(lambda: len(steps_of(tmp_path / "out")) >= 3)
    os.killpg(run.pid, signal.SIGINT)
    run.communicate(timeout=60)
    wait_for(lambda: (tmp_path / "out/status.json").exists())
    status = json.loads((tmp_path / "out/status.json").read_text())
    assert (status["code"], status["reason"]) == (130, "stopped by SIGINT")
    assert status["checkpoint"] == str(tmp_path / f"out/checkpoint-{status['step']}")
    assert "stopped by" not in (tmp_path / "log").read_text()  # tee had ended before


@pytest.mark.slow
def test_a_tool_whose_reader_ends_does_all_its_work(six_clips, tmp_path):
    words = f"--instance_data_root {six_clips} --height 32 --width 48 --max_num_frames 9 --sheet {tmp_path}/sheet.png"
    words += f" --encoding_cache_dir {tmp_path}/cache"
    pipeline = f"{sys.executable} -m tools.check_dataset {words} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipeline], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    told = "for the 2B: text to video, sincos positions, made for 49 frames of 480 x 720 at 8 a second"
    assert done.stdout == f"line files of {six_clips}, {told}\n0\n"
    assert "Error" not in done.stderr
    assert (tmp_path / "sheet.png").stat().st_size > 1000


# -----------------------------------------------------------------------------
# What is printed

# Every line of a plain run, in the order of their first one.
LINES = [
    r"\S+: text to video, sincos positions, made for 17 frames of 64 x 96 at 8 a second",
    r"warning: 32 x 48: this model was made for 64 x 96, and its positions are counted from .*",
    r"process \d of \d on \S+: cpu(:0)? \(.*, \d+ threads\)(, gloo)?",
    r"(checking clips|encoding captions|encoding clips|scoring|training): +\d+%\|.*\| \d+/\d+ \[.*\]",
    r"line files of .*",
    r"  clip +source +reader +frames +seconds.*",
    r"  videos/\d\d\.mp4 +\d+x\d+ .*",
    r"  \d+ clips, .* seconds used, as frames x height x width: .*",
    r"  \d of \d clips use less than 90 % of their clip .*",
    r"  \d captions have fewer than 20 words; .*",
    r"  videos/\d\d\.mp4: '.*'",
    r"encodings in .*: \d of \d clips and \d of \d captions are cached; clips are encoded whole.*",
    r"gradient checkpointing: .* blocks are recomputed.*",
    r"rehearsal: .* seconds per step, .* trainable parameters;",
    r" +[\d.]+ MiB per checkpoint, \d+ MiB for \d+ of them, \d+ MiB free",
    r"\d clips; \d per batch x \d processes x \d accumulation = \d clips per step",
    r"\d+ steps = [\d.]+ epochs, from step 0; learning rate [\d.e-]+, constant",
    r"training [\d.]+ M of [\d.]+ M parameters \(rank 4, alpha 4\), computing in fp32; engine: .*",
    r"(warning: )?predicted: \d+ % of this run's time goes into .*",
    r"pytorch_lora_weights\.safetensors loaded by the stock pipeline at weight 1\.0: PASS .*",
    r"step \d+: loss on fixed noise: .*",
    r"step \d+: validation videos and contact_sheet\.png in .*",
    r"step \d+: the videos move by [\d.]+ grey levels per second .*",
    r"verdict: .*",
    r"(result|how to use it|report): \S+",
    r"",
]


def unexpected(output):
    """The lines of a run's output that no pattern allows."""
    return [line for line in output.splitlines() if not any(re.fullmatch(pattern, line) for pattern in LINES)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "flags"),
    [
        pytest.param("python", {"gradient_checkpointing": "auto", "eval_clips": 1, "report_to": "tensorboard"}),
        pytest.param("torchrun", {"validation_prompt": "a rabbit"}),
        pytest.param("accelerate's yaml", {"base_precision": "nf4", "optimizer": "AdamW8bit"}, marks=pytest.mark.long),
        pytest.param("python", {"optimizer": "Prodigy", "learning_rate": 1, "compile": True}, marks=pytest.mark.long),
        pytest.param("fsdp2", {"eval_clips": 1, "validation_prompt": "a rabbit"}, marks=pytest.mark.long),
    ],
)
def test_a_plain_run_prints_nothing_that_is_not_for_the_user(tiny_model, six_clips, tmp_path, launch, flags):
    without_videos = {} if "validation_prompt" in flags else {"num_inference_steps": None}
    line = words(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache", **flags, **without_videos)
    done = start([str(word) for word in LAUNCHES[launch]], line)
    output = done.communicate(timeout=200)[0]
    assert done.returncode == 0, output[-3000:]
    assert unexpected(output) == []
    assert output.count("training: 100%") == output.count("encoding clips: 100%") == 1  # one process of two draws a bar
    assert unexpected(f"{output}Failed to load CPU gemm_4bit_forward\n") == ["Failed to load CPU gemm_4bit_forward"]
