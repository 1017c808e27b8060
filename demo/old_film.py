"""Render the demo's clips as an old black-and-white film: `python -m demo.old_film demo/old_film`.

Grey, grainy, flickering, vignetted, shaky and scratched: a visible style that a LoRA can learn from a few clips, like the guide's
Steamboat Willie. All randomness is seeded by the clip's number. Writes three data folders: train, held_out (every fifth clip) and colour,
some of the training clips as they are: trained without the trigger, they keep the style out of prompts without it.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideox.console import progress
from cogvideox.video import read_video, write_video
from demo.shots import read_captions

CLIPS = Path(__file__).resolve().parent / "dataset"
CHANGES = "The clips here are a further change of those: black-and-white, with grain, flicker, vignette, shake and scratches.\n"


def old_film(frames, seed):
    """uint8 frames [F, H, W, 3] in the style of an old film."""
    random = np.random.default_rng(seed)
    count, height, width = frames.shape[:3]
    grey = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # luma, ITU-R BT.601
    grey = 0.9 * grey - 8
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = 1 - 0.4 * np.clip(x**2 + y**2 - 0.35, 0, None)
    flicker = 1 + 0.04 * random.standard_normal(count)
    scratch = random.integers(0, width, 3)
    styled = np.empty_like(grey)
    for number in range(count):
        frame = np.roll(grey[number], tuple(random.integers(-1, 2, 2)), (0, 1))
        coarse = random.standard_normal((height // 2, width // 2)).astype(np.float32)  # grain of two pixels survives scaling
        grain = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BILINEAR))
        frame = (frame * vignette + 10 * grain) * flicker[number]
        if random.random() < 0.3:
            frame[:, random.choice(scratch)] += 70
        styled[number] = frame
    return np.repeat(styled.clip(0, 255).astype(np.uint8)[..., None], 3, axis=3)


def write_dataset(folder, change=old_film, note=CHANGES, clips=None):
    """Write a data folder: clips of demo/dataset, changed (as old film for the demo's LoRA), and captions without the trigger word.

    change: a function of uint8 frames [F, H, W, 3] and a seed, the clip's number; None leaves the clips as they are. note: what the
    attribution says of the change. clips: their numbers (None: all).
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "videos").mkdir(parents=True)
    names, captions = (CLIPS / "videos.txt").read_text(encoding="utf-8").splitlines(), read_captions()
    clips = range(len(names)) if clips is None else clips
    for number in progress(clips, folder.name, unit="clip"):
        if change:
            write_video(partial / names[number], change(read_video(CLIPS / names[number]), number), 24)
        else:
            shutil.copyfile(CLIPS / names[number], partial / names[number])
    (partial / "prompts.txt").write_text("".join(f"{captions[number]}\n" for number in clips), encoding="utf-8")
    (partial / "videos.txt").write_text("".join(f"{names[number]}\n" for number in clips), encoding="utf-8")
    (partial / "ATTRIBUTION.txt").write_text((CLIPS / "ATTRIBUTION.txt").read_text(encoding="utf-8") + note, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def is_held_out(number):
    """Whether a clip is held out: every fifth."""
    return number % 5 == 2


def write_demo(folder):
    """Write the data folders of `make demo`."""
    numbers = range(len(read_captions()))
    trained = [number for number in numbers if not is_held_out(number)]
    write_dataset(folder / "train", clips=trained)
    write_dataset(folder / "held_out", clips=list(filter(is_held_out, numbers)))
    write_dataset(folder / "colour", None, "", trained[::2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/old_film"))
    write_demo(parser.parse_args().folder)
