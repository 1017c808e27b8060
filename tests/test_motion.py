"""Motion: noise, flicker and shake do not count, what moves does; and what the verdict makes of it."""

from types import SimpleNamespace

import numpy as np
import pytest

from cogvideox import flags, motion, scoring, survey
from cogvideox.decode import Framing
from cogvideox.video import write_video
from dataset import read_records

FRAMES, HEIGHT, WIDTH = 17, 64, 96
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
PICTURE = 128 + 60 * np.sin(9 * X / WIDTH) * np.cos(7 * Y / HEIGHT)


def video(pictures):
    """uint8 frames of pictures [F, H, W]."""
    return np.repeat(np.clip(pictures, 0, 255).round().astype(np.uint8)[..., None], 3, axis=-1)


def still(frames=FRAMES):
    return np.repeat(PICTURE[None], frames, axis=0)


def with_square(frames=FRAMES, pixels=4):
    """A square that moves by so many pixels a frame."""
    pictures = still(frames)
    for frame, picture in enumerate(pictures):
        picture[20:36, int(frame * pixels) : int(frame * pixels) + 16] = 230
    return pictures


def soft_grain(random):
    """Grain of a few pixels, as a VAE makes it, with a deviation of 10 grey levels."""
    noise = random.normal(0, 1, (FRAMES, HEIGHT, WIDTH))
    for axis in (1, 2):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    return 10 * noise / noise.std()


def test_a_still_picture_has_no_motion_and_a_single_one_none_at_all():
    assert motion.motion(video(still()), 8) == 0
    assert motion.motion(video(np.zeros((FRAMES, HEIGHT, WIDTH))), 8) == 0
    assert motion.motion(video(still(1)), 8) is None
    assert motion.motion(video(still(5)), 8) == 0  # shorter than half a second and a frame


@pytest.mark.parametrize("kind", ["grain", "soft grain", "flicker", "brightness", "fade", "shake"])
def test_what_changes_each_frame_anew_is_no_motion_and_hides_none(kind):
    random = np.random.default_rng(0)
    shifts = random.integers(-1, 2, (FRAMES, 2))
    changes = {
        "grain": lambda pictures: pictures + random.normal(0, 15, pictures.shape),
        "soft grain": lambda pictures: pictures + soft_grain(random),
        "flicker": lambda pictures: pictures * random.uniform(0.8, 1.1, (FRAMES, 1, 1)),
        "brightness": lambda pictures: pictures + random.normal(0, 12, (FRAMES, 1, 1)),
        "fade": lambda pictures: pictures * np.linspace(0.7, 1, FRAMES)[:, None, None],
        "shake": lambda pictures: np.stack([np.roll(one, shift, (0, 1)) for one, shift in zip(pictures, shifts, strict=True)]),
    }
    moving = motion.motion(video(with_square()), 8)
    assert moving > 20
    assert np.abs(np.diff(video(changes[kind](still())).astype(float), axis=0)).mean() > 0.5  # it does change the frames
    assert motion.motion(video(changes[kind](still())), 8) < 0.2 * moving
    assert motion.motion(video(changes[kind](with_square())), 8) == pytest.approx(moving, rel=0.25)


def test_motion_is_per_second_and_grows_with_speed_and_does_not_depend_on_the_size():
    moving = motion.motion(video(with_square(17, 2)), 8)
    assert motion.motion(video(with_square(33, 1)), 16) == pytest.approx(moving, rel=0.1)
    assert motion.motion(video(with_square(17, 1)), 8) < 0.8 * moving
    larger = np.repeat(np.repeat(with_square(17, 2), 3, axis=1), 3, axis=2)
    assert motion.motion(video(larger), 8) == pytest.approx(moving, rel=0.1)


@pytest.mark.slow
def test_the_motion_of_the_data_is_the_median_of_the_own_clips_without_pictures(tmp_path, monkeypatch):
    contents = {"a": still(9), "b": with_square(9, 1), "c": with_square(9, 5), "d": still(1), "prior": with_square(9, 9)}
    for name, pictures in contents.items():
        write_video(tmp_path / f"videos/{name}.mp4", video(pictures), 8)
    (tmp_path / "videos.txt").write_text("".join(f"videos/{name}.mp4\n" for name in contents))
    (tmp_path / "prompts.txt").write_text("".join(f"clip {name}\n" for name in contents))
    records, _, _ = read_records(tmp_path)
    framing = Framing(fps=8, max_num_frames=9, sizes=((HEIGHT, WIDTH),))
    clips = [{"frames": len(pictures)} for pictures in contents.values()]
    args = SimpleNamespace(seed=1, fps=8, clip_timeout_seconds=60.0)

    def of(prior, held_out=()):
        return motion.of_data(args, survey.Data(records, clips, [], framing, list(held_out), prior))

    assert of([4]) == pytest.approx(motion.motion(video(contents["b"]), 8), rel=0.1)
    assert of([4], held_out=[0]) > 1.2 * of([4])  # between b and c
    assert of([4], held_out=[0, 1, 2]) is None


def line(now, base, data, step=50, **leak):
    return {"step": step, "motion": now, "motion_base": base, "motion_data": data, "videos": []} | leak


def learned(step, loss):
    """An evaluation whose loss is this share of the base model's."""
    scores = {"eval_train_loss": loss, "eval_held_out_loss": loss, "eval_train_base_loss": 1.0, "eval_held_out_base_loss": 1.0}
    return scores | {"step": step, "update_share": 0.1}


@pytest.mark.parametrize(
    ("numbers", "stands_still", "sentence"),
    [
        ((2.0, 20.0, 15.0), True, "fewer steps or an earlier checkpoint"),
        ((2.0, 20.0, None), True, "The training data are pictures"),
        ((2.0, 20.0, 3.0), False, "The training clips hardly move either"),  # it has learned what it was shown
        ((8.0, 20.0, 30.0), False, ""),  # more than a third of step 0's
        ((0.1, 0.9, 15.0), False, ""),  # step 0's stand still themselves
        ((None, None, 15.0), False, ""),  # pictures
        ((2.0, None, 15.0), False, ""),  # step 0's were not made
    ],
)
def test_videos_stand_still_if_they_move_less_than_step_0s_and_than_the_data(numbers, stands_still, sentence):
    earlier, last = line(15.0, 20.0, 15.0, step=25), line(*numbers)
    assert motion.verdict_of([earlier, last])[0] is stands_still
    assert sentence in " ".join(motion.verdict_of([earlier, last])[1])
    assert bool(motion.verdict_of([earlier, last])[1]) is bool(sentence)
    word, sentences = scoring.verdict([learned(0, 1.0), learned(50, 0.7), earlier, last], 1e-4)
    assert word == (scoring.STILL if stands_still else scoring.LEARNING)
    assert sentence in " ".join(sentences)
    assert motion.verdict_of([line(*numbers, step=0)]) == (False, [])


def test_image_to_video_videos_stand_still_where_they_stay_on_the_image_that_step_0s_leave():
    moves = video(with_square())
    stays = np.repeat(moves[:1], FRAMES, axis=0)  # both begin with the image
    for now, base, stands_still in ((stays, moves, True), (moves, moves, False), (stays, stays, False)):
        measured = [{"name": "00"} | motion.compare(now, base, 8)]
        assert motion.verdict_of([motion.line_of(50, measured, (), 20.0)])[0] is stands_still


def test_only_a_run_that_learns_is_told_by_its_still_videos():
    videos = line(2.0, 20.0, 15.0)
    assert scoring.verdict([learned(0, 1.0), learned(50, 1.5), videos], 1e-4)[0] == scoring.WORSE
    assert scoring.verdict([learned(0, 1.0), learned(50, 1.0), videos], 1e-4)[0] == scoring.NOTHING
    word, sentences = scoring.verdict([videos], 1e-4)  # --eval_clips 0
    assert word == scoring.UNKNOWN
    assert "The videos hardly move: by 2.0 grey levels per second (step 0's by 20.0, the training clips by 15.0)." in sentences


def test_a_leak_above_half_is_told_with_its_remedy():
    def told(with_it, without):
        leak = {"moved_with_trigger": with_it, "moved_without_trigger": without, "trigger_leak": without / with_it}
        return " ".join(motion.verdict_of([line(15.0, 20.0, 15.0, **leak)])[1])

    assert told(20.0, 18.0) == (
        "Without the trigger the video changed 0.90 times as much as with it (18.0 and 20.0 grey levels): the style leaks; train on "
        "clips without the trigger as well (--prior_data_root)."
    )
    assert told(20.0, 4.0) == "Without the trigger the video changed 0.20 times as much as with it (4.0 and 20.0 grey levels)."


def test_a_prompt_loses_its_trigger_as_a_word_only():
    assert flags.without_token("OLDFILM a rabbit", "OLDFILM") == "a rabbit"
    assert flags.without_token("OLDFILM, a rabbit in OLDFILM", "OLDFILM") == "a rabbit in"
    assert flags.without_token("sks dog (v2) runs", "sks dog (v2)") == "runs"
    for text, token in (("OLDFILMS a rabbit", "OLDFILM"), ("a rabbit", "OLDFILM"), ("OLDFILM", "OLDFILM"), ("a rabbit", None)):
        assert flags.without_token(text, token) == ""
