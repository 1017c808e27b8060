"""How well cuts are found: python -m demo.cut_score FILM, the whole of Big Buck Bunny.

Reads the film once into --work_dir, then compares each of scenedetect's detectors with the boundaries that demo/film_shots.txt and
demo/dataset/film_frames.txt give: where one shot ends and the next begins, or one of the demo's clips begins three frames later.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np

from demo.shots import read_demo_clips, read_shots
from tools.footage import examine_films, film_key
from tools.shots import cuts_of

CLIP_MARGIN = 3  # frames between a cut and a clip of the demo


def boundaries():
    """(frames at which a shot begins, the stretches of frames that are described), from the demo's lists."""
    shots, clips = ([(start, end) for start, end, _ in found] for found in (read_shots(), read_demo_clips()))
    begins = {start for start, _ in shots} | {start - CLIP_MARGIN for start, _ in clips}
    return sorted({end for _, end in shots} & begins), shots + clips


def score(cuts, known, described, tolerance):
    """(precision, recall, F1) of cuts, all frame numbers. Cuts in titles and credits are neither right nor wrong."""
    hits = sum(any(abs(cut - frame) <= tolerance for cut in cuts) for frame in known)
    wrong = sum(
        any(start + tolerance < cut < end - tolerance for start, end in described)
        and not any(abs(cut - frame) <= tolerance for frame in known)
        for cut in cuts
    )
    precision, recall = hits / max(1, hits + wrong), hits / len(known)
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def main(words=None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.cut_score", description=__doc__.split("\n\n")[0])
    parser.add_argument("film", type=Path)
    parser.add_argument("--work_dir", type=Path, default=Path("cut_score"), help="what is read is kept here (default: %(default)s)")
    parser.add_argument("--tolerance", type=int, default=1, help="frames (default: %(default)s)")
    args = parser.parse_args(words)
    started = time.perf_counter()
    if reasons := examine_films([args.film], 8.0, args.work_dir, 600.0, os.cpu_count()):
        parser.exit(3, f"ERROR[3]: {args.film}: {reasons[args.film]}\n")
    seconds = time.perf_counter() - started
    film = dict(np.load(args.work_dir / f"{film_key(args.film, 8.0)}.npz"))
    known, described = boundaries()
    print(f"{len(film['stamps'])} frames in {seconds:.1f} s; {len(known)} known cuts, tolerance {args.tolerance} frame")
    for detector in ("adaptive", "content"):
        cuts = cuts_of(film, detector)
        precision, recall, f1 = score(cuts, known, described, args.tolerance)
        print(f"{detector:>9}: {len(cuts)} cuts, precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}")


if __name__ == "__main__":
    main()
