"""The demo in one picture: training clips, the base model's videos, and the same prompts and seeds with the LoRA."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cogvideox.files import write_bytes
from cogvideox.video import read_video

COLUMNS, FRAME_WIDTH, LABEL_WIDTH, GAP, HEADING_HEIGHT, TEXT_PIXELS = 6, 128, 130, 3, 26, 15
INK, FAINT = "#1f2328", "#656d76"


def write_picture(path, old_film_dir, pairs):
    """Write a run's picture as a PNG, about 900 pixels wide. old_film_dir: the training data folder. pairs: from `measure.read_pairs`."""
    size = pairs[0].base.shape[1:3]
    rows = [
        ("", "Captioned clips in a style that the base model has never seen; the trigger starts with OLDFILM."),
        ("training clips", training_frames(old_film_dir, size)),
    ]
    for pair in pairs:
        rows += [("", pair.prompt), ("base model", spread(pair.base)), (f"LoRA, step {pair.step}", spread(pair.trained))]
    frame_height = round(FRAME_WIDTH * size[0] / size[1])
    width = LABEL_WIDTH + COLUMNS * (FRAME_WIDTH + GAP)
    heights = [HEADING_HEIGHT if isinstance(content, str) else frame_height + GAP for _, content in rows]
    picture = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_PIXELS)
    y = GAP
    for (label, content), height in zip(rows, heights, strict=True):
        if isinstance(content, str):
            draw.text((LABEL_WIDTH, y + height / 2), shortened(content, font, width - LABEL_WIDTH), FAINT, font, anchor="lm")
        else:
            draw.text((LABEL_WIDTH - 10, y + frame_height / 2), label, INK, font, anchor="rm")
            for column, frame in enumerate(content):
                enlarged = Image.fromarray(frame).resize((FRAME_WIDTH, frame_height), Image.BICUBIC)
                picture.paste(enlarged, (LABEL_WIDTH + column * (FRAME_WIDTH + GAP), y))
        y += height
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    write_bytes(Path(path), data.getvalue())


def spread(frames):
    """COLUMNS frames, evenly spaced from the first to the last."""
    return [frames[i] for i in np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)]


def training_frames(old_film_dir, size):
    """The last frames of COLUMNS clips, spread over the data folder, at the training (height, width)."""
    names = (Path(old_film_dir) / "videos.txt").read_text(encoding="utf-8").splitlines()
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, COLUMNS).round().astype(int)]
    frames = [Image.fromarray(read_video(Path(old_film_dir) / name)[-1]) for name in chosen]
    return [np.asarray(frame.resize((size[1], size[0]), Image.LANCZOS)) for frame in frames]


def shortened(text, font, width):
    """The text, truncated after a word with an ellipsis if it is wider than `width` pixels."""
    words = text.split()
    while font.getlength(" ".join(words)) > width - font.getlength(" ..."):
        words.pop()
    return text if len(words) == len(text.split()) else " ".join(words) + " ..."
