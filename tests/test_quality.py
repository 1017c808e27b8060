"""Time to quality: its tasks' clips, the arithmetic on courses that are known, and the command on a few clips."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from cogvideox.video import read_video
from demo.tasks import TASKS, camera_roll, rolling_ball, write_task
from tests.conftest import ROOT, environment
from tools import quality
from tools.benchmark import __main__ as command
from tools.quality import SETTINGS, course_of, reached, rows_of, rows_of_all, target_of, write_halves

CLIP = ROOT / "demo/dataset/videos/60.mp4"


def course(*losses, seconds=1.0):
    """Scores every 10 steps, each after so many seconds more."""
    return [(10 * i, seconds * i, loss) for i, loss in enumerate((0.0, *losses))]


def test_the_target_is_reached_between_two_scores_as_on_a_line():
    assert reached(course(-0.1, -0.3), 0.2) == pytest.approx((15, 1.5))
    assert reached(course(-0.2, -0.1), 0.2) == pytest.approx((10, 1.0))
    assert reached(course(-0.1, -0.19), 0.2) is None


def test_a_runs_seconds_are_its_median_pace_times_its_steps(tmp_path):
    score = {"eval_held_out_base_loss": 0.5, "eval_train_loss": 0.5, "eval_train_base_loss": 0.5}
    lines = [{"step": 0, "eval_held_out_loss": 0.5} | score]
    for step, seconds, loss in ((10, 0.1, 0.45), (20, 9.0, 0.4), (30, 0.2, 0.4)):
        lines += [{"step": step, "seconds_per_step": seconds}, {"step": step, "eval_held_out_loss": loss} | score]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, seconds, shares = zip(*course_of(tmp_path), strict=True)
    assert steps == (0, 10, 20, 30)
    assert seconds == pytest.approx((0, 2, 4, 6))
    assert shares == pytest.approx((0, -0.1, -0.2, -0.2))


def test_a_ratio_is_the_median_over_the_seeds_and_a_run_that_never_gets_there_counts_as_none():
    slow = [course(-0.1, -0.2), course(-0.1, -0.2), course(-0.1, -0.2)]
    quick = [course(-0.2, -0.3), course(-0.2, -0.1, seconds=0.5), course(-0.1, -0.1)]
    guide, ours = rows_of({"guide": slow, "ours": quick}, 0.2)
    assert (guide["got_there"], guide["times_faster"], guide["times_fewer_steps"]) == ("3 of 3", "1.00 (1.00-1.00)", "1.00 (1.00-1.00)")
    assert (ours["got_there"], ours["times_faster"]) == ("2 of 3", "2.00 (0.00-4.00)")
    assert ours["times_fewer_steps"] == "2.00 (0.00-2.00)"
    assert (ours["steps"], ours["held_out_at_the_end"], ours["lowest"]) == ("10 (10-10)", "-10.0 %", "-20.0 %")


def test_the_target_is_what_every_seed_of_the_first_settings_reaches():
    runs = [course(-0.1, -0.3), course(-0.4, -0.2), course(-0.1, -0.25)]
    assert target_of(runs) == 0.2
    assert all(reached(run, 0.2) for run in runs)
    assert not reached(runs[1], 0.41)
    assert target_of([course(0.1)]) == 0.001


def test_the_table_of_all_tasks_has_each_tasks_own_target():
    tasks = {
        "style": {"guide": [course(-0.1, -0.2)], "ours": [course(-0.2, -0.3, seconds=0.5)]},
        "motion": {"guide": [course(-0.1, -0.1)], "ours": [course(-0.05, -0.05)]},
    }
    guide, ours = rows_of_all(tasks, {task: target_of(runs["guide"]) for task, runs in tasks.items()})
    assert list(guide.values()) == ["guide", "1.00", "1.00", "1.00", "1.00", "-20.0 %", "-10.0 %"]
    assert list(ours.values()) == ["ours", "2.00", "0.00", "4.00", "0.00", "-30.0 %", "-5.0 %"]


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_clips_depend_on_the_source_and_the_seed_alone(task):
    frames, change = read_video(CLIP)[:5], TASKS[task][0]
    made = change(frames, 3)
    assert (made.dtype, made.shape) == (np.uint8, frames.shape)
    assert np.array_equal(made, change(frames.copy(), 3))
    assert not np.array_equal(made, change(frames, 4))
    assert not np.array_equal(made, change(255 - frames, 3))
    assert np.abs(made.astype(float) - frames).mean() > 5


def test_the_ball_is_in_every_frame_and_the_rest_of_the_scene_stays():
    frames = np.full((9, 160, 240, 3), 90, np.uint8)
    covered = (rolling_ball(frames, 1) != frames).any(-1)
    assert covered.mean((1, 2)).min() > 0.25
    assert covered.mean((1, 2)).max() < 0.35
    middles = np.array([np.argwhere(frame).mean(0) for frame in covered])
    assert (np.diff(middles[:, 1]) > 5).all()  # it rolls to the right
    assert np.ptp(middles[:, 0]) < 2


def test_the_camera_rolls_by_a_quarter_and_shows_no_empty_corner():
    frames = np.full((9, 160, 160, 3), 200, np.uint8)
    assert (camera_roll(frames, 0) == 200).all()
    frames[:, :80] = 0  # dark above, light below
    rolled = camera_roll(frames, 0)[..., 0] > 100
    angles = []
    for frame in rolled:
        down, right = np.argwhere(frame).mean(0) - 79.5
        angles.append(np.degrees(np.arctan2(right, down)))
    turns = np.diff(np.unwrap(angles, period=360))
    assert abs(turns.sum()) == pytest.approx(90, abs=2)
    assert len(set(np.sign(turns))) == 1


@pytest.mark.slow
def test_a_tasks_folder_has_every_clip_and_no_trigger_word(tmp_path):
    write_task("motion", tmp_path / "clips")
    train, held_out = write_halves(tmp_path / "clips", tmp_path)
    assert [len((half / "videos.txt").read_text().splitlines()) for half in (train, held_out)] == [30, 8]
    assert "BUNNYTOON" not in (train / "prompts.txt").read_text()
    first = (train / "videos.txt").read_text().splitlines()[0]
    assert read_video(train / first).shape == (49, 160, 240, 3)


def some_clips(folder):
    """Ten of the demo's clips, as they are."""
    (folder / "videos").mkdir(parents=True)
    source = ROOT / "demo/dataset"
    for name in ("prompts.txt", "videos.txt"):
        lines = (source / name).read_text().splitlines()[:10]
        (folder / name).write_text("\n".join(lines) + "\n")
    for line in lines:
        os.link(source / line, folder / line)
    return folder


def test_no_clip_is_in_both_halves(tmp_path):
    halves = write_halves(some_clips(tmp_path / "clips"), tmp_path)
    names = [set((half / "videos.txt").read_text().split()) for half in halves]
    assert [len(half) for half in names] == [8, 2]
    assert not names[0] & names[1]
    assert all((half / name).exists() for half, own in zip(halves, names, strict=True) for name in own)


def test_the_guides_settings_are_those_of_its_script():
    script = (ROOT / "finetune_single_gpu.sh").read_text()
    words = SETTINGS["guide"].split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        if f"  {name} " in script:
            assert f"  {name} {value} " in script.replace("\n", " "), name
    assert f"  --learning_rate {words[words.index('--learning_rate') + 1]} " in script


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--target", "2"], "--target 2.0: must be above 0 and below 1"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_runs(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["quality", *words])
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert sentence in told.err


@pytest.mark.parametrize("names", [["guide"], ["guide", "rank_32", "cosine"]])
def test_settings_are_named_on_the_line(names):
    assert quality.parse(["--settings", *names, "--tasks", "motion"]).settings == names


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_command_trains_compares_and_does_not_train_again(tmp_path):
    for task in TASKS:
        some_clips(tmp_path / task / "clips")
    words = [
        "--work_dir",
        tmp_path,
        "--seeds",
        1,
        "--steps",
        6,
        "--first_steps",
        8,
        "--eval_steps",
        3,
        "--target",
        0.0001,
        "--json",
        tmp_path / "all.json",
    ]
    command = [sys.executable, "-m", "tools.benchmark", "quality", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| guide |") == done.stdout.count("| defaults |") == len(TASKS) + 1
    courses = json.loads((tmp_path / "all.json").read_text())["courses"]
    for task, (_, trigger, _) in TASKS.items():
        guide, defaults = courses[task]["guide"][0], courses[task]["defaults"][0]
        assert [score[0] for score in guide] == [0, 4, 8]
        assert [score[0] for score in defaults] == [0, 3, 6]
        assert guide[0][2] == 0
        assert guide != defaults
        facts = json.loads((tmp_path / task / "guide-8-steps-seed0/run.json").read_text())
        assert trigger in json.dumps(facts)
    written = (tmp_path / "style/guide-8-steps-seed0/metrics.jsonl").stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert again.stdout == done.stdout
    assert (tmp_path / "style/guide-8-steps-seed0/metrics.jsonl").stat().st_mtime_ns == written


@pytest.mark.long
def test_a_run_that_fails_ends_the_command_with_what_the_trainer_said(tmp_path):
    some_clips(tmp_path / "style/clips")
    (tmp_path / "model").mkdir()
    words = ["--work_dir", tmp_path, "--tasks", "style", "--model", tmp_path / "model"]
    command = [sys.executable, "-m", "tools.benchmark", "quality", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "style, guide, seed 0: the trainer ended with code" in done.stderr
    assert str(tmp_path / "model") in done.stderr
