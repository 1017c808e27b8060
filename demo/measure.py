"""Measure how much colour the demo's LoRA removes, and draw the demo's picture: `python -m demo.measure demo/output`."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from cogvideox.video import read_video
from demo.picture import write_picture


def saturation(frames):
    """Mean HSV saturation of uint8 frames [..., 3], from 0 (grey) to 1: (max - min) / max, weighted by brightness."""
    frames = np.asarray(frames, np.float64)
    return float((frames.max(-1) - frames.min(-1)).sum() / max(frames.max(-1).sum(), 1))


def validation_pairs(output_dir):
    """(path at step 0, path at the last step) of each validation video that exists at both."""
    steps = sorted(path for path in (Path(output_dir) / "validation").glob("step-*") if any(path.glob("*.mp4")))
    if len(steps) < 2:
        return []
    return [(steps[0] / path.name, path) for path in sorted(steps[-1].glob("*.mp4")) if (steps[0] / path.name).exists()]


def measure(output_dir):
    """(name, saturation at step 0, saturation at the last step) of each validation video that exists at both."""
    return [(last.stem, saturation(read_video(first)), saturation(read_video(last))) for first, last in validation_pairs(output_dir)]


def main(output_dir, old_film_dir):
    rows = measure(output_dir)
    if not rows:
        sys.exit(f"{output_dir}: no validation videos of two steps; run make demo first")
    print("\nsaturation of the validation videos (0 is grey)   before   after")
    for name, before, after in rows:
        print(f"  {name[:46]:46}  {before:6.3f}  {after:6.3f}   {100 * (after / before - 1):+.0f} %")
    before, after = np.mean([row[1] for row in rows]), np.mean([row[2] for row in rows])
    print(f"  {'mean':46}  {before:6.3f}  {after:6.3f}   {100 * (after / before - 1):+.0f} %")
    picture = Path(output_dir) / "demo.png"
    write_picture(picture, old_film_dir, videos_of(output_dir))
    print(f"\nthe demo in one picture: {picture}")


def videos_of(output_dir):
    """(prompt, frames at step 0, frames at the last step, the last step) of each validation video that exists at both."""
    videos = []
    for first, last in validation_pairs(output_dir):
        listed = json.loads((last.parent / "videos.json").read_text(encoding="utf-8"))["videos"]
        prompt = next(video["prompt"] for video in listed if video["name"] == last.name)
        videos.append((prompt, read_video(first), read_video(last), int(last.parent.name.removeprefix("step-"))))
    return videos


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", nargs="?", default="demo/output")
    parser.add_argument("old_film_dir", nargs="?", default="demo/old_film", help="the training clips")
    options = parser.parse_args()
    main(options.output_dir, options.old_film_dir)
