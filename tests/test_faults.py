"""What may happen to a run: signals, kills, full disks, numbers that are not finite, dead processes. Nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_cogvideox_lora as script
from cogvideox import rehearsal, stopping
from tests.conftest import ROOT, environment, lora_of, same, words
from tools.processes import family, strike, wait_for_end

ONE = [sys.executable, "train_cogvideox_lora.py"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_cogvideox_lora.py"]


def start(command, line, **variables):
    """Start a run in a process group of its own; returns the process."""
    return subprocess.Popen(
        [*command, *line],
        cwd=ROOT,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_all_of(run):
    """Kill a process and all that it has started: a launcher's trainers are in sessions of their own."""
    strike(family(run.pid), signal.SIGKILL)


def steps_of(folder):
    """The steps that metrics.jsonl holds so far."""
    path = folder / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in path.read_text().splitlines() if '"loss"' in line and line.endswith("}")]
        if path.exists()
        else []
    )


def wait_for(condition, seconds=300):
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


# -----------------------------------------------------------------------------
# Signals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "launch"),
    [(signal.SIGINT, "python"), (signal.SIGTERM, "forked"), (signal.SIGHUP, "forked"), (signal.SIGUSR1, "forked")],
)
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(
    forked, plain_run, tiny_model, six_clips, encodings, tmp_path, number, launch
):
    flags = {"max_train_steps": 120, "resume_from_checkpoint": "latest", "lr_scheduler": "cosine"}
    line = words(tiny_model, six_clips, tmp_path / "out", encodings, **flags)
    run = start(ONE, line) if launch == "python" else forked.start(line)[0]
    wait_for(lambda: len(steps_of(tmp_path / "out")) >= 3)
    run.send_signal(number)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + number, output[-2000:]
    status = json.loads((tmp_path / "out/status.json").read_text())
    stopped = status["step"]
    assert 3 <= stopped < 120
    assert (status["code"], status["checkpoint"].split("/")[-1]) == (128 + number, f"checkpoint-{stopped}")
    assert len(lora_of(tmp_path / "out")) == 16
    codes, output = forked.run(line)
    assert codes == [0], output[-2000:]
    assert f"step {stopped}" in output
    assert same(lora_of(tmp_path / "out"), lora_of(plain_run(**flags)))
    assert steps_of(tmp_path / "out") == list(range(1, 121))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(forked, tiny_model, six_clips, encodings, tmp_path):
    two = forked.start(words(tiny_model, six_clips, tmp_path / "out", encodings, max_train_steps=2000), processes=2)
    wait_for(lambda: len(steps_of(tmp_path / "out")) >= 3)
    two[1].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in two] == [143, 143]
    assert "process 1 of 2" in two[1].output()
    assert "stopped by SIGTERM after step" in two[0].output()
    assert json.loads((tmp_path / "out/status.json").read_text())["code"] == 143


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_trainer_behind(tiny_model, six_clips, encodings, tmp_path):
    run = start(TWO, words(tiny_model, six_clips, tmp_path / "out", encodings, max_train_steps=20000))
    wait_for(lambda: len(steps_of(tmp_path / "out")) >= 3)
    assert len(family(run.pid)) == 3
    run.kill()
    run.communicate(timeout=60)  # ends when nobody holds the pipe any more
    assert json.loads((tmp_path / "out/status.json").read_text())["code"] == 143
    assert len(lora_of(tmp_path / "out")) == 16


def imports_torch(process):
    """Whether a trainer has begun to import torch, before which it asks the system to tell it of its launcher's end."""
    try:
        words, mapped = (Path(f"/proc/{process.pid}/{name}").read_text() for name in ("cmdline", "maps"))
    except OSError:  # it ended
        return False
    return "torch.distributed.run" not in words and "libtorch" in mapped  # until its exec, a trainer has those of the launcher


@pytest.mark.slow
def test_trainers_that_still_start_end_with_their_launcher_too(tiny_model, six_clips, encodings, tmp_path):
    run = start(TWO, words(tiny_model, six_clips, tmp_path / "out", encodings))
    wait_for(lambda: sum(imports_torch(process) for process in family(run.pid)[1:]) == 2)
    everyone = family(run.pid)  # they import, and then wait for each other in C code, where Python's signal handlers do not run
    run.kill()
    assert wait_for_end(everyone[1:], 20)
    run.communicate()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_single_gpu_script_runs_on_the_variables_of_the_environment_and_passes_a_signal_on(tiny_model, six_clips, tmp_path):
    settings = {"MODEL_PATH": tiny_model, "DATASET_PATH": six_clips, "OUTPUT_PATH": tmp_path / "out", "CACHE_PATH": tmp_path / "cache"}
    flags = words("m", "d", "o", "c", max_train_steps=2000, validation_epochs=0, num_inference_steps=1, mixed_precision="no")[8:]
    run = start(["bash", "finetune_single_gpu.sh"], flags, **{name: str(path) for name, path in settings.items()})
    wait_for(lambda: len(steps_of(tmp_path / "out")) >= 3)
    run.send_signal(signal.SIGUSR1)
    output = run.communicate(timeout=90)[0]
    assert run.returncode == 1  # what accelerate makes of every failure
    assert "process 0 of 1" in output
    assert "stopped by SIGTERM after step" in output, output[-2000:]
    assert json.loads((tmp_path / "out/status.json").read_text())["code"] == 143
    assert len(lora_of(tmp_path / "out")) == 16
    assert (tmp_path / "cache/cogvideox-encodings/clips").is_dir()


@pytest.mark.slow
def test_a_signal_while_encoding_leaves_whole_entries_and_a_second_one_ends_at_once(forked, tiny_model, six_clips, tmp_path):
    line = words(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache", max_num_frames=17, height=128, width=192)
    [run] = forked.start(line)
    wait_for(lambda: list((tmp_path / "cache").glob("clips/??/*.safetensors")))
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 143
    kept = len(list((tmp_path / "cache").glob("clips/??/*.safetensors")))
    assert 1 <= kept < 6
    assert json.loads((tmp_path / "out/status.json").read_text())["code"] == 143  # by which a Slurm job comes back
    listening = "import time; from cogvideox import stopping; stopping.listen(); print('on', flush=True); time.sleep(300)"
    [sleeper] = forked.start([], before=listening)
    wait_for(lambda: "on" in sleeper.output())
    sleeper.send_signal(signal.SIGTERM)
    wait_for(lambda: "SIGTERM: finishing" in sleeper.output())
    time.sleep(stopping.ECHO_SECONDS + 0.5)
    assert sleeper.poll() is None
    sleeper.send_signal(signal.SIGINT)
    assert sleeper.wait(timeout=50) == 130


def test_a_signal_in_validation_leaves_the_video_and_saves(train, tiny_model, six_clips, encodings, tmp_path, monkeypatch):
    from cogvideox import validation

    asked = []

    def strike(*args, **kwargs):
        asked.append(1)
        if len(asked) > 2:
            monkeypatch.setitem(stopping.received, "signal", signal.SIGTERM)
        return validation_step(*args, **kwargs)

    validation_step = validation.stop_sampling_if_requested
    monkeypatch.setattr(validation, "stop_sampling_if_requested", strike)
    with pytest.raises(SystemExit) as stop:
        train(output=tmp_path / "out", validation_prompt="stopped", validation_steps=1, num_inference_steps=2, max_train_steps=50)
    assert stop.value.code == 143
    assert (tmp_path / "out/checkpoint-1/manifest.json").exists()
    assert not list((tmp_path / "out/validation/step-000001").glob("*.mp4")) if (tmp_path / "out/validation/step-000001").exists() else True


# -----------------------------------------------------------------------------
# Numbers


def poisoned(monkeypatch, steps):
    """Make the loss of these optimizer steps not a number."""
    loss, calls = script.velocity_loss, []

    def wrong(transformer, scheduler, batch, rotary, dtype):
        value = loss(transformer, scheduler, batch, rotary, dtype)
        calls.append(1)
        return value * float("nan") if len(calls) - 1 in steps else value  # call 0 is the rehearsal

    monkeypatch.setattr(script, "velocity_loss", wrong)


def test_a_loss_that_is_no_number_updates_nothing_and_is_named(train, plain_run, monkeypatch, capsys):
    clean, unlike = plain_run(max_train_steps=1), plain_run(max_train_steps=3)
    poisoned(monkeypatch, {2})
    skipped = train(max_train_steps=2)
    told = capsys.readouterr().err
    assert "warning: step 2 was skipped" in told
    assert "videos/" in told.split("was skipped")[1]
    assert "at timestep" in told
    assert same(lora_of(clean), lora_of(skipped))
    assert not same(lora_of(clean), lora_of(unlike))


def test_too_many_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(train, monkeypatch, capsys, tmp_path):
    poisoned(monkeypatch, set(range(4, 99)))
    with pytest.raises(SystemExit) as stop:
        train(output=tmp_path / "out", max_train_steps=50, checkpointing_steps=3, max_skipped_steps=2)
    assert stop.value.code == 5
    assert "2 consecutive steps" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((tmp_path / "out/status.json").read_text())["code"] == 5
    assert all(torch.isfinite(t).all() for t in lora_of(tmp_path / "out").values())


def test_a_learning_rate_that_blows_up_never_leaves_weights_that_are_no_numbers(train, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(output=tmp_path / "out", learning_rate=1e30, max_train_steps=40, checkpointing_steps=1, max_grad_norm=0, max_skipped_steps=3)
    assert stop.value.code in (4, 5)
    for folder in [tmp_path / "out", *(tmp_path / "out").glob("checkpoint-*")]:
        if (folder / "pytorch_lora_weights.safetensors").exists():
            assert all(torch.isfinite(t).all() for t in lora_of(folder).values())


def test_one_bad_loss_on_one_of_two_processes_skips_the_step_on_both(forked, tiny_model, six_clips, encodings, tmp_path):
    bad_item = (
        "import dataset\n"
        "item = dataset.TrainingClips.__getitem__\n"
        "def bad(self, position):\n"
        "    found = item(self, position)\n"
        "    if position == 3: found['noise'] = found['noise'] * float('nan')\n"
        "    return found\n"
        "dataset.TrainingClips.__getitem__ = bad\n"
    )
    line = words(tiny_model, six_clips, tmp_path / "out", encodings, max_train_steps=4)
    codes, output = forked.run(line, processes=2, before=bad_item)
    assert codes == [0, 0], output[-2000:]
    assert "step 2 was skipped" in output  # position 3 is the second process's clip of step 2
    assert output.count("was skipped") == 1
    assert steps_of(tmp_path / "out") == [1, 2, 3, 4]
    assert all(torch.isfinite(t).all() for t in lora_of(tmp_path / "out").values())


def test_out_of_memory_is_answered_with_flags(train, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(script, "velocity_loss", full)
    with pytest.raises(SystemExit) as stop:
        train()
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert "out of memory (in the rehearsal" in told
    assert told.index("--gradient_checkpointing all") < told.index("--train_batch_size 1") < told.index("--rank")


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB"), True),
        (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"), True),
        (RuntimeError("HIP error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.5\n"
                "Last error:\nCuda failure 2 'out of memory'"
            ),
            True,
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
            True,
        ),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] data. DefaultCPUAllocator: not enough memory: you tried to allocate 1 B"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("out of memory"), False),
    ],
    ids=lambda value: str(value)[:70].replace("\n", " "),
)
def test_every_librarys_word_for_too_little_memory_is_explained(error, explained, capsys):
    with pytest.raises(SystemExit if explained else type(error)), stopping.explained_memory("in step 3", 30, lambda: "12.00 GiB"):
        raise error
    told = capsys.readouterr().err
    assert ("out of memory (in step 3)" in told and "Peak so far: 12.00 GiB" in told) == explained


# -----------------------------------------------------------------------------
# The rehearsal


@pytest.mark.slow
def test_the_rehearsal_leaves_no_trace_in_training(train, monkeypatch):
    rehearsed = train(max_train_steps=3, lora_dropout=0.1)
    real = rehearsal.rehearse
    monkeypatch.setattr(rehearsal, "rehearse", lambda *args, **kwargs: rehearsal.Measured(0.0, 0.0, 0.0, 0.0, 0.0))
    assert same(lora_of(rehearsed), lora_of(train(max_train_steps=3, lora_dropout=0.1)))
    moved = []

    def forgetful(args, trained, *rest):
        found = real(args, trained, *rest)
        with torch.no_grad():
            trained.parameters[0].mul_(2)
        moved.append(1)
        return found

    monkeypatch.setattr(rehearsal, "rehearse", forgetful)
    assert not same(lora_of(rehearsed), lora_of(train(max_train_steps=3, lora_dropout=0.1)))
    assert moved


def test_a_dry_run_tells_time_memory_and_disk_and_trains_nothing(train, capsys):
    folder = train(dry_run=True, max_train_steps=1000, checkpointing_steps=100)
    told = capsys.readouterr().err
    for word in (
        "seconds per step",
        "hours for 1000 steps",
        "peak",
        "trainable parameters",
        "MiB per checkpoint",
        "for 10 of them",
        "| TRAINING |",
        "nothing was trained",
    ):
        assert word in told
    left = {p.name for p in folder.iterdir()} - {".lock", ".files_of_runs.jsonl", "encoded", "dataset.json", "dataset_report.txt"}
    assert left == set()


def test_what_would_fail_at_the_end_fails_before_the_first_step(train, monkeypatch, capsys, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("no encoder for mp4")

    monkeypatch.setattr(rehearsal, "write_video", broken)
    with pytest.raises(SystemExit) as stop:
        train(output=tmp_path / "out")
    assert stop.value.code == 4
    assert "no encoder for mp4" in capsys.readouterr().err
    assert not (tmp_path / "out/metrics.jsonl").exists()
    assert not (tmp_path / "out/.rehearsal").exists()


# -----------------------------------------------------------------------------
# Starting from a LoRA, two runs, dead processes, long validations


@pytest.mark.numeric
@pytest.mark.slow
def test_a_run_can_start_from_the_lora_of_another(train, tmp_path, capsys):
    first = train(max_train_steps=5, rank=4, lora_alpha=2)
    same_place = train(init_lora=str(first), learning_rate=0, rank=4, lora_alpha=8)  # another alpha: the strength stays
    for name, tensor in lora_of(first).items():
        torch.testing.assert_close(lora_of(same_place)[name], tensor, rtol=1e-6, atol=1e-8)
    on = lora_of(train(init_lora=str(first), rank=4))
    assert not same(on, lora_of(first))
    for flags, sentence in (
        ({"rank": 8}, "(rank, inputs, outputs) (4, 32, 32) in it and (8, 32, 32)"),
        ({"init_lora": str(tmp_path / "nothing")}, "no such file"),
    ):
        with pytest.raises(SystemExit) as stop:
            train(**({"init_lora": str(first)} | flags))
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_lives(train, tmp_path, capsys):
    from cogvideox.launch import lock_folder

    (tmp_path / "out").mkdir()
    lock = lock_folder(tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        train(output=tmp_path / "out")
    assert stop.value.code == 4
    assert "another run is writing there" in capsys.readouterr().err
    del lock
    assert len(lora_of(train(output=tmp_path / "out"))) == 16


@pytest.mark.slow
def test_a_dead_process_ends_the_other_within_a_minute(tiny_model, six_clips, encodings, tmp_path):
    run = start(TWO, words(tiny_model, six_clips, tmp_path / "out", encodings, max_train_steps=5000, checkpointing_steps=3))
    wait_for(lambda: (tmp_path / "out/checkpoint-3/manifest.json").exists())
    family(run.pid)[2].send_signal(signal.SIGKILL)
    began = time.monotonic()
    output = run.communicate(timeout=60)[0]
    assert time.monotonic() - began < 60
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in output or "exitcode: -9" in output.replace(" ", " ")


def test_a_main_process_that_does_not_answer_is_named(monkeypatch, capsys):
    from cogvideox import launch

    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        launch.wait_for_main_process(seconds=1.5)
    assert stop.value.code == 2
    assert "no answer from the main process at 127.0.0.1:9" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Kills and full disks


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_unbroken_one(
    forked, tiny_model, six_clips, encodings, tmp_path, processes
):
    flags = {"max_train_steps": 40, "checkpointing_steps": 2, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    flags |= {"gradient_accumulation_steps": 2, "lr_scheduler": "linear"}
    line = words(tiny_model, six_clips, tmp_path / "killed", encodings, **flags)
    for number in range(3):
        run = forked.start(line, processes)
        target = 8 * (number + 1)
        wait_for(lambda run=run, target=target: max(steps_of(tmp_path / "killed"), default=0) >= target or run[0].poll() is not None)
        assert all(process.poll() is None for process in run), run[0].output()[-2000:]
        strike([one for process in run for one in family(process.pid)], signal.SIGKILL)
        codes = [process.wait(60) for process in run]
        assert codes[0] == -signal.SIGKILL
        assert all(codes)  # the second may see the first one's end before its own
    for folder in ("killed", "straight"):
        codes, output = forked.run(words(tiny_model, six_clips, tmp_path / folder, encodings, **flags), processes)
        assert codes == [0] * processes, output[-2000:]
    assert same(lora_of(tmp_path / "killed"), lora_of(tmp_path / "straight"))
    for name in ("optimizer.safetensors", "state.json"):
        assert (tmp_path / f"killed/checkpoint-40/{name}").read_bytes() == (tmp_path / f"straight/checkpoint-40/{name}").read_bytes()
    assert steps_of(tmp_path / "killed") == list(range(1, 41))


def test_a_half_written_checkpoint_is_removed_and_said(train, plain_run, tmp_path, capsys):
    folder = shutil.copytree(plain_run(checkpointing_steps=1), tmp_path / "run")
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-3.partial")
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=3)
    assert "removed checkpoint-3.partial" in capsys.readouterr().err
    assert not (folder / "checkpoint-3.partial").exists()


@pytest.mark.slow
def test_saving_does_not_hold_up_training(train, monkeypatch):
    """The second checkpoint is written slowly; the steps after it are logged before it is there."""
    from cogvideox import checkpoint

    write, seen = checkpoint.write_checkpoint, []

    def slow(output_dir, step, *rest):
        if step == 2:
            deadline = time.monotonic() + 20
            while len(steps_of(output_dir)) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(len(steps_of(output_dir)))
        return write(output_dir, step, *rest)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    folder = train(max_train_steps=3, checkpointing_steps=1)
    assert seen == [3]
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_pickle_in_a_checkpoint_is_never_run(train, plain_run, tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = shutil.copytree(plain_run(checkpointing_steps=1), tmp_path / "run")
    for name in ("optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.safetensors"):
        (folder / "checkpoint-2" / name).write_bytes(pickle.dumps(Payload()))
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=3)  # falls back to checkpoint-1
    assert not (tmp_path / "ran").exists()


# -----------------------------------------------------------------------------
# Branches, leftovers and what must not be deleted


@pytest.mark.slow
def test_a_branch_that_was_left_is_set_aside_and_never_wins_over_the_new_one(train, plain_run, tmp_path, capsys):
    folder = shutil.copytree(plain_run(max_train_steps=4, checkpointing_steps=1), tmp_path / "run")
    damaged = folder / "checkpoint-4/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(output=folder, resume_from_checkpoint="checkpoint-2", max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-3.abandoned", "checkpoint-4.abandoned"]
    assert "renamed a checkpoint of a later step to checkpoint-4.abandoned" in capsys.readouterr().err
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=5)
    assert "checkpoint-3, step 3" in capsys.readouterr().err
    assert same(lora_of(folder), lora_of(plain_run(max_train_steps=5)))


def test_a_run_that_only_encoded_does_not_stand_in_its_own_way(train, tmp_path):
    (tmp_path / "out/encoded").mkdir(parents=True)
    (tmp_path / "out/metrics.jsonl").write_text("")
    assert len(lora_of(train(output=tmp_path / "out"))) == 16


@pytest.mark.slow
def test_a_run_killed_in_its_last_validation_gets_its_videos_and_card_on_the_next_start(train, plain_run, tmp_path):
    flags = {"validation_prompt": "a rabbit", "resume_from_checkpoint": "latest"}
    folder = shutil.copytree(plain_run(**flags), tmp_path / "run")
    whole = lora_of(folder)
    shutil.rmtree(folder / "validation/step-000002")
    for name in ("README.md", "loss.png", "pytorch_lora_weights.safetensors"):
        (folder / name).unlink()
    train(output=folder, **flags)
    assert len(list((folder / "validation/step-000002").glob("*.mp4"))) == 1
    assert (folder / "README.md").exists()
    assert (folder / "loss.png").exists()
    assert same(lora_of(folder), whole)


@pytest.mark.slow
def test_pictures_that_cannot_be_made_cost_nothing_but_themselves(train, monkeypatch, capsys, tmp_path):
    from cogvideox import preview, validation

    def broken(*args, **kwargs):
        raise OSError("no space for a picture")

    monkeypatch.setattr(validation, "contact_sheet", broken)
    monkeypatch.setattr(preview, "contact_sheet", broken)
    folder = train(validation_prompt="a rabbit", cache=tmp_path / "cache")
    assert capsys.readouterr().err.count("no space for a picture") >= 3
    assert len(lora_of(folder)) == 16


@pytest.mark.parametrize("wrong", ["zero", "twice as strong"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_check_fails_for_a_wrong_file_in_every_precision(tiny_model, tmp_path, capsys, wrong, dtype):
    from cogvideox import checkpoint, lora
    from cogvideox.model import load_transformer

    transformer = load_transformer(tiny_model, dtype)
    parameters = lora.add_lora(transformer, 4, 2.0, 0.0, ["to_q", "to_v"], seed=0)
    lora.write(tmp_path, lora.export(transformer, lora.live_state(transformer)), {})
    checkpoint.report_export(lora, tmp_path, transformer)
    assert "inconclusive" in capsys.readouterr().err  # nothing is learned yet
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=3e-2, generator=generator)  # a young LoRA: its effect is a few roundings of bf16
    lora.write(tmp_path, lora.export(transformer, lora.live_state(transformer)), {})
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        checkpoint.report_export(lora, tmp_path, transformer)
        assert ": PASS" in capsys.readouterr().err
        state = lora.export(transformer, lora.live_state(transformer))
        factor = 0.0 if wrong == "zero" else 2.0
        lora.write(tmp_path, {n: t * factor if "lora_B" in n else t for n, t in state.items()}, {})
        checkpoint.report_export(lora, tmp_path, transformer)
    assert ": FAIL" in capsys.readouterr().err


def test_a_target_that_is_no_layer_is_told_before_anything_is_encoded(train, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(target_modules=["to_q", "tov", "proj"], cache=tmp_path / "cache")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--target_modules tov: the transformer has no such linear layer" in said
    assert "--target_modules proj: also matches patch_embed.proj (Conv2d)" in said
    assert not (tmp_path / "cache/clips").exists()


@pytest.mark.slow
def test_validation_with_buckets_takes_the_most_common_trained_shape(train):
    folder = train(bucket=["64x48", "9"], validation_prompt="a rabbit")
    settings = json.loads((folder / "validation/step-000000/videos.json").read_text())["settings"]
    assert (settings["height"], settings["width"], settings["num_frames"]) == (64, 48, 9)
    assert "height=64, width=48" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_process_that_dies_while_encoding_ends_the_other_too(forked, tiny_model, six_clips, tmp_path):
    line = words(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache", height=128, width=192, max_num_frames=17)
    two = forked.start(line, processes=2)
    wait_for(lambda: list((tmp_path / "cache").rglob("clips/??/*.safetensors")))
    kill_all_of(two[1])
    assert two[0].wait(80) > 0
    assert "process 1 of 2" in two[1].output()
