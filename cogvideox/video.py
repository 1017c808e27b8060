"""Writing and reading videos, and contact sheets of them."""

import io
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw

from cogvideox.files import note_file, write_bytes


def write_video(path, frames, fps):
    """Write uint8 frames [F, H, W, 3] as an H.264 mp4 for any player, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    note_file(path)
    partial = path.with_name(f".{path.stem}.partial.mp4")
    with imageio.get_writer(partial, fps=fps, codec="libx264", quality=8, macro_block_size=2, ffmpeg_log_level="error") as writer:
        for frame in frames:
            writer.append_data(frame)
    partial.replace(path)


def read_video(path):
    """The frames [F, H, W, 3] of an mp4 that `write_video` wrote."""
    with imageio.get_reader(path) as reader:
        return np.stack(tuple(reader.iter_data()))


def gif_bytes(frames, fps):
    """An animated GIF, for trackers that show only images."""
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0)
    return buffer.getvalue()


def film_strip(frames, columns=5, widest=240):
    """`columns` frames side by side, evenly spaced from the first to the last, each at most `widest` pixels wide."""
    chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    height, width = frames.shape[1:3]
    size = (min(width, widest), max(1, round(height * min(width, widest) / width)))
    return np.concatenate([np.asarray(Image.fromarray(frames[i]).resize(size)) for i in chosen], axis=1)


def contact_sheet(path, rows, title=""):
    """A PNG of labelled film strips. rows: [(label, frames or None)]; a row without frames is a heading."""
    gap, text_height = 4, 18
    # A single frame is already a strip.
    strips = [(label, frames if frames is None else frames[0] if len(frames) == 1 else film_strip(frames)) for label, frames in rows]
    width = max([strip.shape[1] for _, strip in strips if strip is not None] + [480]) + 2 * gap
    height = sum(text_height + (strip.shape[0] + gap if strip is not None else 0) for _, strip in strips) + text_height + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 2), title, "black")
    y = text_height
    for label, strip in strips:
        draw.text((gap, y + 2), label[: width // 6], "black")
        y += text_height
        if strip is not None:
            sheet.paste(Image.fromarray(strip), (gap, y))
            y += strip.shape[0] + gap
    picture = io.BytesIO()
    sheet.save(picture, "PNG")
    write_bytes(Path(path), picture.getvalue())
