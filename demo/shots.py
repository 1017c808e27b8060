"""The shots of the film and the demo's clips, as frame numbers with captions, from the demo's lists."""

from pathlib import Path

HERE = Path(__file__).resolve().parent


def rows_of(path):
    """The tab-separated rows of a list, without its comments."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def read_shots():
    """The (first frame, end frame, caption) of each shot of the film without the demo's clips."""
    return [(int(first), int(end), caption) for first, end, caption in rows_of(HERE / "film_shots.txt")]


def read_demo_clips():
    """The same of the demo's clips, whose captions are without their trigger word."""
    names, captions = (HERE / "dataset/videos.txt").read_text(encoding="utf-8").splitlines(), read_captions()
    of_clip = dict(zip(names, captions, strict=True))
    return [(int(first), int(end), of_clip[name]) for name, first, end in rows_of(HERE / "dataset/film_frames.txt")]


def read_captions():
    """The captions of the demo's clips, without their trigger word."""
    prompts = (HERE / "dataset/prompts.txt").read_text(encoding="utf-8").splitlines()
    return [prompt.removeprefix("BUNNYTOON ") for prompt in prompts]
