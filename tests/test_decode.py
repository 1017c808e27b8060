"""A corpus of odd files, made with ffmpeg: each is decoded as ffmpeg decodes it, frame by frame, or named as bad.

    python -m pytest tests/test_decode.py

The corpus is made once; a file that the ffmpeg at hand has no encoder for is skipped.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise

import imageio_ffmpeg
import numpy as np
import pytest

from cogvideox.decode import BadClip, Framing, Untrusted, read_clip
from cogvideox.reader import Readers
from dataset import locate

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
TOLERANCE = 3.0  # mean levels of 255: two versions of one decoder interpolate the colour planes a little differently
APART = 12.0  # what a neighbouring frame differs by at least; four times the tolerance


# -----------------------------------------------------------------------------
# The corpus


class Missing(Exception):
    """This ffmpeg has no encoder for a file, or for the file that it is made from."""


def ffmpeg(*arguments, data=b""):
    """Run ffmpeg. Returns (stdout, stderr)."""
    result = subprocess.run([FFMPEG, "-hide_banner", "-y", *map(str, arguments)], input=data, capture_output=True)
    told = result.stderr.decode(errors="replace")
    if "Unknown encoder" in told or "No such file" in told:
        raise Missing(told)
    assert result.returncode == 0, told[-2000:]
    return result.stdout, told


def pictures(count, width, height):
    """Waves of three colours that run at three speeds: no frame is like another, and no turn of it is like another."""
    number, row, column, colour = np.ogrid[:count, :height, :width, :3]
    period, strength = np.array([9, 7, 11])[colour], np.array([30, 75, 30])[colour]  # green leads, so that grey moves as well
    waves = strength * np.sin(2 * np.pi * (number / period + column / width + row / height / 2) + colour)
    return (90 + 60 * column / width + waves).astype(np.uint8)


def make(path, *options, count=48, width=96, height=64, fps="24", also=()):
    """Encode `count` pictures; `also` is a second input."""
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "-"]
    colours = [] if "-pix_fmt" in options or path.suffix in (".gif", ".png", ".jpg") else ["-pix_fmt", "yuv420p"]
    ffmpeg(*raw, *also, *colours, *options, path, data=pictures(count, width, height).tobytes())


def x264(*more, group=12, b_frames=3):
    """Options for H.264 with a key frame every `group` frames and exactly `b_frames` B-frames between two others."""
    groups = f"keyint={group}:min-keyint={group}:scenecut=0:bframes={b_frames}:b-adapt=0"
    return ["-c:v", "libx264", "-preset", "veryfast", "-x264-params", groups, *more]


OPEN = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
CLOSED = OPEN.replace("open-gop=1", "open-gop=0")
X265 = ["-c:v", "libx265", "-movflags", "+faststart", "-x265-params", f"log-level=none:pools=1:{CLOSED}"]
X265_OPEN = ["-c:v", "libx265", "-x265-params", f"log-level=none:pools=1:{OPEN}"]
VP9 = ["-c:v", "libvpx-vp9", "-b:v", "500k", "-cpu-used", 8, "-g", 20]
MPEG4 = ["-c:v", "mpeg4", "-bf", 2, "-g", 12, "-q:v", 3]
MPEG2 = ["-c:v", "mpeg2video", "-bf", 2, "-g", 12, "-q:v", 3]
SOUND = ["-f", "lavfi", "-i", "sine=duration=4"]
TWO_RATES = ["-vf", "setpts='if(lt(N,24),N/24,1+(N-24)/12)/TB'", "-fps_mode", "vfr", "-enc_time_base", "1:1200"]
JITTER = ["-vf", "setpts='(N+0.9*random(1))/24/TB'", "-fps_mode", "vfr", "-enc_time_base", "1:12000"]
BT709 = ["-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]

# name: (options of the encoder, what else `make` is told)
ENCODED = {
    "plain.mp4": (x264(b_frames=0), {}),
    "b_frames.mp4": (x264(), {}),
    "ntsc.mp4": (x264(), {"fps": "30000/1001", "count": 60}),
    "open_group.mp4": (["-c:v", "libx264", "-x264-params", OPEN], {}),
    "open_group.mkv": (["-c:v", "libx264", "-x264-params", OPEN], {}),
    "one_long_group.mp4": (x264(group=999), {"count": 60}),
    "hevc.mp4": ([*X265, "-tag:v", "hvc1"], {}),
    "hevc_open_group.mp4": (X265_OPEN, {}),
    "hevc_open_group.mkv": (X265_OPEN, {}),
    "10_bit.mp4": (x264("-pix_fmt", "yuv420p10le"), {}),
    "hevc_10_bit.mp4": ([*X265, "-pix_fmt", "yuv420p10le"], {}),
    "444.mp4": (x264("-pix_fmt", "yuv444p"), {}),
    "422_10_bit.mkv": (x264("-pix_fmt", "yuv422p10le"), {}),
    "grey.mp4": (x264("-pix_fmt", "gray"), {}),
    "rgb.mp4": (["-c:v", "libx264rgb", "-pix_fmt", "rgb24"], {}),
    "bt709.mp4": (x264(*BT709), {}),
    "full_range.mp4": (x264("-vf", "scale=out_range=full", "-color_range", "pc"), {}),
    "interlaced.mp4": (x264("-flags", "+ildct+ilme"), {}),
    "fragments.mp4": (x264("-movflags", "frag_keyframe+empty_moov"), {}),
    "index_first.mp4": (x264("-movflags", "+faststart", b_frames=0), {}),
    "tiny.mp4": (x264(), {"width": 16, "height": 16}),
    "one_frame.mp4": (x264(), {"count": 1}),
    "two_frames.mp4": (x264(), {"count": 2}),
    "two_rates.mp4": (x264(*TWO_RATES), {}),
    "two_rates.mkv": (x264(*TWO_RATES), {}),
    "jitter.mp4": (x264(*JITTER), {}),
    "starts_late.mp4": (x264("-output_ts_offset", 5), {}),
    "starts_late.mkv": (x264("-output_ts_offset", 5), {}),
    "starts_late.ts": (x264("-output_ts_offset", 5), {}),
    "longer_sound.mp4": (x264("-c:a", "aac"), {"also": SOUND}),
    "longer_sound.mkv": (x264("-c:a", "aac"), {"also": SOUND}),
    "h264.mkv": (x264(), {}),
    "h264.ts": (x264(), {}),
    "h264.avi": (x264(), {}),
    "h264.flv": (x264(), {}),
    "hidden_frames.webm": ([*VP9, "-auto-alt-ref", 1, "-lag-in-frames", 16], {}),
    "vp9.mp4": (VP9, {}),
    "alpha.webm": ([*VP9, "-pix_fmt", "yuva420p"], {}),
    "odd_size.webm": (VP9, {"width": 127, "height": 95}),
    "odd_size_444.mp4": (x264("-pix_fmt", "yuv444p"), {"width": 127, "height": 95}),
    "odd_size.avi": (MPEG4, {"width": 127, "height": 95}),
    "hidden_frames_vp8.webm": (["-c:v", "libvpx", "-b:v", "500k", "-auto-alt-ref", 1, "-lag-in-frames", 16, "-g", 20], {}),
    "av1.mp4": (["-c:v", "libaom-av1", "-cpu-used", 8, "-usage", "realtime", "-g", 20], {}),
    "av1.webm": (["-c:v", "libsvtav1", "-preset", 12, "-g", 20], {}),
    "mpeg4.avi": (MPEG4, {}),
    "mpeg4.mp4": (MPEG4, {}),
    "xvid.avi": (["-c:v", "libxvid", "-bf", 2, "-g", 12, "-q:v", 3], {}),
    "mpeg2.ts": (MPEG2, {}),
    "mpeg2.mpg": (MPEG2, {}),
    "wmv2.wmv": (["-c:v", "wmv2", "-q:v", 3, "-g", 12], {}),
    "theora.ogv": (["-c:v", "libtheora", "-q:v", 8, "-g", 12], {}),
    "ffv1.mkv": (["-c:v", "ffv1"], {}),
    "prores.mov": (["-c:v", "prores_ks"], {}),
    "prores_alpha.mov": (["-c:v", "prores_ks", "-profile:v", 4, "-pix_fmt", "yuva444p10le"], {}),
    "mjpeg.avi": (["-c:v", "mjpeg", "-q:v", 2], {}),
    "mjpeg.mov": (["-c:v", "mjpeg", "-q:v", 2], {}),
    "animation.gif": ([], {"fps": "10", "count": 24}),
    "one_frame.gif": ([], {"count": 1}),
    "still.png": ([], {"count": 1}),
    "still_16_bit.png": (["-pix_fmt", "gray16be"], {"count": 1}),
    "still.jpg": (["-q:v", 2], {"count": 1}),
    "ünï cödé %03d 视频.mp4": (x264(), {}),
}


def copy_streams(source, target, *before, after=()):
    """Put the streams of a file into another container, undecoded."""
    ffmpeg(*before, "-i", source, "-map", "0", "-c", "copy", *after, target)


def shorten_edit(source, target):
    """Halve the length that an MP4's edit list shows, as a phone does that trims a recording without rewriting it."""
    content = bytearray(source.read_bytes())
    place = content.index(b"elst") + 12
    content[place : place + 4] = (int.from_bytes(content[place : place + 4]) // 2).to_bytes(4)
    target.write_bytes(content)


def patch(source, target, box, offset, value):
    """Overwrite a 32-bit number in an MP4 header."""
    content = bytearray(source.read_bytes())
    place = content.index(box) + 4 + offset
    content[place : place + 4] = value.to_bytes(4)
    target.write_bytes(content)


def cut(source, target, share):
    """Keep the first part of a file."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])


def blot(source, target, share=0.6):
    """Zero a tenth of a file."""
    content = bytearray(source.read_bytes())
    start, length = int(len(content) * share), len(content) // 10
    content[start : start + length] = bytes(length)
    target.write_bytes(content)


def join_two_sizes(folder, target):
    """A recording whose picture grows half-way, as those of video calls do."""
    for name, width, height in (("narrow.ts", 96, 64), ("wide.ts", 128, 96)):
        make(folder / name, *x264(), width=width, height=height, count=24)
    (folder / "list.txt").write_text("file narrow.ts\nfile wide.ts\n")
    ffmpeg("-f", "concat", "-i", folder / "list.txt", "-c", "copy", folder / target)


def with_latin_1_title(source, target):
    """A file whose title is not UTF-8, as old tools wrote it."""
    copy_streams(source, target, after=("-metadata", "title=Xaf\u00e9"))
    target.write_bytes(target.read_bytes().replace("Xaf\u00e9".encode(), b"Caf\xe9s"))


COVER = ["-c", "copy", "-disposition:v:0", "attached_pic"]
# name: how it is made from those above. The first are good, the last are bad.
DERIVED = {
    "turned_90.mp4": lambda f, t: copy_streams(f / "b_frames.mp4", t, "-display_rotation", 90),
    "turned_180.mp4": lambda f, t: copy_streams(f / "b_frames.mp4", t, "-display_rotation", 180),
    "turned_270.mp4": lambda f, t: copy_streams(f / "b_frames.mp4", t, "-display_rotation", 270),
    "turned_90.mkv": lambda f, t: copy_streams(f / "b_frames.mp4", t, "-display_rotation", 90),
    "mirrored.mp4": lambda f, t: copy_streams(f / "b_frames.mp4", t, "-display_hflip"),
    "mirrored_and_turned.mp4": lambda f, t: copy_streams(f / "b_frames.mp4", t, "-display_rotation", 90, "-display_hflip"),
    "edit_list.mp4": lambda f, t: copy_streams(f / "b_frames.mp4", t, "-ss", 0.9),
    "edit_list_ends_early.mp4": lambda f, t: shorten_edit(f / "b_frames.mp4", t),
    "edit_list_both.mp4": lambda f, t: shorten_edit(f / "edit_list.mp4", t),
    "edit_list_open_group.mp4": lambda f, t: copy_streams(f / "open_group.mp4", t, "-ss", 0.9),
    "starts_in_open_group.mkv": lambda f, t: copy_streams(f / "hevc_open_group.mkv", t, "-ss", 0.9),
    "delayed.mp4": lambda f, t: ffmpeg("-itsoffset", 1, "-i", f / "b_frames.mp4", *SOUND, "-c:v", "copy", "-c:a", "aac", t),
    "two_videos.mp4": lambda f, t: ffmpeg("-i", f / "tiny.mp4", "-i", f / "b_frames.mp4", "-map", 0, "-map", 1, "-c", "copy", t),
    "cover_first.mp4": lambda f, t: ffmpeg("-i", f / "still.jpg", "-i", f / "b_frames.mp4", "-map", 0, "-map", 1, *COVER, t),
    "latin_1_title.mkv": lambda f, t: with_latin_1_title(f / "b_frames.mp4", t),
    "ts_named.mp4": lambda f, t: shutil.copy(f / "h264.ts", t),
    "avi_named.mp4": lambda f, t: shutil.copy(f / "mpeg4.avi", t),
    "mp4_named.avi": lambda f, t: shutil.copy(f / "b_frames.mp4", t),
    "gif_named.mp4": lambda f, t: shutil.copy(f / "animation.gif", t),
    "announces_more_times.mp4": lambda f, t: patch(f / "index_first.mp4", t, b"stts", 8, 48000),
    "cut_at_60.ts": lambda f, t: cut(f / "h264.ts", t, 0.6),
}
NOT_VIDEO = "not a readable video"
# name: (how it is made, what the reason has to say)
BAD = {
    "empty.mp4": (lambda f, t: t.write_bytes(b""), NOT_VIDEO),
    "text.mp4": (lambda f, t: t.write_text("not a video at all\n" * 50), NOT_VIDEO),
    "random.mp4": (lambda f, t: t.write_bytes(np.random.default_rng(0).bytes(20000)), NOT_VIDEO),
    "picture_named.mp4": (lambda f, t: shutil.copy(f / "still.jpg", t), "an image needs an image's suffix"),
    "png_named.mp4": (lambda f, t: shutil.copy(f / "still.png", t), "an image needs an image's suffix"),
    "video_named.png": (lambda f, t: shutil.copy(f / "plain.mp4", t), "not a readable image"),
    "cut.jpg": (lambda f, t: cut(f / "still.jpg", t, 0.6), "not a readable image.*truncated"),
    "raw_stream.mp4": (
        lambda f, t: ffmpeg("-i", f / "b_frames.mp4", "-c", "copy", "-f", "h264", t),
        "not a video in a supported container",
    ),
    "sound_only.mp4": (lambda f, t: ffmpeg(*SOUND, "-c:a", "aac", t), "no video stream"),
    "sound_with_cover.mp4": (
        lambda f, t: ffmpeg("-i", f / "still.jpg", *SOUND, "-map", 0, "-map", 1, "-c:a", "aac", *COVER[2:], "-c:v", "copy", t),
        "no video",
    ),
    "playlist.mp4": (lambda f, t: t.write_text(f"#EXTM3U\n#EXTINF:2,\n{f}/plain.mp4\n#EXT-X-ENDLIST\n"), "a playlist"),
    "ffconcat.mp4": (lambda f, t: t.write_text("ffconcat version 1.0\nfile plain.mp4\n"), "a playlist"),
    "hidden_playlist.mp4": (lambda f, t: t.write_text('<!-- --><MPD profiles="urn:mpeg:dash:profile:x"/>\n' * 9), "not a "),
    "cut_index_last.mp4": (lambda f, t: cut(f / "b_frames.mp4", t, 0.6), r"truncated: at least \d+ bytes are missing at its end"),
    "cut_at_60.mp4": (lambda f, t: cut(f / "index_first.mp4", t, 0.6), r"truncated: \d\d of the 48 frames are there"),
    "cut_at_99.mp4": (lambda f, t: cut(f / "index_first.mp4", t, 0.99), "truncated: 47 of the 48 frames are there"),
    "cut_fragments.mp4": (lambda f, t: cut(f / "fragments.mp4", t, 0.6), r"truncated: \d\d frames are there"),
    "cut_at_60.mkv": (lambda f, t: cut(f / "h264.mkv", t, 0.6), r"truncated: \d\d frames are there"),
    "cut_at_60.webm": (lambda f, t: cut(f / "hidden_frames.webm", t, 0.6), r"truncated: \d\d frames are there"),
    "cut_at_60.avi": (lambda f, t: cut(f / "mpeg4.avi", t, 0.6), r"truncated: \d\d of the 48 frames are there"),
    "cut_at_60.gif": (lambda f, t: cut(f / "animation.gif", t, 0.6), "truncated: 15 frames are there"),
    "announces_more_frames.mp4": (lambda f, t: patch(f / "index_first.mp4", t, b"stsz", 8, 48000), "no frame can be decoded"),
    "announces_2_billion.mp4": (lambda f, t: patch(f / "index_first.mp4", t, b"stsz", 8, 2**31 - 1), NOT_VIDEO),
    "blotted.mp4": (lambda f, t: blot(f / "index_first.mp4", t), r"damaged: frame \d\d cannot be decoded"),
    "blotted_hevc.mp4": (lambda f, t: blot(f / "hevc.mp4", t, 0.8), r"damaged: frame \d\d cannot be decoded"),
    "blotted.mkv": (lambda f, t: blot(f / "h264.mkv", t), r"damaged: frame \d\d cannot be decoded"),
    "blotted.ts": (lambda f, t: blot(f / "h264.ts", t), "damaged"),
    "turned_45.mp4": (lambda f, t: copy_streams(f / "b_frames.mp4", t, "-display_rotation", 45), "not a multiple of 90 degrees"),
    "two_sizes.mp4": (join_two_sizes, "its size changes from 96x64 to 128x96 at frame 24"),
    "two_sizes.mkv": (join_two_sizes, "its size changes from 96x64 to 128x96 at frame 24"),
    "joined.ts": (lambda f, t: t.write_bytes((f / "h264.ts").read_bytes() * 2), "damaged: 1 of its 96 packets"),
    "joined.mpg": (lambda f, t: t.write_bytes((f / "mpeg2.mpg").read_bytes() * 2), "its timestamps go backwards after frame 47 "),
}
GOOD = [*ENCODED, *DERIVED]
# What decord decodes. The rest it refuses, or it is kept from them because it would return wrong frames.
READ_BY_DECORD = """
    plain.mp4 b_frames.mp4 ntsc.mp4 one_long_group.mp4 hevc.mp4 10_bit.mp4 hevc_10_bit.mp4 444.mp4 422_10_bit.mkv
    grey.mp4 rgb.mp4 bt709.mp4 full_range.mp4 fragments.mp4 index_first.mp4 one_frame.mp4
    two_frames.mp4 two_rates.mp4 two_rates.mkv jitter.mp4 starts_late.mp4 starts_late.mkv longer_sound.mp4
    longer_sound.mkv h264.mkv hidden_frames.webm vp9.mp4 odd_size.webm odd_size_444.mp4
    hidden_frames_vp8.webm ffv1.mkv prores.mov mjpeg.mov delayed.mp4 cover_first.mp4
    latin_1_title.mkv mp4_named.avi announces_more_times.mp4
"""
DECORD = ["ünï cödé %03d 视频.mp4", *READ_BY_DECORD.split()]
PICTURES = [name for name in GOOD if name.endswith((".png", ".jpg"))]


class Corpus:
    """The files, all made at the start, and what ffmpeg decodes of them."""

    def __init__(self, folder):
        self.folder, self.seen = folder, {}
        recipes = {name: lambda f, t, o=options, m=more: make(t, *o, **m) for name, (options, more) in ENCODED.items()}
        recipes |= DERIVED | {name: recipe for name, (recipe, _) in BAD.items()}
        for name, recipe in recipes.items():
            try:
                recipe(folder, folder / name)
            except (Missing, FileNotFoundError):
                (folder / name).unlink(missing_ok=True)

    def __getitem__(self, name):
        """The path of a file."""
        if not (self.folder / name).exists():
            pytest.skip(f"this ffmpeg cannot make {name}")
        return self.folder / name

    def decoded(self, name):
        """What ffmpeg shows of a file: (times as fractions of a second, frames uint8 [F, H, W, 3])."""
        if name not in self.seen:
            arguments = [
                "-vf",
                "bwdif=send_frame:deint=interlaced,showinfo",
                "-f",
                "rawvideo",
                "-pix_fmt",
                "rgb24",
                "-fps_mode",
                "passthrough",
                "-an",
                "-",
            ]
            raw, told = ffmpeg("-i", self[name], *arguments)
            unit = Fraction(re.search(r"config in time_base: (\d+/\d+)", told)[1])
            lines = re.findall(r"\] n: *\d+ pts: *(-?\d+) .*? s:(\d+)x(\d+) ", told)
            width, height = int(lines[0][1]), int(lines[0][2])
            frames = np.frombuffer(raw, np.uint8).reshape(len(lines), height, width, 3)
            self.seen[name] = [int(pts) * unit for pts, _, _ in lines], frames
        return self.seen[name]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp("odd files"))


@pytest.fixture(scope="module")
def readers():
    with Readers(workers=1, timeout_seconds=20) as pool:
        yield pool


def whole(frames, **changes):
    """A framing that leaves every pixel as it is."""
    settings = {"fps": 8, "max_num_frames": 49, "sizes": (frames.shape[1:3],), "reshape_mode": "none"}
    return Framing(**settings | changes)


def expected_indices(times, framing):
    """The frame nearest in time to each k / fps, found by looking at all; the earlier of two that are equally near."""
    window = range(framing.skip_frames_start, len(times) - framing.skip_frames_end)
    start = times[window[0]]
    gaps = sorted(b - a for a, b in pairwise(times[i] for i in window))
    end = times[window[-1]] + (Fraction(gaps[len(gaps) // 2] + gaps[(len(gaps) - 1) // 2], 4) if gaps else 0)
    count = max(n for n in range(1, framing.max_num_frames + 1, 4) if start + Fraction(n - 1, framing.fps) <= end + Fraction(1, 10**6))
    return [min(window, key=lambda i: abs(times[i] - start - Fraction(k, framing.fps))) for k in range(count)]


def apart(a, b):
    """The mean difference of each frame of two clips."""
    return np.abs(a.astype(np.int16) - b).mean(axis=(1, 2, 3))


def check(read, facts, times, frames, framing):
    """Whether frames that were read are those that ffmpeg shows at their times, and no neighbours of theirs."""
    indices = expected_indices(times, framing)
    assert facts["indices"] == indices
    assert facts["source_frames"] == len(times)
    assert apart(read, frames[indices]).max() < TOLERANCE
    for step in (-1, 1):
        neighbours = [(k, i + step) for k, i in enumerate(indices) if 0 <= i + step < len(frames)]
        if neighbours:
            mine, theirs = map(list, zip(*neighbours, strict=True))
            assert apart(read[mine], frames[theirs]).min() > APART


# -----------------------------------------------------------------------------
# Good files


def test_the_corpus_holds_at_least_25_files_of_each_sort(corpus):
    made = {path.name for path in corpus.folder.iterdir()}
    assert len(made & set(GOOD)) >= 60
    assert len(made & set(BAD)) >= 25


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_is_decoded_as_ffmpeg_decodes_it(name, corpus, readers):
    times, frames = corpus.decoded(name)
    framings = [whole(frames)]
    if len(frames) > 10:
        framings += [whole(frames, fps=24), whole(frames, fps=10, skip_frames_start=5, skip_frames_end=3)]
    for framing in framings:
        facts, read = readers.read(corpus[name], framing)
        check(read, facts, times, frames, framing)
        assert facts["reader"] == ("picture" if name in PICTURES else "decord" if name in DECORD and find_spec("decord") else "pyav")
        assert bool(facts["note"]) == (facts["reader"] == "pyav")


@pytest.mark.parametrize("name", [name for name in GOOD if name not in PICTURES])
def test_both_readers_agree_on_every_file_that_both_read(name, corpus):
    pytest.importorskip("decord")
    _, frames = corpus.decoded(name)
    enlarged = whole(frames, sizes=((128, 160),), reshape_mode="center")  # decord does this scaling itself
    if name not in DECORD:
        with pytest.raises(Untrusted):
            read_clip(corpus[name], whole(frames), reader="decord")
        return
    for framing in (whole(frames), enlarged):
        (one, one_facts), (other, other_facts) = (read_clip(corpus[name], framing, reader) for reader in ("decord", "pyav"))
        assert (one_facts.pop("reader"), other_facts.pop("reader")) == ("decord", "pyav")
        assert one_facts.pop("decoder") == ""
        assert "libavcodec" in other_facts.pop("decoder")
        assert one_facts == other_facts
        assert apart(one, other).max() < TOLERANCE
        if len(one) > 1:
            assert apart(one[1:], other[:-1]).min() > APART


@pytest.mark.parametrize(
    "name", ["open_group.mp4", "hevc_open_group.mkv", "edit_list.mp4", "mpeg4.avi", "mpeg4.mp4", "h264.ts", "mirrored.mp4"]
)
def test_decord_alone_would_return_wrong_frames_of_what_it_is_kept_from(name, corpus):
    decord = pytest.importorskip("decord")
    _, frames = corpus.decoded(name)
    video = decord.VideoReader(str(corpus[name]), num_threads=1)
    indices = [*range(0, len(frames), 3), *range(len(frames) - 1, 0, -5)]
    assert apart(video.get_batch(indices).asnumpy(), frames[indices]).max() > APART


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        ("turned_90.mp4", lambda f: np.rot90(f, 1, (1, 2))),
        ("turned_180.mp4", lambda f: np.rot90(f, 2, (1, 2))),
        ("turned_270.mp4", lambda f: np.rot90(f, 3, (1, 2))),
        ("turned_90.mkv", lambda f: np.rot90(f, 1, (1, 2))),
        ("mirrored.mp4", lambda f: f[:, :, ::-1]),
    ],
)
def test_a_turned_phone_video_stands_upright(name, turn, corpus):
    upright = turn(corpus.decoded("b_frames.mp4")[1])
    read, facts = read_clip(corpus[name], whole(upright, fps=24))
    assert (facts["source_height"], facts["source_width"]) == upright.shape[1:3]
    assert apart(read, upright[: len(read)]).max() < TOLERANCE
    assert apart(read, upright[: len(read), ::-1, ::-1]).min() > APART


def test_a_variable_frame_rate_keeps_its_speed(corpus):
    """24 frames in the first second and 12 in each of the next two."""
    _, frames = corpus.decoded("two_rates.mp4")
    read, facts = read_clip(corpus["two_rates.mp4"], whole(frames, fps=4))
    assert facts["indices"] == [0, 6, 12, 18, 24, 27, 30, 33, 36]
    assert facts["source_seconds"] == pytest.approx(3, abs=0.05)
    assert apart(read[:8], frames[::6]).max() > APART  # what counting frames would give


def test_a_16_bit_grey_picture_keeps_its_shades(corpus):
    read, _ = read_clip(corpus["still_16_bit.png"], Framing(8, 49, ((64, 96),)))
    assert 30 < read.mean() < 220
    assert len(np.unique(read)) > 50


# -----------------------------------------------------------------------------
# Bad files


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_reason_and_the_next_one_is_read(name, corpus, readers):
    framing = Framing(24, 49, ((64, 96),))  # every frame there is
    reasons = set()
    for reader in ("auto", "pyav"):
        with pytest.raises(BadClip, match=BAD[name][1]) as bad:
            readers.read(corpus[name], framing, reader=reader)
        reasons.add(str(bad.value))
    assert len(reasons) == 1
    assert "crashed" not in reasons.pop()
    facts, _ = readers.read(corpus["plain.mp4"], framing, want_frames=False)
    assert facts["source_frames"] == 48


def test_a_damaged_file_is_damaged_to_ffmpeg_too(corpus):
    """The control of the test above: the same files before they were spoilt are good, and ffmpeg loses frames of the spoilt."""
    for name in ("blotted.mp4", "cut_at_60.mp4"):
        assert len(corpus.decoded(name)[1]) < len(corpus.decoded("index_first.mp4")[1])


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nothing.mp4")
    (tmp_path / "empty.mp4").touch()
    for name, reason in {
        "pipe": "not a regular file",
        "folder": "not a regular file",
        "link": "a broken link",
        "empty": "empty",
    }.items():
        assert reason in locate(tmp_path, f"{name}.mp4", allow_external_paths=False)[1]
    with pytest.raises(BadClip, match="cannot be opened"):
        read_clip(tmp_path / "folder.mp4", Framing(8, 49, ((64, 96),)))


# -----------------------------------------------------------------------------
# Workers that do not answer

# A real worker, but for two names: these crash and end as a broken decoder would.
WORKER = """
import os
import cogvideox.reader as reader
real = reader.read_clip
def read_clip(path, framing, kind):
    if path.endswith("crash.mp4"):
        os.abort()
    if path.endswith("end.mp4"):
        os._exit(3)
    return real(path, framing, kind)
reader.read_clip = read_clip
reader.serve()
"""


@pytest.mark.parametrize(
    ("code", "timeout_seconds", "reason"),
    [
        ("import time; time.sleep(300)", 1, "not decoded within 1 seconds"),
        ("import os; os.abort()", 60, "crashed on it.*signal 6"),  # a busy machine takes a second to start it
        ("import sys; sys.exit(3)", 60, "crashed on it.*exit code 3"),
    ],
)
def test_a_worker_that_never_answers_costs_one_file(code, timeout_seconds, reason):
    start = time.monotonic()
    with Readers(1, timeout_seconds, command=[sys.executable, "-c", code]) as pool:
        for _ in range(2):
            with pytest.raises(BadClip, match=reason):
                pool.read("some.mp4", Framing(8, 49, ((64, 96),)))
    assert time.monotonic() - start < 100


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_pool_goes_on_with_the_next_file_after_a_hang_and_a_crash(workers, corpus, tmp_path):
    good, hangs = corpus["plain.mp4"], tmp_path / "pipe.mp4"
    os.mkfifo(hangs)  # never opens: nobody writes to it
    names = [good, hangs, good, "crash.mp4", "end.mp4", good]
    framing = Framing(8, 9, ((64, 96),))
    with Readers(workers, timeout_seconds=5, command=[sys.executable, "-c", WORKER]) as pool:
        results = list(pool.read_all((name, framing) for name in names))
    reasons = [reason for _, _, reason in results]
    assert reasons[1] == "not decoded within 5 seconds (--clip_timeout_seconds)"
    assert "signal 6" in reasons[3]
    assert "exit code 3" in reasons[4]
    for number in (0, 2, 5):
        assert reasons[number] is None
        assert results[number][1].shape == (9, 64, 96, 3)
