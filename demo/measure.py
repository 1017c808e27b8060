"""How far the demo's LoRA took the colour out: `python -m demo.measure demo/output`."""

import argparse
import sys
from pathlib import Path

import numpy as np

from cogvideox.video import read_video


def saturation(frames):
    """Mean saturation of uint8 frames [..., 3], from 0 (grey) to 1: HSV's, (max - min) / max, each pixel weighted by its brightness."""
    frames = np.asarray(frames, np.float64)
    return float((frames.max(-1) - frames.min(-1)).sum() / max(frames.max(-1).sum(), 1))


def measure(output_dir):
    """(name, saturation at step 0, saturation at the last step) of each validation video that a run has at both."""
    steps = sorted(path for path in (Path(output_dir) / "validation").glob("step-*") if any(path.glob("*.mp4")))
    if len(steps) < 2:
        return []
    pairs = [(steps[0] / path.name, path) for path in sorted(steps[-1].glob("*.mp4")) if (steps[0] / path.name).exists()]
    return [(last.stem, saturation(read_video(first)), saturation(read_video(last))) for first, last in pairs]


def main(output_dir):
    rows = measure(output_dir)
    if not rows:
        sys.exit(f"{output_dir}: has no validation videos of two steps; run make demo first")
    print("\nsaturation of the validation videos (0 is grey)   before   after")
    for name, before, after in rows:
        print(f"  {name[:46]:46}  {before:6.3f}  {after:6.3f}   {100 * (after / before - 1):+.0f} %")
    before, after = np.mean([row[1] for row in rows]), np.mean([row[2] for row in rows])
    print(f"  {'mean':46}  {before:6.3f}  {after:6.3f}   {100 * (after / before - 1):+.0f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", nargs="?", default="demo/output")
    main(parser.parse_args().output_dir)
