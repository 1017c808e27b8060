"""Forked trainers (tests/forked.py) are what they stand for: the same bits, exit codes, signals and messages as real processes."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, environment, lora_of, same, words
from tests.forked import free_port


def losses_of(folder):
    """Loss and gradient norm of each step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def really_run(*command, timeout=200):
    """Run a program that is started, not forked, to its end; its messages are in `stdout`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=ROOT, env=environment(), timeout=timeout, **pipes)


@pytest.mark.slow
def test_two_forked_processes_write_the_bits_of_two_that_accelerate_started(forked, tiny_model, six_clips, tmp_path):
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_prompt": "a rabbit:::a bird"}
    config = ["--config_file", "accelerate_config_machine_multi.yaml", "--num_processes", "2", "--main_process_port", str(free_port())]
    line = words(tiny_model, six_clips, tmp_path / "real", tmp_path / "cache of real", **flags)
    started = really_run("accelerate", "launch", *config, "train_cogvideox_lora.py", *line)
    assert started.returncode == 0, started.stdout[-3000:]
    assert "process 1 of 2" in started.stdout
    for name, seed in (("forked", 42), ("other", 43)):
        line = words(tiny_model, six_clips, tmp_path / name, tmp_path / f"cache of {name}", seed=seed, **flags)
        codes, output = forked.run(line, processes=2)
        assert codes == [0, 0], output[-3000:]
        assert "gloo" in output
    assert same(lora_of(tmp_path / "forked"), lora_of(tmp_path / "real"))
    assert losses_of(tmp_path / "forked") == losses_of(tmp_path / "real")
    assert not same(lora_of(tmp_path / "other"), lora_of(tmp_path / "real"))
    assert losses_of(tmp_path / "other") != losses_of(tmp_path / "real")
    left, made = ({str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")} for name in ("real", "forked"))
    assert made == left


@pytest.mark.slow
def test_a_forked_process_has_the_exit_code_and_the_messages_of_a_real_one(forked, tiny_model, six_clips, tmp_path):
    line = words(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache", rank=0)
    real = really_run(sys.executable, "train_cogvideox_lora.py", *line, timeout=60)
    assert forked.run(line) == ([real.returncode], real.stdout)
    assert real.returncode == 2
    assert "ERROR[2]: --rank 0" in real.stdout
    codes, output = forked.run([], before="print('rank', rank, flush=True); import os; os.kill(os.getpid(), 9)")
    assert (codes, output) == ([-signal.SIGKILL], "rank 0\n")
    codes, output = forked.run([], before="raise ValueError('a fault')")
    assert codes == [1]
    assert output.rstrip().endswith("ValueError: a fault")


def test_a_forked_process_ends_by_a_signal_and_leaves_the_next_ones_alone(forked):
    waiting = "import time; print('on', flush=True); time.sleep(300)"
    first, second = forked.start([], processes=2, before=waiting, WHICH="both")
    while not (first.output() and second.output()):
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.1)
    second.send_signal(signal.SIGINT)
    assert second.wait(60) == -signal.SIGINT  # as Python ends by it
    assert second.output().rstrip().endswith("KeyboardInterrupt")
    told = "import os; print(os.environ.get('WHICH'), os.environ.get('RANK'), flush=True); os._exit(7)"
    assert forked.run([], before=told) == ([7], "None None\n")
