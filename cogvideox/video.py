"""Writing and reading videos, and contact sheets of them."""

import contextlib
import functools
import importlib.util
import io
import itertools
import unicodedata
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cogvideox.files import note_file, write_bytes

TEXT_PIXELS = 11
CJK_FONT = "noto_cjk_sans_jp_regular"  # optional: 14 MB of Chinese, Japanese and Korean letters


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


def png_bytes(image):
    """A Pillow image as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def film_strip(frames, columns=5, widest=240):
    """`columns` frames side by side, evenly spaced from the first to the last, each at most `widest` pixels wide."""
    chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    height, width = frames.shape[1:3]
    size = (min(width, widest), max(1, round(height * min(width, widest) / width)))
    return np.concatenate([np.asarray(Image.fromarray(frames[i]).resize(size)) for i in chosen], axis=1)


@functools.cache
def system_fonts():
    """The paths of the fonts that are installed on this machine."""
    from matplotlib import font_manager  # takes seconds the first time

    return sorted(path for path in font_manager.findSystemFonts() if "lastresort" not in path.lower())  # a font of boxes


@functools.cache
def load_font(path):
    """(a font, the code points it has); without any where Pillow cannot draw it, such as a font of coloured pictures."""
    from matplotlib.ft2font import FT2Font

    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return ImageFont.truetype(str(path), TEXT_PIXELS), frozenset(FT2Font(str(path)).get_charmap())
    return None, frozenset()


@functools.cache
def font_of(character):
    """The first font that has a character: matplotlib's DejaVu, the optional package's, the system's. None if none has it."""
    if not character.isprintable():
        return None
    import matplotlib

    package = importlib.util.find_spec(CJK_FONT)
    paths = [Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")]
    paths += sorted(Path(package.origin).parent.glob("*.otf")) if package else []
    for candidates in (lambda: paths, system_fonts):  # the system's are listed only where they are needed
        for font, code_points in map(load_font, candidates()):
            if ord(character) in code_points:
                return font
    return None


def draw_text(draw, left, baseline, text):
    """Write a line of text. Characters that no font has are written as escapes, such as `\\u5154`, in place of an empty box."""
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if text.isascii() and text.isprintable():
        draw.text((left, baseline), text, "black", ImageFont.load_default(TEXT_PIXELS), anchor="ls")
        return
    shown = "".join(c if font_of(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    for font, run in itertools.groupby(shown, font_of):
        run = "".join(run)
        draw.text((left, baseline), run, "black", font, anchor="ls")
        left += font.getlength(run)


def contact_sheet(path, rows, title=""):
    """A PNG of labelled film strips. rows: [(label, frames or None)]; a row without frames is a heading."""
    gap, text_height = 4, 18
    # A single frame is already a strip.
    strips = [(label, frames if frames is None else frames[0] if len(frames) == 1 else film_strip(frames)) for label, frames in rows]
    width = max([strip.shape[1] for _, strip in strips if strip is not None] + [480]) + 2 * gap
    height = sum(text_height + (strip.shape[0] + gap if strip is not None else 0) for _, strip in strips) + text_height + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw_text(draw, gap, text_height - 5, title)
    y = text_height
    for label, strip in strips:
        y += text_height
        draw_text(draw, gap, y - 5, label[: width // 3])
        if strip is not None:
            sheet.paste(Image.fromarray(strip), (gap, y))
            y += strip.shape[0] + gap
    write_bytes(Path(path), png_bytes(sheet))
