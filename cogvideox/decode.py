"""Decoding a file to uint8 frames: chosen by presentation time, resized and cropped.

Without torch: the guarded reader processes (cogvideox/reader.py) import this module and must start fast.
"""

import errno
import hashlib
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ENCODING_VERSION = 1  # raise it when this module or encodings.py computes other numbers from the same input

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"}
# Supported containers; the list also keeps PyAV from formats that refer to other files or addresses.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,gif,flv,asf,ogg"
PLAYLIST_STARTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<SMIL", b"<MPD")


@dataclass(frozen=True)
class Framing:
    """How a file is decoded to frames: everything that `read_clip` depends on except the file.

    `skip_frames_*` count frames of the source. `frames_per_latent` and `latents_per_patch` are the model's: the VAE maps
    4k + 1 frames to k + 1 latents, CogVideoX 1.5 patches two latents in time. `crop_x` and `crop_y` place the crop (0: left or
    top, 1: right or bottom). `sizes`: the allowed (height, width), of which a clip gets the nearest aspect ratio. `lengths`: the
    allowed frame counts (empty: any legal one).
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
    """A file that cannot be trained on; the message says why, for the user."""


# -----------------------------------------------------------------------------
# Choosing frames and sizes


def longest_legal_length(num_frames, frames_per_latent=4, latents_per_patch=1):
    """The longest clip of at most `num_frames` that the VAE (4k + 1) and the temporal patch accept; 0 if there is none.

    AutoencoderKLCogVideoX maps 4k + 1 frames to k + 1 latents; k + 1 must be a multiple of `patch_size_t`.
    """
    latents = (num_frames - 1) // frames_per_latent + 1 if num_frames > 0 else 0
    latents -= latents % latents_per_patch
    return (latents - 1) * frames_per_latent + 1 if latents > 0 else 0


def choose_frames(times, framing):
    """Pick source frames so that the clip plays at `framing.fps`, by presentation time.

    times: seconds, one per source frame, increasing. Target k is k / fps after the first frame that is not skipped; the
    source frame nearest in time is taken, so a variable frame rate keeps its speed. A target may be at most half a source
    frame after the last frame. Returns a list of indices of legal length. Raises BadClip if no frames are left.
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
    # 1e-6: 2.0 s at 8 fps must not lose its last frame to rounding.
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
    """The (height, width) of `sizes` nearest to a source's aspect ratio; the first one in a tie."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def source_box(width, height, target_width, target_height, framing):
    """The part of the source that is kept, as (left, top, right, bottom) in source pixels (not rounded).

    "none" stretches the whole picture; the other modes keep the aspect ratio and crop the excess.
    """
    if framing.reshape_mode == "none":
        return (0.0, 0.0, float(width), float(height))
    scale = max(target_width / width, target_height / height)
    box_width, box_height = target_width / scale, target_height / scale
    left, top = (width - box_width) * framing.crop_x, (height - box_height) * framing.crop_y
    return (left, top, left + box_width, top + box_height)


def read_clip(path, framing, reader="auto"):
    """Decode one file to frames.

    Returns (frames, facts): frames uint8 [F, H, W, 3]; facts for the report. reader: "decord", "pyav", or "auto": decord, and
    PyAV for files that decord would read wrongly. Raises BadClip with the reason.
    """
    path = str(path)
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise BadClip(f"cannot be opened ({error.strerror})") from None
    if start.lstrip(b"\xef\xbb\xbf \r\n").startswith(PLAYLIST_STARTS):
        # A decoder would open the files and addresses in it.
        raise BadClip("a playlist, not a video")
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        return read_picture(path, framing)
    return read_video(path, framing, reader)


def read_picture(path, framing):
    """An image as a clip of one frame."""
    if framing.latents_per_patch > 1:
        raise BadClip("an image is one frame; this model needs at least 5")
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
                picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            frame = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadClip(f"not a readable image ({error})") from None
    facts = clip_facts([0.0], [0], frame.shape[1], frame.shape[0], framing)
    return np.stack([fit(frame, facts)]), facts | {"reader": "picture"}


# -----------------------------------------------------------------------------
# Videos: PyAV lists the frames, decord decodes them if it lists the same


class Untrusted(Exception):
    """decord cannot read this file, or would silently read it wrongly; PyAV may succeed."""


def read_video(path, framing, reader):
    """See `read_clip`.

    The packets give each frame's presentation time. PyAV then decodes up to the last chosen frame, which reveals damaged and
    missing frames: decord would return a neighbour instead. If the packets are wrong, the times come from decoding the whole file.
    """
    stamps, unit, kind, doubt = list_packets(path)
    indices = choose_frames(seconds(stamps, unit), framing) if stamps else []
    shown, picture = frame_times(path, kind, indices[-1] + 1 if indices else None)
    if not indices or shown != stamps[: len(shown)]:
        doubt = doubt or "its packets do not match its frames"
        stamps, picture = frame_times(path, kind)
        indices = choose_frames(seconds(stamps, unit), framing)
    turn = picture_turn(picture)
    if turn != NO_TURN:
        doubt = doubt or "its picture is rotated or mirrored when it is shown"
    width, height = (picture.height, picture.width) if turn[0] else (picture.width, picture.height)
    facts = clip_facts(seconds(stamps, unit), indices, width, height, framing)
    if reader != "pyav":
        try:
            if doubt:
                raise Untrusted(doubt)
            return read_with_decord(path, seconds(stamps, unit), facts), facts | {"reader": "decord"}
        except Untrusted as reason:
            if reader == "decord":
                raise
            facts["note"] = f"read with PyAV: {reason}"
    return read_with_pyav(path, turn, facts), facts | {"reader": "pyav"}


def seconds(stamps, unit):
    """Timestamps as seconds after the first."""
    return (np.asarray(stamps, dtype=np.int64) - stamps[0]) * float(unit)


@contextmanager
def open_video(path):
    """A file's container and its main video stream, in PyAV. Raises BadClip, also in place of PyAV's errors in the block."""
    try:
        import av
    except ImportError:
        raise BadClip("a video needs PyAV: pip install av") from None
    try:
        with av.open(path, metadata_errors="replace", options={"format_whitelist": CONTAINERS}) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise BadClip("no video stream")
            yield container, stream
    except av.FFmpegError as error:
        missing = missing_bytes(path)
        if missing:
            raise BadClip(f"truncated: at least {missing} bytes are missing at its end") from None
        if error.errno == errno.EINVAL:  # raised for containers outside the whitelist
            raise BadClip(f"not a video in a supported container ({CONTAINERS}); an image needs an image's suffix") from None
        raise BadClip(f"not a readable video ({error.strerror})") from None


def list_packets(path):
    """The presentation times of a file's frames, from its packets, without decoding.

    Returns (timestamps of the frames shown, increasing; their unit in seconds; the container; why decord must not read the
    file, or ""). The list is empty if the packets have no times. Raises BadClip for a truncated file.
    """
    with open_video(path) as (container, stream):
        kind, unit, announced = container.format.name.split(",")[0], stream.time_base, stream.frames
        # The demuxer's last packet is empty: it flushes the decoder.
        packets = [(p.pts, p.is_keyframe, p.is_discard, p.is_corrupt) for p in container.demux(stream) if p.size]
    whole, missing = sum(not corrupt for _, _, _, corrupt in packets), missing_bytes(path)
    if missing:
        of = f" of the {announced}" if announced > whole else ""
        raise BadClip(f"truncated: {whole}{of} frames are there, at least {missing} bytes are missing at its end")
    if whole < len(packets):
        raise BadClip(f"damaged: {len(packets) - whole} of its {len(packets)} packets are broken")
    if any(stamp is None for stamp, _, _, _ in packets):
        return [], unit, kind, "its packets have no timestamps"
    shown = [(stamp, key) for stamp, key, discard, _ in packets if not discard]
    by_time = sorted(shown)
    doubt = ""
    # In each of these cases decord silently returns other frames than requested.
    if kind not in ("mov", "matroska"):
        doubt = f"decord seeks exactly only in MP4, MOV, MKV and WebM, this is {kind}"
    elif len(shown) < len(packets):
        doubt = "an edit list hides some of its frames"
    elif [key for _, key in shown] != [key for _, key in by_time]:
        doubt = "frames stored after a key frame are shown before it (an open group of pictures)"
    return [stamp for stamp, _ in by_time], unit, kind, doubt


def missing_bytes(path):
    """At least how many bytes are missing at a file's end.

    Computed from the boxes of an MP4, the segment of a Matroska file, the RIFF header of an AVI, and the last byte of a GIF.
    """
    size, end = os.path.getsize(path), 0
    with open(path, "rb") as file:
        start = file.read(4096)
        segment = start.find(b"\x18\x53\x80\x67") + 4
        if start.startswith(b"RIFF"):
            end = 8 + int.from_bytes(start[4:8], "little")
        elif start.startswith(b"\x1a\x45\xdf\xa3") and 4 <= segment < len(start) and start[segment]:
            width = 9 - start[segment].bit_length()  # the leading zeros encode the number's length in bytes
            length = int.from_bytes(start[segment : segment + width]) - (1 << 7 * width)
            if length < (1 << 7 * width) - 1:  # all ones: a live recording, of unknown length
                end = segment + width + length
        elif start.startswith(b"GIF8"):
            file.seek(max(0, size - 4096))
            end = size + (not file.read().rstrip(b"\0\r\n").endswith(b";"))
        else:
            position = 0
            while position + 8 <= size:
                file.seek(position)
                length, kind = int.from_bytes(file.read(4)), file.read(4)
                if length == 1:
                    length = int.from_bytes(file.read(8))
                if length < 8:  # 0: up to the end of the file
                    break
                position += length
                if kind in (b"moov", b"moof", b"mdat"):
                    end = position
    return max(0, end - size)


def shown_frames(path, count=None):
    """Decode at most `count` frames with PyAV, in presentation order. Raises BadClip for a damaged frame."""
    import av

    number, size = 0, None
    with open_video(path) as (container, stream):
        try:
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise BadClip("its frames have no timestamps")
                if frame.is_corrupt:
                    raise BadClip(f"damaged: frame {number} cannot be decoded completely")
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise BadClip(f"its size changes from {size[0]}x{size[1]} to {frame.width}x{frame.height} at frame {number}")
                yield frame
                number += 1
                if number == count:
                    return
        except av.FFmpegError as error:
            raise BadClip(f"damaged: frame {number} cannot be decoded ({error.strerror})") from None
    if not number:
        raise BadClip("no frame can be decoded")


def frame_times(path, kind, count=None):
    """Decode `count` frames (None: all) and keep only the first. Returns (their timestamps, the first frame)."""
    stamps, first = [], None
    for frame in shown_frames(path, count):
        stamps.append(frame.pts)
        first = first or frame
    if kind == "avi":  # an AVI frame's timestamp is its packet's number, and B-frames are stored out of order
        stamps.sort()
    backwards = np.nonzero(np.diff(stamps) < 0)[0]
    if len(backwards):
        raise BadClip(f"its timestamps go backwards after frame {backwards[0]} (joined recordings, or a damaged file)")
    return stamps, first


NO_TURN = (False, 1, 1)


def picture_turn(frame):
    """How to turn a frame upright: (whether to swap rows and columns, then the step through rows, and through columns).

    Raises BadClip for anything but quarter turns and mirrors.
    """
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return NO_TURN
    # A pixel at (x, y) is shown at x' = a x + c y, y' = b x + d y.
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].tolist()
    if (a and d) and not (b or c):
        return False, int(np.sign(d)), int(np.sign(a))
    if (b and c) and not (a or d):
        return True, int(np.sign(b)), int(np.sign(c))
    raise BadClip("its picture is rotated by an angle that is not a multiple of 90 degrees")


def read_with_decord(path, times, facts):
    """The frames at facts["indices"]. Raises Untrusted if decord rejects the file, or lists other frames than `times`."""
    try:
        import decord
    except ImportError:
        raise Untrusted("decord is not installed") from None
    decord.logging.set_level(decord.logging.QUIET)
    scaled = exact_scale(facts)
    # decord's scaler rejects a few widths (8, 12, 16, 24, 48, 72): retry at full size, and scale with Pillow.
    for width, height in ([scaled] if scaled else []) + [(-1, -1)]:
        try:
            video = decord.VideoReader(path, num_threads=1, width=width, height=height)
            listed = video.get_frame_timestamp(range(len(video)))[:, 0]
            if len(listed) != len(times) or not np.allclose(listed - listed[0], times, rtol=1e-6, atol=1e-3):
                raise Untrusted(f"decord lists {len(listed)} frames at other times")
            if width == -1:  # four at a time: 49 full frames of a 4K clip are 1.2 GB
                groups = [facts["indices"][i : i + 4] for i in range(0, facts["frames"], 4)]
                return np.stack([fit(frame, facts) for group in groups for frame in video.get_batch(group).asnumpy()])
            frames = video.get_batch(facts["indices"]).asnumpy()
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            reason = f"decord: {first_line(error)}"
            continue
        left, top = (round(facts["box"][0] * width / facts["source_width"]), round(facts["box"][1] * height / facts["source_height"]))
        return frames[:, top : top + facts["height"], left : left + facts["width"]]
    raise Untrusted(reason)


def read_with_pyav(path, turn, facts):
    """The frames at facts["indices"], turned upright."""
    chosen, frames = set(facts["indices"]), {}
    swap, rows, columns = turn
    for number, frame in enumerate(shown_frames(path, max(chosen) + 1)):
        if number in chosen:
            picture = frame.to_ndarray(format="rgb24")
            picture = (picture.swapaxes(0, 1) if swap else picture)[::rows, ::columns]
            frames[number] = fit(np.ascontiguousarray(picture), facts)
    return np.stack([frames[index] for index in facts["indices"]])


def first_line(error):
    """The text of a decord message, without the source location and the failed condition."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^.*(Check failed: .*?\(.*?\)|\.cc:\d+:) *(ERROR|Error:)? *", "", text)[:160]


def clip_facts(times, indices, width, height, framing):
    """A clip's facts for the report and the cache; JSON-ready."""
    target_height, target_width = choose_size(width, height, framing.sizes)
    box = source_box(width, height, target_width, target_height, framing)
    spacing = float(np.median(np.diff(times))) if len(times) > 1 else 1 / framing.fps
    seconds = float(times[-1] - times[0]) + spacing
    used = min(seconds, len(indices) / framing.fps)
    kept_area = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    stretch = (target_width / target_height) / ((box[2] - box[0]) / (box[3] - box[1]))
    return {
        "reader": "",
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
    """The (width, height) to which a decoder can scale the whole picture so that the crop is a slice of it.

    None if that is not exact: the scaled picture and the crop's offsets must be whole pixels.
    """
    left, top, right, bottom = facts["box"]
    scale_x, scale_y = facts["width"] / (right - left), facts["height"] / (bottom - top)
    exact = [facts["source_width"] * scale_x, facts["source_height"] * scale_y, left * scale_x, top * scale_y]
    if any(abs(value - round(value)) > 1e-6 for value in exact):
        return None
    return round(exact[0]), round(exact[1])


def fit(frame, facts):
    """Crop and resize one RGB frame (Pillow's antialiased bicubic) to the size in `facts`."""
    size, box = (facts["width"], facts["height"]), facts["box"]
    if frame.shape[1::-1] == size and box == [0.0, 0.0, *map(float, size)]:
        return frame
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC, box=box))


def random_crop(framing, seed, name):
    """A copy of `framing` with a crop position that depends only on the seed and the file's name."""
    digest = hashlib.sha256(f"{seed}/crop/{name}".encode(errors="surrogateescape")).digest()
    return replace(framing, crop_x=digest[0] / 255, crop_y=digest[1] / 255)


def clip_framing(record, framing, seed):
    """The framing of one clip: a random crop has its own position."""
    return random_crop(framing, seed, record.listed) if framing.reshape_mode == "random" else framing
