"""A folder of clips in, (file, caption) records and frames out.

`read_records` pairs captions with files and never shifts a pair: whatever is wrong is returned as a list of sentences,
one a line, so that a user sees all of it at once. `read_clip` turns one file into uint8 frames, chosen by their
presentation times. Nothing here imports torch: the guarded reader processes (cogvideox/reader.py) import this module and
have to start fast.
"""

import csv
import difflib
import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"}
PLAYLIST_STARTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<SMIL", b"<MPD")


@dataclass(frozen=True)
class Record:
    """One line of the data: where it stands (for messages), the file as listed, the file on disk, and its caption."""

    where: str
    listed: str
    path: str
    caption: str


@dataclass(frozen=True)
class Framing:
    """How a file becomes frames: everything `read_clip` depends on beside the file itself.

    `skip_frames_*` count frames of the source. `frames_per_latent` and `latents_per_patch` are the model's: the VAE maps
    4k + 1 frames to k + 1 latents, CogVideoX 1.5 takes latents two by two. `crop_x` and `crop_y` place the crop (0: left or
    top, 1: right or bottom). `sizes` are the (height, width) a clip may get: the one nearest in aspect is taken.
    `lengths` are the frame counts a clip may get (empty: any legal one).
    """

    fps: float
    max_num_frames: int
    sizes: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...] = ()
    skip_frames_start: int = 0
    skip_frames_end: int = 0
    reshape_mode: str = "center"
    crop_x: float = 0.5
    crop_y: float = 0.5
    frames_per_latent: int = 4
    latents_per_patch: int = 1


class BadClip(ValueError):
    """A file that cannot be trained on; the message says why, in words for its owner."""


# -----------------------------------------------------------------------------
# Records: which file goes with which caption


def read_records(root, caption_column=None, video_column=None, allow_external_paths=False):
    """Read the (file, caption) pairs of a data folder or table.

    Four layouts are told apart by what is there: `prompts.txt` + `videos.txt` (or the names given), a table
    (`metadata.csv|jsonl|parquet`, or `root` itself such a file) with one column each, `videos/` + `labels/NAME.txt` (the
    layout of the SAT trainer), and clips with a `NAME.txt` beside each.

    Returns (records, problems, layout): all problems found, each a sentence; `layout` is a word for the log.
    """
    root = Path(root).expanduser()
    if not root.exists():
        return [], [f"--instance_data_root {root}: no such folder"], "nothing"
    table = root if root.is_file() else find_table(root)
    if root.is_dir() and ((root / (caption_column or "prompts.txt")).exists() or table is None and not has_labels(root)):
        rows, problems = read_line_files(root, caption_column or "prompts.txt", video_column or "videos.txt")
        layout = "line files"
    elif table is not None:
        rows, problems = read_table(table, caption_column or "text", video_column or "video")
        root, layout = table.parent, table.name
    else:
        rows, problems = read_label_files(root)
        layout = "videos with a text file each"
    records = []
    for where, listed, caption in rows:
        path, problem = locate(root, listed, allow_external_paths)
        if problem:
            problems.append(f"{where}: {problem}")
        else:
            records.append(Record(where, listed, str(path), caption))
    if not rows and not problems:
        problems.append(f"{root}: no clips listed")
    return records, problems, layout


def read_line_files(root, caption_file, video_file):
    """Pair two text files line by line. Returns ([(where, listed file, caption)], problems)."""
    problems, lines = [], {}
    for name in (caption_file, video_file):
        lines[name] = read_lines(root, name, problems)
    if problems:
        return [], problems
    captions, videos = lines[caption_file], lines[video_file]
    for name, other in ((caption_file, videos), (video_file, captions)):
        for number, line in enumerate(lines[name], 1):
            if not line and number <= len(other):
                problems.append(f"{name}:{number}: empty line; every clip needs a caption and every caption a clip")
    if len(captions) != len(videos):
        short, long = (caption_file, video_file) if len(captions) < len(videos) else (video_file, caption_file)
        first = min(len(captions), len(videos)) + 1
        problems.append(
            f"{caption_file} has {len(captions)} lines, {video_file} {len(videos)}: "
            f"{long}:{first} ({lines[long][first - 1][:60]!r}) has no partner in {short}"
        )
    pairs = zip(captions, videos, strict=False)
    return [(f"{video_file}:{n}", v, c) for n, (c, v) in enumerate(pairs, 1) if c and v], problems


def read_lines(root, name, problems):
    """The stripped lines of a UTF-8 text file (a byte order mark and CRLF are fine); appends to `problems`."""
    path = root / name
    if not path.is_file():
        near = difflib.get_close_matches(name, [p.name for p in root.iterdir()], n=1)
        hint = f"; there is {near[0]}" if near else ""
        problems.append(f"{path}: no such file (--caption_column and --video_column name the two lists){hint}")
        return []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        problems.append(f"{name}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8")
        return []
    # Only line feeds separate entries: a caption may hold the exotic separators that str.splitlines would cut at.
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        problems.append(f"{path}: no entries")
    return lines


def find_table(root):
    """The table of a data folder (`metadata.csv`, `.jsonl` or `.parquet`), or None."""
    return next((root / f"metadata.{kind}" for kind in ("csv", "jsonl", "parquet") if (root / f"metadata.{kind}").is_file()), None)


def read_table(path, caption_column, video_column):
    """Rows of a CSV, JSONL or Parquet file. Returns ([(where, listed file, caption)], problems)."""
    try:
        rows = list(table_rows(path))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, OSError, ValueError) as error:
        return [], [f"{path}: cannot be read as {path.suffix[1:]} ({error})"]
    if not rows:
        return [], [f"{path}: no rows"]
    missing = [name for name in (caption_column, video_column) if name not in rows[0][1]]
    if missing:
        columns = ", ".join(map(str, rows[0][1]))
        return [], [f"{path}: no column {', '.join(missing)} (it has: {columns}); name them with --caption_column and --video_column"]
    pairs, problems = [], []
    for number, row in rows:
        values = [str(row.get(name) or "").strip() for name in (caption_column, video_column)]
        problems += [
            f"{path.name}:{number}: empty {name}" for name, value in zip((caption_column, video_column), values, strict=True) if not value
        ]
        if all(values):
            pairs.append((f"{path.name}:{number}", values[1], " ".join(values[0].split())))
    return pairs, problems


def table_rows(path):
    """Yield (line or row number, dict) of a CSV, JSONL or Parquet file. ValueError for any other suffix."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            if line.strip():
                yield number, json.loads(line)
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("a Parquet table needs pyarrow: pip install pyarrow") from None
        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    else:
        raise ValueError("a table ends in .csv, .jsonl or .parquet")


def has_labels(root):
    """Whether `root` holds clips with a text file each (in `labels/`, or beside the clip)."""
    return (root / "labels").is_dir() or any(p.with_suffix(".txt").is_file() for p in media_files(root))


def media_files(root):
    """Clips and pictures in `root/videos`, or in `root` where there is no such folder, sorted by name."""
    folder = root / "videos" if (root / "videos").is_dir() else root
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)


def read_label_files(root):
    """`videos/NAME.mp4` with `labels/NAME.txt`, or with `NAME.txt` beside it."""
    labels = root / "labels"
    pairs, problems = [], []
    for path in media_files(root):
        text = (labels / path.name if labels.is_dir() else path).with_suffix(".txt")
        listed = str(path.relative_to(root))
        try:
            caption = " ".join(text.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{listed}: its caption {text.relative_to(root)} cannot be read ({type(error).__name__})")
            continue
        if caption:
            pairs.append((listed, listed, caption))
        else:
            problems.append(f"{listed}: its caption {text.relative_to(root)} is empty")
    return pairs, problems


def locate(root, listed, allow_external_paths):
    """Find a listed file below `root`. Returns (path, None) or (None, what is wrong with it)."""
    if "\0" in listed or "://" in listed:
        return None, f"{listed!r} is not a file name"
    path = Path(listed).expanduser()
    inside = not path.is_absolute()
    path = root / path
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except FileNotFoundError:
        return None, f"{listed}: no such file" + (" (a link to nothing)" if path.is_symlink() else "")
    except (OSError, RuntimeError) as error:
        return None, f"{listed}: cannot be opened ({error})"
    # An absolute path was written on purpose; a relative one that leaves the folder by `..` or a link may not have been.
    if inside and not allow_external_paths and not resolved.is_relative_to(root.resolve()):
        return None, f"{listed}: leaves the data folder (it is {resolved}); allow it with --allow_external_paths"
    if not stat.S_ISREG(status.st_mode):
        return None, f"{listed}: not a regular file"
    if status.st_size == 0:
        return None, f"{listed}: empty file"
    if not os.access(resolved, os.R_OK):
        return None, f"{listed}: permission denied"
    return path, None


def file_sha256(path):
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -----------------------------------------------------------------------------
# Frames: which ones, and at which size


def longest_legal_length(num_frames, frames_per_latent=4, latents_per_patch=1):
    """The longest clip of at most `num_frames` that the VAE (4k + 1) and the temporal patch take; 0 if there is none.

    AutoencoderKLCogVideoX maps 4k + 1 frames to k + 1 latents; k + 1 has to be a multiple of `patch_size_t`.
    """
    latents = (num_frames - 1) // frames_per_latent + 1 if num_frames > 0 else 0
    latents -= latents % latents_per_patch
    return (latents - 1) * frames_per_latent + 1 if latents > 0 else 0


def choose_frames(times, framing):
    """Pick source frames so that the clip plays at `framing.fps`, by presentation time.

    times: seconds, one for each source frame, increasing. Target k lies k / fps after the first frame that is not
    skipped; the source frame nearest in time is taken, so a variable frame rate keeps its speed. A target may lie at
    most half a source frame behind the last frame. Returns a list of indices of legal length.
    Raises BadClip where nothing is left.
    """
    total = len(times)
    first, end = framing.skip_frames_start, total - framing.skip_frames_end
    if first >= end:
        raise BadClip(
            f"{total} frames, of which --skip_frames_start {framing.skip_frames_start} and "
            f"--skip_frames_end {framing.skip_frames_end} leave none"
        )
    window = np.asarray(times[first:end], dtype=np.float64)
    spacing = float(np.median(np.diff(window))) if len(window) > 1 else 1 / framing.fps
    # The small surplus keeps 2.0 s at 8 fps from losing its last frame to rounding.
    count = int(math.floor((window[-1] - window[0] + spacing / 2) * framing.fps + 1e-6)) + 1
    count = min(count, framing.max_num_frames)
    legal = longest_legal_length(count, framing.frames_per_latent, framing.latents_per_patch)
    if framing.lengths:
        legal = max((n for n in framing.lengths if n <= legal), default=0)
    if legal == 0:
        needed = min(framing.lengths) if framing.lengths else (framing.latents_per_patch - 1) * framing.frames_per_latent + 1
        raise BadClip(f"{count} frames at {framing.fps:g} fps, at least {needed} are needed")
    targets = window[0] + np.arange(legal) / framing.fps
    right = np.clip(np.searchsorted(window, targets), 1, max(len(window) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(window) - 1)
    nearest = np.where(np.abs(window[right] - targets) < np.abs(window[left] - targets) - 1e-6, right, left)
    return [int(i) + first for i in nearest]


def choose_size(width, height, sizes):
    """The (height, width) of `sizes` nearest to a source's aspect ratio; the first of equals."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def source_box(width, height, target_width, target_height, framing):
    """The part of the source that is kept, as (left, top, right, bottom) in source pixels (not rounded).

    "none" stretches the whole picture; the other modes keep the aspect ratio and cut what is too wide or too high.
    """
    if framing.reshape_mode == "none":
        return (0.0, 0.0, float(width), float(height))
    scale = max(target_width / width, target_height / height)
    box_width, box_height = target_width / scale, target_height / scale
    left, top = (width - box_width) * framing.crop_x, (height - box_height) * framing.crop_y
    return (left, top, left + box_width, top + box_height)


def read_clip(path, framing, reader="auto"):
    """Decode one file to frames.

    Returns (frames, facts): frames uint8 [F, H, W, 3]; facts for the report. reader: "decord", "pyav", or "auto" for
    decord with PyAV wherever decord cannot be trusted. Raises BadClip with the reason.
    """
    path = str(path)
    with open(path, "rb") as file:
        start = file.read(64)
    if start.lstrip(b"\xef\xbb\xbf \r\n").startswith(PLAYLIST_STARTS):
        # A decoder would follow it to other files, or to addresses.
        raise BadClip("a playlist, not a video; refused")
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        frames, facts = read_picture(path, framing)
    elif reader == "decord":
        frames, facts = read_with_decord(path, framing)
    elif reader == "pyav":
        frames, facts = read_with_pyav(path, framing)
    else:
        try:
            frames, facts = read_with_decord(path, framing)
        except Untrusted as reason:
            frames, facts = read_with_pyav(path, framing)
            facts["note"] = f"read with PyAV: {reason}"
    return frames, facts


class Untrusted(Exception):
    """decord cannot read this file, or would read it wrongly without a word; PyAV may."""


def read_picture(path, framing):
    """A still picture as a clip of one frame."""
    if framing.latents_per_patch > 1:
        raise BadClip("a picture is one frame; this model takes at least 5")
    try:
        with Image.open(path) as picture:
            frame = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadClip(f"not a readable picture ({error})") from None
    facts = clip_facts("picture", [0.0], [0], frame.shape[1], frame.shape[0], framing)
    return np.stack([fit(frame, facts)]), facts


def read_with_decord(path, framing):
    """See `read_clip`. Raises Untrusted for a file that decord refuses, or is known to read wrongly."""
    try:
        import decord
    except ImportError:
        raise Untrusted("decord is not installed") from None
    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(path, num_threads=1)
        times = video.get_frame_timestamp(range(len(video)))[:, 0].astype(np.float64)
        keys = len(video.get_key_indices())
        height, width = video[0].shape[:2]
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise Untrusted(first_line(error)) from None
    # decord seeks wrongly in these three kinds of file, without a word: edit lists (mp4 cut with -c copy), streams
    # stored out of order (B-frames in AVI), and transport streams, which it shows as all key frames.
    if times[0] < -1e-6:
        raise Untrusted("its first frame lies before time zero (an edit list)")
    if np.any(np.diff(times) <= 0):
        raise Untrusted("its frames are not in order of time")
    if Path(path).suffix.lower() in {".ts", ".m2ts", ".mts", ".avi", ".mpg", ".mpeg", ".gif"} or (keys == len(times) > 1):
        raise Untrusted("its container does not seek exactly")
    announced = announced_frames(path)
    if announced > len(times):
        raise BadClip(f"truncated: {len(times)} of the {announced} frames it announces can be read")
    indices = choose_frames(times - times[0], framing)
    facts = clip_facts("decord", times - times[0], indices, width, height, framing)
    scaled = exact_scale(facts)
    try:
        if scaled and scaled != (width, height):
            resized = decord.VideoReader(path, num_threads=1, width=scaled[0], height=scaled[1])
            frames = resized.get_batch(indices).asnumpy()
            if frames.shape[1:3] == (scaled[1], scaled[0]):
                left, top = round(facts["box"][0] * scaled[0] / width), round(facts["box"][1] * scaled[1] / height)
                video[len(times) - 1]
                return frames[:, top : top + facts["height"], left : left + facts["width"]], facts
    except (decord.DECORDError, RuntimeError, IndexError):
        pass  # decord's scaler refuses a few widths (8, 12, 16, 24, 48, 72); full size and Pillow below do not
    try:
        frames = np.stack([fit(frame, facts) for frame in video.get_batch(indices).asnumpy()])
        video[len(times) - 1]  # a file that is cut short often opens well and fails only here
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise Untrusted(first_line(error)) from None
    return frames, facts


def announced_frames(path):
    """The number of frames that the container's header announces (0: it does not)."""
    try:
        import av

        with av.open(path) as container:
            return container.streams.video[0].frames
    except Exception:  # the header is a second opinion; where it cannot be had there is none
        return 0


def read_with_pyav(path, framing):
    """See `read_clip`. Two passes, so that memory holds the chosen frames only. Raises BadClip."""
    try:
        import av
    except ImportError:
        raise BadClip("decord cannot read it, and PyAV is not installed: pip install av") from None
    try:
        times, rotation, width, height = [], 0, 0, 0
        with av.open(path) as container:
            if not container.streams.video:
                raise BadClip("no video stream")
            announced = container.streams.video[0].frames
            for frame in container.decode(video=0):
                times.append(frame.time)
                rotation, width, height = frame.rotation, frame.width, frame.height
    except (av.FFmpegError, OSError, EOFError, ValueError) as error:
        if isinstance(error, BadClip):
            raise
        got = f"; {len(times)} frames could be read before that" if times else ""
        raise BadClip(f"not a readable video ({first_line(error)}){got}") from None
    if not times:
        raise BadClip("no frame in it can be decoded")
    if any(time is None for time in times):
        raise BadClip("its frames carry no times")
    if rotation % 180:
        width, height = height, width
    order = np.argsort(times, kind="stable")
    times = np.asarray(times)[order] - min(times)
    # Frames outside an edit list are announced but not shown, so only a large gap means a cut file.
    if announced > len(times) * 1.5 + 1 and path.endswith((".mp4", ".mov", ".m4v")) and not has_edit_list(path):
        raise BadClip(f"truncated: {len(times)} of the {announced} frames it announces can be read")
    indices = choose_frames(times, framing)
    facts = clip_facts("pyav", times, indices, width, height, framing)
    wanted = {int(order[i]) for i in indices}
    kept = {}
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                # Rotation is counter-clockwise, as numpy's; decord applies it by itself.
                picture = np.rot90(frame.to_ndarray(format="rgb24"), round(rotation / 90) % 4)
                kept[number] = fit(np.ascontiguousarray(picture), facts)
            if len(kept) == len(wanted):
                break
    return np.stack([kept[int(order[i])] for i in indices]), facts


def has_edit_list(path):
    """Whether an MP4's header holds an edit list (an `elst` box) in its first or last megabyte."""
    with open(path, "rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, os.path.getsize(path) - (1 << 20)))
        return b"elst" in head or b"elst" in file.read()


def first_line(error):
    """The part of a decoder's message that a person can read."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).split(": ", 1)[-1][:160]


def clip_facts(reader, times, indices, width, height, framing):
    """What the report and the cache need to know of a clip; JSON-ready."""
    target_height, target_width = choose_size(width, height, framing.sizes)
    box = source_box(width, height, target_width, target_height, framing)
    spacing = float(np.median(np.diff(times))) if len(times) > 1 else 1 / framing.fps
    seconds = float(times[-1] - times[0]) + spacing
    used = min(seconds, len(indices) / framing.fps)
    kept_area = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    stretch = (target_width / target_height) / ((box[2] - box[0]) / (box[3] - box[1]))
    return {
        "reader": reader,
        "source_frames": len(times),
        "source_fps": round((len(times) - 1) / float(times[-1] - times[0]), 3) if len(times) > 1 else 0.0,
        "source_seconds": round(seconds, 3),
        "source_width": width,
        "source_height": height,
        "indices": list(indices),
        "frames": len(indices),
        "repeated_frames": len(indices) - len(set(indices)),
        "seconds": round(used, 3),
        "used_percent": round(100 * used / seconds, 1),
        "cropped_percent": round(100 * (1 - kept_area), 1),
        "stretch_percent": round(100 * abs(stretch - 1), 1),
        "height": target_height,
        "width": target_width,
        "box": [float(side) for side in box],
        "note": "",
    }


def exact_scale(facts):
    """The (width, height) at which a decoder may scale the whole picture so that the crop is a plain slice of it.

    None where that would not be exact: the scaled picture and the offsets of the crop have to be whole pixels.
    """
    left, top, right, bottom = facts["box"]
    scale_x, scale_y = facts["width"] / (right - left), facts["height"] / (bottom - top)
    exact = [facts["source_width"] * scale_x, facts["source_height"] * scale_y, left * scale_x, top * scale_y]
    if any(abs(value - round(value)) > 1e-6 for value in exact):
        return None
    return round(exact[0]), round(exact[1])


def fit(frame, facts):
    """Crop and resize one RGB frame (bicubic, antialiased, as Pillow does it) to the size in `facts`."""
    size, box = (facts["width"], facts["height"]), facts["box"]
    if frame.shape[1::-1] == size and box == [0.0, 0.0, *map(float, size)]:
        return frame
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC, box=box))


def random_crop(framing, seed, name):
    """A copy of `framing` with the crop at a place that depends on the seed and the file's name alone."""
    digest = hashlib.sha256(f"{seed}/crop/{name}".encode()).digest()
    return replace(framing, crop_x=digest[0] / 255, crop_y=digest[1] / 255)
