"""What a video file holds: its frames' times, its pixels' aspect, its cropping; and its frames, decoded with PyAV.

Without torch: the guarded reader processes import this module and must start fast.
"""

import errno
import functools
import itertools
import os
import re
import subprocess
from bisect import bisect_right
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple

import numpy as np

HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic, the code points of ITU-T H.273
# Supported containers; the list also keeps PyAV from formats that refer to other files or addresses.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,gif,flv,asf,ogg,mxf,apng"


class BadClip(ValueError):
    """A file that cannot be trained on; the message says why, for the user."""


class Packets(NamedTuple):
    """What a file's packets and headers say, without decoding.

    stamps: the presentation times of the frames that are shown, increasing, in `unit` seconds; empty if the packets have none.
    kind: the container. doubt: why decord must not read the file, or "". aspect: width over height of a stored pixel. crop: see
    `cropping`. number, of: which video stream this is, from 1, and of how many. keys: the presentation times of its key frames.
    """

    stamps: list[int]
    unit: Fraction
    kind: str
    doubt: str
    aspect: Fraction
    crop: tuple[int, int, int, int]
    number: int
    of: int
    keys: list[int] = ()


class Place(NamedTuple):
    """Where frames are taken from: the number of the first one, and, if decoding starts at a key frame and not at the file's start, the
    presentation times of that and of the first one."""

    number: int = 0
    key: int | None = None
    stamp: int | None = None


START = Place()


class Decoded(NamedTuple):
    """What decoding a file's frames shows: their presentation times, the first of them, whether any is interlaced, and whether the
    codec crops their sides."""

    stamps: list[int]
    first: object
    is_interlaced: bool
    is_cropped: bool


@contextmanager
def open_video(path, crop_exactly=True):
    """A file's container and its main video stream, in PyAV. Raises BadClip, also in place of PyAV's errors in the block.

    crop_exactly: where the codec crops the left edge. libavcodec by itself moves it to an aligned address and keeps the width.
    """
    try:
        import av
    except ImportError:
        raise BadClip("a video needs PyAV: pip install av") from None
    try:
        with av.open(path, metadata_errors="replace", options={"format_whitelist": CONTAINERS}) as container:
            stream = container.streams.best("video")
            if stream is None or is_attached_picture(stream):
                raise BadClip("no video stream")
            if crop_exactly:
                stream.codec_context.flags |= av.codec.context.Flags.unaligned
            yield container, stream
    except av.FFmpegError as error:
        missing = missing_bytes(path)
        if missing:
            raise BadClip(f"truncated: at least {missing} bytes are missing at its end") from None
        if error.errno == errno.EINVAL:  # raised for containers outside the whitelist
            raise BadClip(f"not a video in a supported container ({CONTAINERS}); an image needs an image's suffix") from None
        raise BadClip(f"not a readable video ({error.strerror})") from None


def list_packets(path):
    """The Packets of a file, kept for its next windows. Raises BadClip for a truncated file."""
    status = os.stat(path)
    return packets_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def packets_of(path, *_):
    """`list_packets` of a file that has not changed: reading all of a film's packets takes longer than decoding one of its windows."""
    with open_video(path) as (container, stream):
        kind, unit, announced = container.format.name.split(",")[0], stream.time_base, stream.frames
        films = [s.index for s in container.streams.video if not is_attached_picture(s)]
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        crop = cropping(path, stream.index) if kind in ("mov", "matroska") else (0, 0, 0, 0)
        rest = (aspect, crop, films.index(stream.index) + 1, len(films))
        # The demuxer's last packet is empty: it flushes the decoder.
        packets = [(p.pts, p.is_keyframe, p.is_discard, p.is_corrupt) for p in container.demux(stream) if p.size]
    whole, missing = sum(not corrupt for _, _, _, corrupt in packets), missing_bytes(path)
    if missing:
        of = f" of the {announced}" if announced > whole else ""
        raise BadClip(f"truncated: {whole}{of} frames are there, at least {missing} bytes are missing at its end")
    if whole < len(packets):
        raise BadClip(f"damaged: {len(packets) - whole} of its {len(packets)} packets are broken")
    if any(stamp is None for stamp, _, _, _ in packets):
        return Packets([], unit, kind, "its packets have no timestamps", *rest)
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
    keys = sorted(stamp for stamp, key, _, _ in packets if key)
    return Packets([stamp for stamp, _ in by_time], unit, kind, doubt, *rest, keys)


def places(packets, number):
    """The Places to try, of a file with stamps, so that its frame `number` is the first: two key frames before it, as some containers are
    sought inexactly, then the file's start."""
    if number == 0:
        return [START]
    stamp = packets.stamps[number]
    before = bisect_right(packets.keys, stamp) - 1
    return [Place(number, packets.keys[key], stamp) for key in (before, before - 1) if key > 0] + [Place(number)]


def is_attached_picture(stream):
    """Whether a video stream is a cover, not a film."""
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def cropping(path, stream_index):
    """What the container hides of each frame, as pixels at (left, top, right, bottom): an MP4's clean aperture, Matroska's PixelCrop.

    FFmpeg's libraries read both, but PyAV does not show them; the ffmpeg program prints them.
    """
    import imageio_ffmpeg

    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-format_whitelist", CONTAINERS, "-i", f"file:{path}"]
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stderr.decode(errors="replace")
    except (RuntimeError, OSError) as error:
        told = str(error)
    if f"Stream #0:{stream_index}" not in told:
        reason = (told.strip().splitlines() or ["it prints nothing"])[-1]
        raise BadClip(
            f"imageio-ffmpeg's ffmpeg cannot tell whether the file hides edges ({reason}); set IMAGEIO_FFMPEG_EXE to one that runs"
        )
    described = re.search(rf"\n  Stream #0:{stream_index}\b(?:.*\n   )* +Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)", told)
    left, right, top, bottom = map(int, described.groups() if described else (0, 0, 0, 0))
    return left, top, right, bottom


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


def shown_frames(path, place=START, end=None, crop_exactly=True):
    """Decode the frames from `place` up to number `end` (None: the last) with PyAV, in presentation order; yields (frame, the size before
    the codec's cropping).

    Raises BadClip for a damaged frame, but not for one before `place`.
    """
    import av

    number, size, colours = 0 if place.key is None else place.number, None, None
    with open_video(path, crop_exactly) as (container, stream):
        try:
            for frame in decoded(container, stream, place):
                if (place.key is None and number < place.number) or (place.key is not None and (frame.pts or 0) < place.stamp):
                    number += place.key is None
                    continue
                if frame.pts is None:
                    raise BadClip("its frames have no timestamps")
                if frame.is_corrupt:
                    raise BadClip(f"damaged: frame {number} cannot be decoded completely")
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise BadClip(f"its size changes from {size[0]}x{size[1]} to {frame.width}x{frame.height} at frame {number}")
                colours = colours or (frame.color_trc in HDR_TRANSFERS, frame.colorspace)
                if (frame.color_trc in HDR_TRANSFERS, frame.colorspace) != colours:
                    raise BadClip(f"its colours change at frame {number} (another transfer or matrix); cut it there")
                context = stream.codec_context
                yield frame, (context.coded_width, context.coded_height)
                number += 1
                if number == end:
                    return
        except av.FFmpegError as error:
            raise BadClip(f"damaged: frame {number} cannot be decoded ({error.strerror})") from None
    if size is None:
        raise BadClip("no frame can be decoded")


def decoded(container, stream, place=START):
    """The frames of a stream from a key frame at or before `place` on. FFmpeg's VP8 and VP9 decoders drop transparency, libvpx keeps it.

    Raises BadClip where no such key frame is found.
    """
    import av

    decoder = None
    if stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in ("vp8", "vp9"):
        try:
            decoder = av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[stream.codec_context.name], "r")
        except av.codec.codec.UnknownCodecError:
            raise BadClip("transparent VP8 and VP9 need a PyAV with libvpx") from None
    packets = container.demux(stream)
    if place.key is not None:
        container.seek(place.key, stream=stream)
        packets = itertools.dropwhile(lambda packet: not packet.is_keyframe and packet.size, packets)  # others need frames before them
        first = next(packets)
        if first.pts is None or first.pts > place.stamp:
            raise BadClip("no key frame is found before it")
        packets = itertools.chain([first], packets)
    for packet in packets:
        # The last packet is empty: it flushes the decoder.
        yield from decoder.decode(packet if packet.size else None) if decoder else packet.decode()


def frame_times(path, kind, place=START, end=None):
    """Decode the frames from `place` up to number `end` (None: the last) and keep only the first. Returns Decoded."""
    stamps, first, interlaced, cropped = [], None, False, False
    for frame, coded_size in shown_frames(path, place, end):
        stamps.append(frame.pts)
        first, interlaced = first or frame, interlaced or frame.interlaced_frame
        cropped = cropped or coded_size[0] != frame.width  # only a left edge moves, see `open_video`
    if kind == "avi":  # an AVI frame's timestamp is its packet's number, and B-frames are stored out of order
        stamps.sort()
    backwards = np.nonzero(np.diff(stamps) < 0)[0]
    if len(backwards):
        raise BadClip(f"its timestamps go backwards after frame {place.number + backwards[0]} (joined recordings, or a damaged file)")
    return Decoded(stamps, first, interlaced, cropped)


def moves_by_alignment(path, place, first):
    """Whether the first frame at `place` is another one if the codec's cropping is not exact, as in decord."""
    other, _ = next(shown_frames(path, place, crop_exactly=False))
    return not np.array_equal(first.to_ndarray(format="gray"), other.to_ndarray(format="gray"))
