"""What the loss does not show: how much the validation videos move, and whether the style needs its trigger.

The unit is grey levels of 255; motion is per second.
"""

import numpy as np

from cogvideox.charts import evenly
from cogvideox.decode import clip_framing
from cogvideox.reader import Readers, decode_workers

GRID = 8  # blocks along the shorter side of a picture
SECONDS_APART = 0.5
LUMA = np.float32([0.299, 0.587, 0.114])  # ITU-R BT.601
CLIPS_MEASURED = 8  # of the data

STATIC = 1.0  # less motion than this is a still picture
STILL_SHARE, DATA_SHARE = 1 / 3, 1 / 2  # videos stand still below these shares of the motion of step 0's and of the training clips
LEAST_MOVED, LEAKS = 2.0, 0.5  # a leak is told apart where the trigger changes videos at all; above half of that change it is a fault

# -----------------------------------------------------------------------------
# One video


def motion(frames, fps):
    """The motion of a clip of uint8 frames [F, H, W, 3], in grey levels of 255 per second. None for fewer than three frames.

    From D(k), the mean square change of luma between frames that are k apart, with k frames in half a second: for steady motion
    D(k) = k^2 D(1), so sqrt((D(k) - D(1)) / (k^2 - 1)) is the change of a frame. Grain, flicker and shake, which change each frame anew,
    add the same to both and cancel. Luma is averaged over blocks, an eighth of the shorter side wide, and each frame is brought to the
    clip's mean contrast around a mean of 0, so that noise is small and fades are no motion.
    """
    apart = min(max(2, round(SECONDS_APART * fps)), len(frames) - 1)
    if apart < 2:
        return None
    blocks = np.stack([block_means(frame) for frame in frames])  # [F, blocks]
    blocks -= blocks.mean(1, keepdims=True)
    contrast = np.maximum(blocks.std(1, keepdims=True), 1.0)  # a black frame stays black
    blocks *= contrast.mean() / contrast
    persisting = mean_square_change(blocks, apart) - mean_square_change(blocks, 1)
    return float((max(0.0, persisting) / (apart**2 - 1)) ** 0.5 * fps)


def block_means(frame):
    """The mean luma of each block of a picture [H, W, 3]; what is left at the right and at the bottom is dropped."""
    luma = frame.astype(np.float32) @ LUMA
    side = max(1, min(luma.shape) // GRID)
    height, width = (length // side for length in luma.shape)
    return luma[: height * side, : width * side].reshape(height, side, width, side).mean((1, 3)).ravel()


def mean_square_change(blocks, apart):
    """D of `motion`. blocks: [F, blocks]."""
    return np.square(blocks[apart:] - blocks[:-apart]).mean()


def compare(frames, base, fps):
    """{"motion", "base", "moved"} of a video: its motion, that of step 0's, and the mean absolute difference of the two in grey levels.

    frames, base: uint8 [F, H, W, 3]. What cannot be measured is None: motion of pictures, or anything beside a base of None.
    """
    alike = base is not None and base.shape == frames.shape
    moved = float(np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in zip(frames, base, strict=True)])) if alike else None
    return {"motion": motion(frames, fps), "base": None if base is None else motion(base, fps), "moved": moved}


def of_data(args, data):
    """The median motion of up to CLIPS_MEASURED own training clips as they are trained, without pictures; None if there is no other.

    Decodes them. data: survey.Data.
    """
    clips = [data.records[clip] for clip in data.own if data.clips[clip]["frames"] > 2]
    framed = [(record.path, clip_framing(record, data.framing, args.seed)) for record in evenly(clips, min(len(clips), CLIPS_MEASURED))]
    with Readers(decode_workers(), args.clip_timeout_seconds) as readers:
        found = [motion(frames, args.fps) for _, frames, reason in readers.read_all(framed) if not reason]
    return float(np.median(found)) if found else None


# -----------------------------------------------------------------------------
# A validation, and the verdict


def line_of(step, videos, pair, data):
    """The line of metrics.jsonl for one validation. videos: [{"name"} | `compare`]. data: the motion of the training clips, or None.

    pair: the names of the video with the id token and of the one without it, or (). The latter does not count as motion. The means are
    of the videos that were made both now and at step 0, or else of all.
    """
    by_name = {video["name"]: video for video in videos}
    given = [video for video in videos if video["name"] not in pair[1:] and video["motion"] is not None]
    both = [video for video in given if video["base"] is not None]
    line = {"step": step, "motion": mean(video["motion"] for video in both or given), "motion_base": mean(v["base"] for v in both)}
    line |= {"motion_data": data, "videos": videos}
    if step and pair:
        moved = [by_name[name]["moved"] if name in by_name else None for name in pair]
        leak = moved[1] / moved[0] if None not in moved and moved[0] >= LEAST_MOVED else None
        line |= {"moved_with_trigger": moved[0], "moved_without_trigger": moved[1], "trigger_leak": leak}
    return line


def mean(values):
    """The mean of some numbers, None of none."""
    values = list(values)
    return sum(values) / len(values) if values else None


def sentences_of(line):
    """One validation as sentences for the log."""
    sentences = []
    if line["motion"] is not None:
        sentences.append(f"the videos move by {numbers_of(line)}")
    if line.get("trigger_leak") is not None:
        sentences.append(leak_of(line))
    return sentences


def numbers_of(line):
    """The motion of videos, step 0's and training clips in words."""
    beside = [("step 0's", line["motion_base"]), ("the training clips", line["motion_data"])]
    beside = ", ".join(f"{name} by {value:.1f}" for name, value in beside if value is not None)
    return f"{line['motion']:.1f} grey levels per second" + (f" ({beside})" if beside else "")


def leak_of(line):
    """The leak in words."""
    moved = f"{line['moved_without_trigger']:.1f} and {line['moved_with_trigger']:.1f} grey levels"
    return f"without the trigger the video changed {line['trigger_leak']:.2f} times as much as with it ({moved})"


def verdict_of(lines):
    """(whether the videos stand still, sentences) of the last validation. lines: of metrics.jsonl.

    They stand still if they move less than a third as much as step 0's of the same prompts and seeds, and less than half as much as the
    training clips: where these hardly move either, the model has learned what it was shown. Training on pictures shows no motion.
    """
    measured = [line for line in lines if line["step"] > 0 and "motion" in line]
    if not measured:
        return False, []
    line, sentences, still = measured[-1], [], False
    now, base, data = line["motion"], line["motion_base"], line["motion_data"]
    if None not in (now, base) and base >= STATIC and now < STILL_SHARE * base:
        still = data is None or now < DATA_SHARE * data
        sentences.append(f"The videos hardly move: by {numbers_of(line)}.")
        if data is None:
            sentences.append(
                "The training data are pictures, which have no motion: add clips that move (--prior_data_root), or train less."
            )
        elif still:
            sentences.append(
                "A lower --rank or --learning_rate, fewer steps or an earlier checkpoint keep more of the base model's motion; "
                "python -m tools.check_dataset names clips that stand still, and --fps decides how fast clips play."
            )
        else:
            sentences.append("The training clips hardly move either: for more motion, train on clips that move.")
    if line.get("trigger_leak") is not None:
        leaks = line["trigger_leak"] > LEAKS
        rest = ": the style leaks; train on clips without the trigger as well (--prior_data_root)" if leaks else ""
        sentences.append(f"{leak_of(line).capitalize()}{rest}.")
    return still, sentences
