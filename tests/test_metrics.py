"""When a step is logged, what a line holds, and when gradients that are not finite end the run. No training run."""

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from cogvideox import metrics
from cogvideox.files import read_json_lines
from tests.stand_ins import OneProcess, TrackerPackage, clips_of, flags_of, make_trained, plan_of
from train_cogvideox_lora import StepResult


def step_result(*losses, finite=True, waited=0.0):
    """The result of a step with one clip a micro-batch."""
    numbers = range(len(losses))
    return StepResult(
        [torch.tensor(float(loss)) for loss in losses],
        [torch.tensor([number]) for number in numbers],
        [torch.tensor([100 + number]) for number in numbers],
        grad_norm=0.5 if finite else math.nan,
        finite=finite,
        learning_rate=1e-3,
        seconds_waited=waited,
    )


def meter_of(folder, first_step=0, accelerator=None, plan=None, **flags):
    return metrics.Meter(flags_of(folder, **flags), make_trained(accelerator), plan or plan_of(), first_step)


def run(meter, first_step, total_steps, loss_of=float):
    """The steps of a run as main takes them, as far as numbers go. loss_of: step -> its loss."""
    for step in meter.bar(first_step + 1, total_steps):
        meter.offer(step, step_result(loss_of(step)), last=step == total_steps)
    return read_json_lines(meter.file.path)


@pytest.mark.parametrize(
    ("flags", "first_step", "total", "steps"),
    [
        ({"logging_steps": 1}, 0, 3, [1, 2, 3]),
        ({"logging_steps": 2}, 0, 5, [2, 4, 5]),  # every N steps, and the last one
        ({"logging_steps": 2}, 0, 4, [2, 4]),  # a last step that is due by itself is logged once
        ({"logging_steps": 10}, 0, 3, [3]),
        ({"logging_steps": 10, "checkpointing_steps": 2}, 0, 5, [2, 4, 5]),  # at every checkpoint too
        ({"logging_steps": 2}, 3, 7, [4, 6, 7]),  # a resumed run counts from the first step of the run
    ],
)
def test_when_a_step_is_logged(flags, first_step, total, steps, tmp_path):
    meter = meter_of(tmp_path, first_step, **flags)
    assert [line["step"] for line in run(meter, first_step, total)] == steps
    assert [step for step, _ in meter.trained.accelerator.logged] == steps


def test_a_line_has_the_mean_loss_since_the_line_before_and_the_epoch(tmp_path):
    plan = plan_of(clips=4, clips_per_step=3)
    lines = run(meter_of(tmp_path, plan=plan, logging_steps=2), 0, 5, loss_of=lambda step: 10.0**step)
    assert [line["loss"] for line in lines] == pytest.approx([(10 + 100) / 2, (1e3 + 1e4) / 2, 1e5])
    assert [line["epoch"] for line in lines] == [1.5, 3.0, 3.75]
    assert all((line["grad_norm"], line["learning_rate"]) == (0.5, 1e-3) for line in lines)


@pytest.mark.parametrize(("pauses", "seconds"), [(True, [2.0, 2.0]), (False, [2.0, 102.0])])
def test_the_clock_stands_still_while_the_loop_is_paused(pauses, seconds, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    meter = meter_of(tmp_path)
    for step in meter.bar(1, 2):
        clock.now += 2
        meter.offer(step, step_result(1.0, waited=0.5))
        with meter.paused() if pauses else contextlib.nullcontext():
            clock.now += 100
    lines = read_json_lines(meter.file.path)
    assert [line["seconds_per_step"] for line in lines] == seconds
    assert [line["data_wait_percent"] for line in lines] == pytest.approx([100 * 0.5 / length for length in seconds])


def test_a_resumed_run_keeps_the_lines_up_to_its_step_and_a_new_run_none(tmp_path):
    run(meter_of(tmp_path), 0, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a kill cut this line
    assert [line["loss"] for line in run(meter_of(tmp_path, first_step=3), 3, 4, loss_of=lambda step: -step)] == [1, 2, 3, -4]
    assert [line["step"] for line in run(meter_of(tmp_path), 0, 2)] == [1, 2]


def test_another_rank_writes_no_file(tmp_path):
    meter = meter_of(tmp_path, accelerator=OneProcess(process_index=1))
    run(meter, 0, 2)
    assert not list(tmp_path.iterdir())
    assert meter.trained.accelerator.logged == []


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, capsys):
    meter = meter_of(tmp_path)

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    file, meter.file.file = meter.file.file, Full()
    for step in meter.bar(1, 3):
        if step == 3:
            meter.file.file = file  # there is room again
        meter.offer(step, step_result(1.0))
    assert [line["step"] for line in read_json_lines(meter.file.path)] == [3]
    told = capsys.readouterr().err
    assert "step 2 was not written to metrics.jsonl (No space left on device)" in told
    assert "step 3 is missing" not in told


# -----------------------------------------------------------------------------
# Gradients that are not finite


class Newest:
    """A checkpointer that has written `path` last."""

    def __init__(self, path=None):
        self.path = path

    def newest(self):
        return self.path


def guard_of(folder, checkpoint=None, engine=DistributedType.NO, clips=3, **flags):
    data, trained = clips_of(clips), make_trained(OneProcess(distributed_type=engine))
    return metrics.NonFiniteGuard(flags_of(folder, **flags), trained, lambda position: position, data.records, Newest(checkpoint))


def ended_after(guard, outcomes):
    """The step in which a run with these gradients (finite or not) ends; None if it goes on to the last."""
    for step, finite in enumerate(outcomes, start=1):
        try:
            guard.check(step, step_result(1.0, finite=finite))
        except SystemExit:
            return step
    return None


@pytest.mark.parametrize(
    ("flags", "outcomes", "step"),
    [
        ({"max_skipped_steps": 3}, [True] * 5, None),
        ({"max_skipped_steps": 3}, [False, False, False, True], 3),  # N consecutive steps
        ({"max_skipped_steps": 3}, [False, False, True, False, False], None),  # a good one in between counts from the start again
        ({"max_skipped_steps": 1}, [True, False], 2),
        ({"max_skipped_steps": 3, "engine": DistributedType.DEEPSPEED}, [True, False], 2),  # the step cannot be undone there
    ],
)
def test_when_gradients_that_are_not_finite_end_the_run(flags, outcomes, step, tmp_path):
    assert ended_after(guard_of(tmp_path, **flags), outcomes) == step
    assert (tmp_path / "status.json").exists() is (step is not None)


def test_the_clips_whose_loss_was_not_finite_are_named(tmp_path, capsys):
    guard_of(tmp_path).check(7, step_result(1.0, math.nan, math.inf, finite=False))
    told = capsys.readouterr().err
    assert "step 7 was skipped for a non-finite gradient: videos/1.mp4 at timestep 101 (loss nan)" in told
    assert "videos/2.mp4 at timestep 102 (loss inf)" in told
    assert "videos/0.mp4" not in told
    guard_of(tmp_path).check(8, step_result(1.0, finite=False))
    assert "step 8 was skipped for a non-finite gradient: every loss was finite" in capsys.readouterr().err
    guard_of(tmp_path).check(9, step_result(1.0))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("checkpoint", [None, "out/checkpoint-4"])
def test_the_end_names_the_last_good_checkpoint(checkpoint, tmp_path, capsys):
    assert ended_after(guard_of(tmp_path, checkpoint, max_skipped_steps=2), [False, False]) == 2
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["code"], status["step"], status["checkpoint"]) == (5, 2, checkpoint)
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    assert (
        f"ERROR[5]: 2 consecutive steps had a non-finite gradient (check --learning_rate and --mixed_precision); {kept}"
        in capsys.readouterr().err
    )


def test_only_the_main_process_opens_trackers(tmp_path, monkeypatch):
    package = TrackerPackage(monkeypatch, "wandb")
    for rank in (1, 0):
        accelerator = OneProcess(process_index=rank)
        accelerator.init_trackers = lambda name, config, init_kwargs: package.init(project=name, **init_kwargs["wandb"])
        accelerator.project_configuration = SimpleNamespace(set_directories=lambda folder: None)
        metrics.open_trackers(flags_of(tmp_path, report_to="wandb", logging_dir="logs", tracker_name="mine"), accelerator)
        assert package.of("init") == ([] if rank else [{"project": "mine", "dir": str(tmp_path / "logs")}])
