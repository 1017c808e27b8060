"""What the demo's LoRA changes and what it leaves, in four figures, and the demo's picture: `python -m demo.measure demo/output`.

With the trigger word the colour goes and the picture stays; without it the colour stays; and the loss on clips that were not trained
on falls.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cogvideox.files import read_json, read_json_lines
from cogvideox.scoring import evaluations
from cogvideox.video import read_video
from demo.picture import write_picture

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
# name of a figure: (least, most) that the demo is made for
WANTED = {
    "saturation with the trigger": (-1, -0.6),
    "brightness correlation of base and LoRA": (0.75, 1),
    "saturation without the trigger": (-0.2, 0.2),
    "loss on held-out clips": (-1, -0.3),
}


class Pair(NamedTuple):
    """One validation video at step 0 and at the last step: uint8 frames [F, H, W, 3], with one prompt and one seed."""

    prompt: str
    has_trigger: bool
    base: np.ndarray
    trained: np.ndarray
    step: int


def saturation(frames):
    """Mean HSV saturation of uint8 frames [..., 3], from 0 (grey) to 1: (max - min) / max, weighted by brightness."""
    frames = np.asarray(frames, np.float64)
    return float((frames.max(-1) - frames.min(-1)).sum() / max(frames.max(-1).sum(), 1))


def brightness_correlation(first, second):
    """Pearson's correlation of the luma of two videos [F, H, W, 3], per frame, averaged over the frames. 1: the same picture."""
    pairs = zip(np.asarray(first, np.float64) @ LUMA, np.asarray(second, np.float64) @ LUMA, strict=True)
    return float(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]))


def read_pairs(output_dir):
    """The Pairs of a run: each validation video that exists at step 0 and at the last step with videos."""
    steps = sorted(path.parent for path in (Path(output_dir) / "validation").glob("step-*/videos.json"))
    pairs = []
    for video in read_json(steps[-1] / "videos.json")["videos"] if len(steps) > 1 else []:
        first, last = steps[0] / video["name"], steps[-1] / video["name"]
        if first.exists() and last.exists():
            step = int(steps[-1].name.removeprefix("step-"))
            pairs.append(Pair(video["prompt"], "without" not in video, read_video(first), read_video(last), step))
    return pairs


def figures(output_dir, pairs):
    """The figures of WANTED, as shares of the base model's; without those that a run has no videos or scores for."""
    found = {}
    for name, has_trigger in (("saturation with the trigger", True), ("saturation without the trigger", False)):
        if chosen := [pair for pair in pairs if pair.has_trigger == has_trigger]:
            found[name] = np.mean([saturation(p.trained) for p in chosen]) / np.mean([saturation(p.base) for p in chosen]) - 1
    if chosen := [pair for pair in pairs if pair.has_trigger]:
        found["brightness correlation of base and LoRA"] = np.mean([brightness_correlation(p.base, p.trained) for p in chosen])
    scores = evaluations(read_json_lines(Path(output_dir) / "metrics.jsonl"))
    if scores and scores[-1]["eval_held_out_loss"] is not None:
        found["loss on held-out clips"] = scores[-1]["eval_held_out_loss"] / scores[-1]["eval_held_out_base_loss"] - 1
    return {name: float(found[name]) for name in WANTED if name in found}


def shown(name, value):
    """A figure as text: a correlation as it is, a change in percent."""
    return f"{value:.2f}" if "correlation" in name else f"{100 * value:+.0f} %"


def main(output_dir, old_film_dir):
    pairs = read_pairs(output_dir)
    if not pairs:
        sys.exit(f"{output_dir}: no validation videos of two steps; run make demo first")
    print(f"\n{'validation videos':48} {'saturation (0 is grey)':>24} {'brightness':>12}")
    print(f"{'':48} {'before':>8} {'after':>7} {'change':>7} {'correlation':>12}")
    for pair in pairs:
        before, after = saturation(pair.base), saturation(pair.trained)
        change = shown("", after / before - 1)
        print(f"{pair.prompt[:47]:48} {before:8.3f} {after:7.3f} {change:>7} {brightness_correlation(pair.base, pair.trained):12.2f}")
    print(f"\n{'figure':42} {'made for':>18} {'this run':>9}")
    for name, value in figures(output_dir, pairs).items():
        least, most = WANTED[name]
        print(f"{name:42} {shown(name, least) + ' to ' + shown(name, most):>18} {shown(name, value):>9}")
    picture = Path(output_dir) / "demo.png"
    write_picture(picture, old_film_dir, pairs)
    print(f"\nthe demo in one picture: {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", nargs="?", default="demo/output")
    parser.add_argument("old_film_dir", nargs="?", default="demo/old_film", help="the training clips")
    options = parser.parse_args()
    main(options.output_dir, options.old_film_dir)
