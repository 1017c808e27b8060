"""Render the demo's clips as an old black-and-white film: `python -m demo.old_film demo/old_film`.

Grey, grainy, flickering, vignetted, shaky and scratched: a visible style that a LoRA can learn from a few clips, like the guide's
Steamboat Willie. All randomness is seeded by the clip's number.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideox.console import progress
from cogvideox.video import read_video, write_video

CLIPS = Path(__file__).resolve().parent / "dataset"
CHANGES = "The clips here are a further change of those: black-and-white, with grain, flicker, vignette, shake and scratches.\n"


def old_film(frames, seed):
    """uint8 frames [F, H, W, 3] in the style of an old film."""
    random = np.random.default_rng(seed)
    count, height, width = frames.shape[:3]
    grey = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # luma, ITU-R BT.601
    grey = 128 + 1.25 * (grey - 128)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = 1 - 0.45 * np.clip(x**2 + y**2 - 0.35, 0, None)
    flicker = 1 + 0.07 * random.standard_normal(count)
    scratch = random.integers(0, width, 3)
    styled = np.empty_like(grey)
    for number in range(count):
        frame = np.roll(grey[number], tuple(random.integers(-1, 2, 2)), (0, 1))
        coarse = random.standard_normal((height // 2, width // 2)).astype(np.float32)  # grain of two pixels survives scaling
        grain = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BILINEAR))
        frame = (frame * vignette + 16 * grain) * flicker[number]
        if random.random() < 0.4:
            frame[:, random.choice(scratch)] += 70
        styled[number] = frame
    return np.repeat(styled.clip(0, 255).astype(np.uint8)[..., None], 3, axis=3)


def write_dataset(folder, change=old_film, note=CHANGES):
    """Write a data folder: the clips of demo/dataset, changed (as old film for the demo's LoRA), and captions without the trigger word.

    change: a function of uint8 frames [F, H, W, 3] and a seed, the clip's number. note: what the attribution says of the change.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = (CLIPS / "videos.txt").read_text(encoding="utf-8").splitlines()
    for number, name in enumerate(progress(names, folder.name, unit="clip")):
        write_video(partial / name, change(read_video(CLIPS / name), number), 24)
    prompts = (CLIPS / "prompts.txt").read_text(encoding="utf-8").splitlines()
    (partial / "prompts.txt").write_text("".join(prompt.removeprefix("BUNNYTOON ") + "\n" for prompt in prompts), encoding="utf-8")
    (partial / "videos.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (partial / "ATTRIBUTION.txt").write_text((CLIPS / "ATTRIBUTION.txt").read_text(encoding="utf-8") + note, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/old_film"))
    write_dataset(parser.parse_args().folder)
