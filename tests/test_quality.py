"""Time to quality: the arithmetic on courses that are known, and the command on a few clips."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment
from tools.benchmark import __main__ as command
from tools.quality import SETTINGS, reached, rows_of, write_halves


def course(*losses, seconds=1.0):
    """Scores every 10 steps, each after so many seconds more."""
    return [(10 * i, seconds * i, loss) for i, loss in enumerate((0.0, *losses))]


def test_the_target_is_reached_between_two_scores_as_on_a_line():
    assert reached(course(-0.1, -0.3), 0.2) == pytest.approx((15, 1.5))
    assert reached(course(-0.2, -0.1), 0.2) == pytest.approx((10, 1.0))
    assert reached(course(-0.1, -0.19), 0.2) is None


def test_a_ratio_is_the_median_over_the_seeds_and_a_run_that_never_gets_there_counts_as_none():
    slow = [course(-0.1, -0.2), course(-0.1, -0.2), course(-0.1, -0.2)]
    quick = [course(-0.2, -0.3), course(-0.2, -0.1, seconds=0.5), course(-0.1, -0.1)]
    guide, ours = rows_of({"guide": slow, "ours": quick}, 0.2)
    assert (guide["got_there"], guide["times_faster"]) == ("3 of 3", "1.00 (1.00-1.00)")
    assert (ours["got_there"], ours["times_faster"]) == ("2 of 3", "2.00 (0.00-4.00)")
    assert (ours["steps"], ours["held_out_at_the_end"], ours["lowest"]) == ("10 (10-10)", "-10.0 %", "-20.0 %")


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


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_command_trains_compares_and_does_not_train_again(tmp_path):
    some_clips(tmp_path / "old_film")
    words = ["--work_dir", tmp_path, "--seeds", 1, "--steps", 6, "--eval_steps", 3, "--target", 0.0001, "--json", tmp_path / "all.json"]
    command = [sys.executable, "-m", "tools.benchmark", "quality", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| guide |" in done.stdout
    assert "| defaults |" in done.stdout
    courses = json.loads((tmp_path / "all.json").read_text())["courses"]
    assert [score[0] for score in courses["guide"][0]] == [0, 3, 6]
    assert courses["guide"][0][0][2] == 0
    assert courses["guide"] != courses["defaults"]
    written = (tmp_path / "guide-seed0/metrics.jsonl").stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert again.stdout == done.stdout
    assert (tmp_path / "guide-seed0/metrics.jsonl").stat().st_mtime_ns == written
