"""Decoding a file to uint8 frames: chosen by presentation time, resized and cropped.

Without torch: the guarded reader processes (cogvideox/reader.py) import this module and must start fast.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cogvideox.container import HDR_TRANSFERS, START, BadClip, Place, frame_times, list_packets, moves_by_alignment, places, shown_frames
from cogvideox.picture import colour_profile, has_alpha, picture_times, rgb_of, rgb_of_picture, side_data, treated, treatment_of
from cogvideox.windows import TOLERANCE_SECONDS

# Raise it when this module, container.py, picture.py or encodings.py compute other numbers from the same input.
ENCODING_VERSION = 1
SURVEY_VERSION = 3  # raise it when `read_clip` returns other facts; the clips are then decoded again, not encoded

IMAGE_SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff"}
VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"}
VIDEO_SUFFIXES |= {".mxf", ".mts", ".m2ts", ".vob", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".ogg", ".qt"}
CUT_WITHIN, CUT_LEAST, CUT_FACTOR = 3, 15.0, 3.0  # frames from an end; grey levels of 255; times the largest other change

PLAYLIST_STARTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<SMIL", b"<MPD")


@dataclass(frozen=True)
class Framing:
    """How a file is decoded to frames: everything that `read_clip` depends on except the file.

    `skip_frames_*` count frames of the source. `frames_per_latent` and `latents_per_patch` are the model's: the VAE maps
    4k + 1 frames to k + 1 latents, CogVideoX 1.5 patches two latents in time. `crop_x` and `crop_y` place the crop (0: left or
    top, 1: right or bottom). `sizes`: the allowed (height, width), of which a clip gets the nearest aspect ratio. `lengths`: the
    allowed frame counts (empty: any legal one). `background`: the RGB colour behind transparent pixels. `window`: the part of the
    file that is used, (start, end) in seconds after its first frame; everything else then applies inside it.
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
    background: tuple[int, int, int] = (255, 255, 255)
    window: tuple[float, float] | None = None


# -----------------------------------------------------------------------------
# Choosing frames and sizes


def longest_legal_length(num_frames, frames_per_latent=4, latents_per_patch=1):
    """The longest clip of at most `num_frames` that the VAE (4k + 1) and the temporal patch accept; 0 if there is none.

    AutoencoderKLCogVideoX maps 4k + 1 frames to k + 1 latents. With a temporal patch of p latents, k is a multiple of p: the
    transformer then takes p - 1 more latents in front (`pad_latents`), as CogVideoX 1.5 was trained.
    """
    step = frames_per_latent * latents_per_patch
    return num_frames - (num_frames - 1) % step if num_frames > 0 else 0


def frames_within(times, window):
    """The frames of a window as (first, end) of `times`, in seconds after the file's first frame; all of them for None.

    Raises BadClip for a window without frames.
    """
    if window is None:
        return 0, len(times)
    first, end = np.searchsorted(times, np.asarray(window) - TOLERANCE_SECONDS).tolist()
    if first == len(times):
        raise BadClip(f"its window starts after its end (the file has {file_seconds(times):.1f} seconds)")
    if first == end:
        raise BadClip(f"no frame between {window[0]:.3f} and {window[1]:.3f} seconds")
    return first, end


def file_seconds(times):
    """How long frames at these times are shown: the last one as long as most."""
    return float(times[-1] - times[0]) + (float(np.median(np.diff(times))) if len(times) > 1 else 0.0)


def late_end(times, framing):
    """What the report says of a window that ends after the file, in a list."""
    end, window = file_seconds(times), framing.window
    return [f"its window ends after the file ({end:.1f} seconds)"] if window and window[1] > end + 1 / framing.fps else []


def choose_frames(times, framing):
    """Pick source frames so that the clip plays at `framing.fps`, by presentation time, within `framing.window`.

    times: seconds, one per source frame, increasing. Target k is k / fps after the first frame that is not skipped; the
    source frame nearest in time is taken, so a variable frame rate keeps its speed, but a frame that is held for long is taken
    until the next one comes. A target may be at most half a source frame after the last frame. Returns a list of indices of
    legal length. Raises BadClip if no frames are left.
    """
    start, stop = frames_within(times, framing.window)
    total = stop - start
    first, end = start + framing.skip_frames_start, stop - framing.skip_frames_end
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
        raise BadClip(f"{count} frames at {framing.fps:g} fps, at least {min(framing.lengths)} are needed")
    targets = window[0] + np.arange(legal) / framing.fps
    right = np.clip(np.searchsorted(window, targets), 1, max(len(window) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(window) - 1)
    # A picture that is held for long is seen until the next one comes, not until half-way to it.
    is_soon = window[right] - targets <= max(spacing, 1 / framing.fps) + 1e-6
    nearest = np.where(is_soon & (np.abs(window[right] - targets) < np.abs(window[left] - targets) - 1e-6), right, left)
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
    frames, facts = read_picture(path, framing) if Path(path).suffix.lower() in IMAGE_SUFFIXES else read_video(path, framing, reader)
    before, after = other_shots(frames)
    # In frames of the source, as --skip_frames_start counts them.
    skipped = framing.skip_frames_start + facts["indices"][before] - facts["indices"][0] if before else 0
    return frames, facts | {"shot_before": skipped, "shot_after": after}


def other_shots(frames):
    """(at the start, at the end) how many frames of a clip [F, H, W, 3] seem to be of another shot: at most CUT_WITHIN each.

    A cut is a mean change from frame to frame of CUT_LEAST or more that is CUT_FACTOR times the largest change on the clip's own side of
    it. Clips of fewer than 9 frames are not judged. Each eighth pixel is enough: 7 ms for 49 x 480 x 720.
    """
    before, after = 0, 0
    changes = np.abs(np.diff(frames[:, ::8, ::8].astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    for count in range(1, CUT_WITHIN + 1) if len(frames) >= 9 else ():
        before = count if changes[count - 1] > max(CUT_LEAST, CUT_FACTOR * changes[count:-CUT_WITHIN].max()) else before
        after = count if changes[-count] > max(CUT_LEAST, CUT_FACTOR * changes[CUT_WITHIN:-count].max()) else after
    return before, after


def read_picture(path, framing):
    """An image as a clip of one frame, or an animated one (PNG, WebP, AVIF) as a clip."""
    try:
        with Image.open(path) as picture:
            if picture.format == "PNG" and picture.n_frames > 1:  # Pillow fills what a palette's pictures uncover with black
                return read_video(path, framing, "pyav")
            if picture.format == "AVIF" and first_transfer(path) in HDR_TRANSFERS:  # Pillow does not tell
                return read_video(path, framing, "pyav")
            if picture.format == "PNG" and png_transfer(path) in HDR_TRANSFERS:
                raise BadClip("an HDR picture; convert it to SDR first")
            times = picture_times(picture)
            if len(times) == 1 and framing.window:
                raise BadClip("a picture has no windows")
            indices = choose_frames(times, framing) if len(times) > 1 else [0]
            frames, profile, is_transparent, facts = {}, colour_profile(picture), False, None
            for index in sorted(set(indices)):
                picture.seek(index)
                frame, had_alpha = rgb_of_picture(ImageOps.exif_transpose(picture), framing.background, profile)
                facts = facts or clip_facts(times, indices, frame.shape[1::-1], framing)
                frames[index], is_transparent = fit(frame, facts), is_transparent or had_alpha
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, BadClip):
            raise
        raise BadClip(f"not a readable image ({error})") from None
    facts |= {"reader": "picture", "decoder": "", "treatment": {"profile": profile.sha256} if profile else {}}
    changes = late_end(times, framing) + ([f"{profile.name} to sRGB"] if profile else [])
    tell_changes(facts, changes + ["transparent"] * is_transparent, framing.background)
    return np.stack([frames[index] for index in indices]), facts


def first_transfer(path):
    """The transfer characteristic of a picture as PyAV reads it, or None if it does not."""
    try:
        return int(next(frame for frame, _ in shown_frames(path)).color_trc)
    except BadClip:
        return None


def png_transfer(path):
    """The transfer characteristic in a PNG's cICP chunk, or None."""
    with open(path, "rb") as file:
        start = file.read(65536).partition(b"IDAT")[0]
    place = start.find(b"cICP")
    return start[place + 5] if 0 <= place < len(start) - 8 else None


def tell_changes(facts, changes, background, doubt=""):
    """Fill in a clip's note for the report: what is changed to show it, and why decord does not read it. Records the background
    in its treatment if anything is transparent."""
    if "transparent" in changes:
        colour = "#{:02x}{:02x}{:02x}".format(*background)
        facts["treatment"] = facts["treatment"] | {"background": colour}
        changes = [f"transparent over {colour}" if change == "transparent" else change for change in changes]
    facts["note"] = "; ".join([", ".join(changes)] * bool(changes) + [f"read with PyAV: {doubt}"] * bool(doubt))


# -----------------------------------------------------------------------------
# Videos: PyAV lists the frames, decord decodes them if it lists the same


AS_STORED = "decord returns its pictures as they are stored"
CAN_BE_TRANSPARENT = "decord drops the transparency that its format can have"


class Untrusted(Exception):
    """decord cannot read this file, or would silently read it wrongly; PyAV may succeed."""


def read_video(path, framing, reader):
    """See `read_clip`.

    The packets give each frame's presentation time. PyAV then decodes up to the last chosen frame, which reveals damaged and
    missing frames: decord would return a neighbour instead. If the packets are wrong, the times come from decoding the whole file.
    Of a window nothing is decoded but its frames and those since the key frame before it, where the container can be sought.
    """
    packets = list_packets(path)
    stamps, indices, place, shown, doubt = verified_frames(path, packets, framing)
    unit, end = packets.unit, frames_within(seconds(stamps, packets.unit), framing.window)[1]
    turn = picture_turn(shown.first)
    if turn != NO_TURN:
        doubt = doubt or "its picture is rotated or mirrored when it is shown"
    treatment, changes = treatment_of(shown.first, shown.is_interlaced)
    changes += late_end(seconds(stamps, unit), framing)
    if any(packets.crop):
        treatment["crop"] = packets.crop
        changes.append("cropped by its container")
    if treatment:
        doubt = doubt or AS_STORED
    if has_alpha(shown.first):
        doubt = doubt or CAN_BE_TRANSPARENT
    if shown.is_cropped and moves_by_alignment(path, place, shown.first):
        doubt = doubt or "decord crops the left edge of its frames at another pixel"
    left, top, right, bottom = packets.crop
    stored, aspect = (shown.first.width - left - right, shown.first.height - top - bottom), (packets.aspect, 1)
    if turn[0]:
        stored, aspect = stored[::-1], aspect[::-1]
    if packets.aspect != 1:
        changes.append(f"{packets.aspect.numerator}:{packets.aspect.denominator} pixels")
    if packets.of > 1:
        doubt = doubt or "decord may read another of its video streams"
        treatment |= {"video_stream": packets.number}
        changes.append(f"video stream {packets.number} of {packets.of}")
    facts = clip_facts(seconds(stamps, unit), indices, stored, framing, aspect) | {"treatment": treatment}
    if reader != "pyav":
        try:
            if doubt:
                raise Untrusted(doubt)
            frames = read_with_decord(path, seconds(stamps, unit), facts)
            tell_changes(facts, changes, framing.background)
            return frames, facts | {"reader": "decord", "decoder": ""}  # there is one release
        except Untrusted as reason:
            if reader == "decord":
                raise
            doubt = str(reason)
    frames, is_transparent = read_with_pyav(path, place, end, unit, turn, facts, framing.background)
    changes += ["transparent"] if is_transparent else []
    obvious = reader == "pyav" or (changes and doubt in (AS_STORED, CAN_BE_TRANSPARENT))
    tell_changes(facts, changes, framing.background, "" if obvious else doubt)
    return frames, facts | {"reader": "pyav", "decoder": pyav_version()}


def verified_frames(path, packets, framing):
    """(stamps of all frames, indices of the chosen ones, Place to decode from, Decoded, why decord must not read the file or "").

    Raises BadClip for a damaged frame in the window.
    """
    stamps, doubt = packets.stamps, packets.doubt
    if stamps:
        times = seconds(stamps, packets.unit)
        indices, first = choose_frames(times, framing), frames_within(times, framing.window)[0]
        tried = places(packets, first)
        for place in tried:
            try:
                shown = frame_times(path, packets.kind, place, indices[-1] + 1)
            except BadClip:  # perhaps only from this key frame on
                if place is tried[-1]:
                    raise
                shown = None
            wanted = stamps[first : indices[-1] + 1]
            if shown and shown.stamps == (wanted if place.number else wanted[: len(shown.stamps)]):
                return stamps, indices, place, shown, doubt
            doubt = doubt or "its frames cannot be decoded from the key frame before its window"
    doubt = packets.doubt or "its packets do not match its frames"
    shown, place = frame_times(path, packets.kind), START
    stamps = shown.stamps
    times = seconds(stamps, packets.unit)
    indices, first = choose_frames(times, framing), frames_within(times, framing.window)[0]
    if framing.window:
        place = Place(first)
        shown = frame_times(path, packets.kind, place, indices[-1] + 1)
    return stamps, indices, place, shown, doubt


def pyav_version():
    """The release of FFmpeg in PyAV, on which colours depend."""
    from av import library_versions

    return " ".join("{} {}.{}".format(name, *library_versions[name]) for name in ("libavcodec", "libavfilter", "libswscale"))


def seconds(stamps, unit):
    """Timestamps as seconds after the first."""
    return (np.asarray(stamps, dtype=np.int64) - stamps[0]) * float(unit)


NO_TURN = (False, 1, 1)
TURNS = {0: NO_TURN, 90: (True, -1, 1), -90: (True, 1, -1), 180: (False, -1, -1), -180: (False, -1, -1)}  # by counterclockwise degrees


def picture_turn(frame):
    """How to turn a frame upright: (whether to swap rows and columns, then the step through rows, and through columns).

    Raises BadClip for anything but quarter turns and mirrors.
    """
    if side := side_data(frame, "DISPLAYMATRIX"):
        # A pixel at (x, y) is shown at x' = a x + c y, y' = b x + d y.
        a, b, _, c, d = np.frombuffer(side, np.int32)[:5].tolist()
        if (a and d) and not (b or c):
            return False, int(np.sign(d)), int(np.sign(a))
        if (b and c) and not (a or d):
            return True, int(np.sign(b)), int(np.sign(c))
    elif frame.rotation in TURNS:  # no matrix, or one beside data that PyAV cannot list
        return TURNS[frame.rotation]
    raise BadClip("its picture is rotated by an angle that is not a multiple of 90 degrees")


def turned(picture, turn):
    """A picture [h, w, ...] as it is shown. turn: from `picture_turn`."""
    swap, rows, columns = turn
    return (picture.swapaxes(0, 1) if swap else picture)[::rows, ::columns]


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
        left, top = (round(facts["box"][0] * width / facts["stored_width"]), round(facts["box"][1] * height / facts["stored_height"]))
        return frames[:, top : top + facts["height"], left : left + facts["width"]]
    raise Untrusted(reason)


def read_with_pyav(path, place, end, unit, turn, facts, background):
    """The frames at facts["indices"], treated and turned upright; and whether anything in them is transparent.

    place: where to decode from. end: the number after the last frame of the file or window, which a deinterlacer must not look at.
    """
    chosen, frames, is_transparent = set(facts["indices"]), {}, False
    end = min(max(chosen) + (2 if "deinterlaced" in facts["treatment"] else 1), end)  # a deinterlacer also looks at the next frame
    left, top, right, bottom = facts["treatment"].get("crop", (0, 0, 0, 0))
    shown = (frame for frame, _ in shown_frames(path, place, end))
    for number, frame in treated(shown, place.number, unit, facts["treatment"], chosen):
        picture, had_alpha = rgb_of(frame, background)
        picture = picture[top : frame.height - bottom, left : frame.width - right]
        frames[number], is_transparent = fit(np.ascontiguousarray(turned(picture, turn)), facts), is_transparent or had_alpha
    return np.stack([frames[index] for index in facts["indices"]]), is_transparent


def first_line(error):
    """The text of a decord message, without the source location and the failed condition."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^.*(Check failed: .*?\(.*?\)|\.cc:\d+:) *(ERROR|Error:)? *", "", text)[:160]


def clip_facts(times, indices, stored, framing, aspect=(1, 1)):
    """A clip's facts for the report and the cache; JSON-ready.

    times: of all frames of the file, in seconds. The source's frames and seconds are those of the window.
    stored: (width, height) of the stored picture. aspect: how wide and how high a stored pixel is shown. The source's size is that of
    the picture as it is shown, the box counts stored pixels.
    """
    width, height = stored[0] * float(aspect[0]), stored[1] * float(aspect[1])
    target_height, target_width = choose_size(width, height, framing.sizes)
    box = source_box(width, height, target_width, target_height, framing)
    first, end = frames_within(times, framing.window)
    file_end, times = file_seconds(times), times[first:end]
    spacing = float(np.median(np.diff(times))) if len(times) > 1 else 1 / framing.fps
    seconds = float(times[-1] - times[0]) + spacing
    used = min(seconds, len(indices) / framing.fps)
    kept_area = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    stretch = (target_width / target_height) / ((box[2] - box[0]) / (box[3] - box[1]))
    window = {"window": [framing.window[0], round(min(framing.window[1], file_end), 3)]} if framing.window else {}
    return window | {
        "reader": "",
        "source_frames": len(times),
        "source_fps": round((len(times) - 1) / float(times[-1] - times[0]), 3) if len(times) > 1 else 0.0,
        "source_seconds": round(seconds, 3),
        "source_width": round(width),
        "source_height": round(height),
        "stored_width": stored[0],
        "stored_height": stored[1],
        "indices": list(indices),
        "frames": len(indices),
        "repeated_frames": len(indices) - len(set(indices)),
        "seconds": round(used, 3),
        "used_percent": round(100 * used / seconds, 1),
        "cropped_percent": round(100 * (1 - kept_area), 1),
        "stretch_percent": round(100 * abs(stretch - 1), 1),
        "height": target_height,
        "width": target_width,
        # Rounding may pass the edge by a hair, which Pillow refuses.
        "box": [min(max(box[i] / float(aspect[i % 2]), 0.0), float(stored[i % 2])) for i in range(4)],
        "note": "",
    }


def exact_scale(facts):
    """The (width, height) to which a decoder can scale the whole picture so that the crop is a slice of it.

    None if that is not exact: the scaled picture and the crop's offsets must be whole pixels.
    """
    left, top, right, bottom = facts["box"]
    scale_x, scale_y = facts["width"] / (right - left), facts["height"] / (bottom - top)
    exact = [facts["stored_width"] * scale_x, facts["stored_height"] * scale_y, left * scale_x, top * scale_y]
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
    """The framing of one clip: it has its own window, and a random crop its own position."""
    framing = replace(framing, window=record.window) if record.window else framing
    return random_crop(framing, seed, record.listed) if framing.reshape_mode == "random" else framing


def image_request(record, framing, seed, size):
    """(path, framing) to decode a clip's image as one frame of `size` (height, width): its own image, cropped as the clip, or else the
    clip's first frame."""
    framing = replace(clip_framing(record, framing, seed), max_num_frames=1, sizes=(size,), lengths=(), latents_per_patch=1)
    if record.image is None:
        return record.path, framing
    return record.image, replace(framing, window=None, skip_frames_start=0, skip_frames_end=0)
