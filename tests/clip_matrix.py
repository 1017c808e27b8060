"""Clips of every kind that ffmpeg writes, and what the ffmpeg program shows of them.

    python -m tests.clip_matrix     # compares all, prints the table of docs/faults.md

A clip is a dict of one value a factor. `covering` chooses clips so that every pair of values that can occur does occur.
"""

import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from cogvideox.decode import Framing, Untrusted, read_clip

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
FPS, READ_FPS, COUNT = 25, 12, 15  # 25 / 12 is no whole number, so frames must be chosen by time

# -----------------------------------------------------------------------------
# What can occur


class Missing(Exception):
    """This ffmpeg has no encoder, muxer or filter for a clip."""


ISO, EVERY = ("mp4", "mov"), ("mp4", "mov", "mkv")
YUV = {"420": "yuv420p", "422": "yuv422p", "444": "yuv444p"}
DEEP = {"420_10": "yuv420p10le", "422_10": "yuv422p10le", "444_10": "yuv444p10le"}
GREY = {"gray": "gray"}

# codec: (encoder's options, containers, pixel formats, pixel formats with transparency)
CODECS = {
    "h264": ("libx264 -preset veryfast -crf 10 -threads 1", (*EVERY, "avi", "ts", "flv", "3gp"), YUV | DEEP | GREY, {}),
    "h264_rgb": ("libx264rgb -preset veryfast -crf 10 -threads 1", (*EVERY, "avi"), {"rgb": "rgb24"}, {}),
    "hevc": (
        "libx265 -preset ultrafast -crf 8 -x265-params log-level=none:pools=1:frame-threads=1",
        (*EVERY, "ts"),
        YUV | DEEP | GREY | {"rgb": "gbrp"},
        {},
    ),
    "vp9": (
        "libvpx-vp9 -deadline realtime -cpu-used 8 -crf 8 -b:v 0",
        ("webm", "mkv", "mp4"),
        YUV | DEEP | {"rgb": "gbrp"},
        {"420": "yuva420p"},
    ),
    "vp8": (
        "libvpx -deadline realtime -cpu-used 8 -crf 8 -b:v 2M -auto-alt-ref 0",
        ("webm", "mkv"),
        {"420": "yuv420p"},
        {"420": "yuva420p"},
    ),
    "av1": ("libaom-av1 -usage realtime -cpu-used 8 -crf 8", ("mp4", "mkv", "webm"), YUV | DEEP | {"rgb": "gbrp"}, {}),
    "mpeg1": ("mpeg1video -q:v 2", ("mpg",), {"420": "yuv420p"}, {}),
    "mpeg2": ("mpeg2video -q:v 2 -bf 2", ("mpg", "ts", *EVERY, "avi", "mxf"), {"420": "yuv420p", "422": "yuv422p"}, {}),
    "mpeg4": ("mpeg4 -q:v 2 -bf 1", (*EVERY, "avi", "3gp"), {"420": "yuv420p"}, {}),
    "h263": ("h263 -q:v 2", ("3gp",), {"420": "yuv420p"}, {}),
    "flv1": ("flv -q:v 2", ("flv",), {"420": "yuv420p"}, {}),
    "wmv2": ("wmv2 -q:v 2", ("wmv", "avi"), {"420": "yuv420p"}, {}),
    "theora": ("libtheora -q:v 10", ("ogv", "mkv"), YUV, {}),
    "prores": ("prores_ks", ("mov", "mkv"), {"422_10": "yuv422p10le", "444_10": "yuv444p10le"}, {"444_10": "yuva444p10le"}),
    "dnxhd": ("dnxhd -profile:v dnxhr_hq", ("mov", "mxf"), {"422": "yuv422p"}, {}),
    "ffv1": (
        "ffv1 -strict -2",
        ("mkv", "avi"),
        YUV | DEEP | GREY | {"rgb": "bgr0"},
        {"420": "yuva420p", "444_10": "yuva444p10le", "rgb": "bgra"},
    ),
    "mjpeg": ("mjpeg -q:v 2 -strict -1", (*EVERY, "avi"), {"420": "yuvj420p", "422": "yuvj422p", "444": "yuvj444p"}, {}),
    "dv": ("dvvideo", ("avi", "mov"), {"420": "yuv420p"}, {}),
    "dv_ntsc": ("dvvideo", ("avi", "mov"), {"411": "yuv411p"}, {}),
    "raw": ("rawvideo", ("avi", "mov", "mkv"), {"rgb": "bgr24", "422": "uyvy422"}, {}),
    "qtrle": ("qtrle", ("mov",), {"rgb": "rgb24"}, {"rgb": "argb"}),
    "png": ("png", ("mov", "avi"), {"rgb": "rgb24"}, {"rgb": "rgba"}),
    "gif": ("gif", ("gif",), {"pal8": "pal8"}, {"pal8": "pal8"}),
    "apng": ("apng", ("png", "apng"), {"rgb": "rgb24", "pal8": "pal8", "gray": "gray"}, {"rgb": "rgba"}),
    "webp": ("libwebp_anim -quality 100", ("webp",), {"420": "yuv420p"}, {"420": "yuva420p", "rgb": "bgra"}),
}
TAGGED = ("h264", "hevc", "vp9", "av1", "mpeg2", "prores")  # codecs that say which colours they hold
# colour: (matrix, primaries, transfer), as ffmpeg names them
COLOURS = {
    "unspecified": None,
    "bt709": ("bt709", "bt709", "bt709"),
    "bt601": ("smpte170m", "smpte170m", "smpte170m"),
    "pal": ("bt470bg", "bt470bg", "bt470bg"),
    "srgb": ("bt709", "bt709", "iec61966-2-1"),
    "smpte240m": ("smpte240m", "smpte240m", "smpte240m"),
    "p3": ("bt709", "smpte432", "bt709"),
    "bt2020": ("bt2020nc", "bt2020", "bt2020-10"),
    "pq": ("bt2020nc", "bt2020", "smpte2084"),
    "hlg": ("bt2020nc", "bt2020", "arib-std-b67"),
}
HDR = ("pq", "hlg")
WIDE = ("p3", "bt2020", *HDR)  # colours that BT.709 lacks
FACTORS = {
    "container": tuple(dict.fromkeys(container for _, containers, _, _ in CODECS.values() for container in containers)),
    "codec": tuple(CODECS),
    "pixels": (*YUV, "411", *DEEP, "gray", "rgb", "pal8"),
    "alpha": ("opaque", "alpha"),
    "colour": tuple(COLOURS),
    "range": ("tv", "pc"),
    "aspect": ("1:1", "0:1", "64:45", "8:9", "4:3", "1:2", "16:15", "32:27"),
    "turn": ("0", "90", "180", "270", "mirrored"),
    "fields": ("progressive", "tff", "bff", "flagged", "fake"),
    "start": ("0", "5 s", "edit list"),
    "size": ("144x96", "146x92", "145x93", "64x608", "176x144", "256x128", "720x480", "720x576"),
    "crop": ("none", "container"),
    "streams": ("one", "two", "cover"),
}
CROP = (8, 4, 4, 8)  # pixels that the container takes off: left, right, top, bottom; rows by four, or colours would change fields


def choices(container, codec, pixels, alpha):
    """factor -> the values that can occur with these four; the first is the plain one."""
    boxes, transparent = container in (*EVERY, "3gp"), alpha == "alpha"
    colours, ranges, aspects, fields, sizes = ["unspecified"], ["tv"], ["1:1"], ["progressive"], ["144x96", "146x92"]
    if codec in TAGGED and not transparent and pixels not in ("rgb", "gray", "pal8"):
        colours += ["bt709", "bt601", "pal", "srgb", "smpte240m", "p3"]
        if pixels.endswith("_10"):
            colours += ["bt2020", *HDR]
        if codec in ("h264", "hevc", "vp9", "av1"):
            ranges += ["pc"]
    if pixels in ("rgb", "pal8") or codec in ("mjpeg", "apng"):
        ranges = ["pc"]
    if boxes or codec in ("h264", "hevc", "mpeg4", "theora", "ffv1"):
        aspects += ["0:1", "64:45", "8:9", "4:3", "1:2"]
    elif codec == "mpeg2":  # its header holds the aspect ratio of the picture: 4:3 of 144x96 is 8:9
        aspects, sizes = ["1:1", "8:9"], ["144x96"]
    if codec in ("h264", "mpeg2", "mpeg4", "ffv1") and pixels not in ("gray", "rgb") and not transparent:
        fields += ["tff", "bff", "flagged"]
    if codec == "prores":
        fields += ["tff", "bff", "flagged"]
    if codec == "h264":
        fields += ["fake"]
    if codec in ("h264", "vp9", "av1") or (codec == "mpeg2" and boxes):
        sizes += ["64x608"]
    if pixels in ("444", "gray", "rgb", "pal8") or codec in ("vp9", "ffv1", "mjpeg"):
        sizes += ["145x93"]
    if codec == "dv":
        aspects, sizes, fields = ["16:15", "64:45"], ["720x576"], ["bff"]
    elif codec == "dv_ntsc":
        aspects, sizes, fields = ["8:9", "32:27"], ["720x480"], ["bff"]
    elif codec == "dnxhd":
        sizes = ["256x128"]
    elif codec == "h263":
        aspects, sizes = ["1:1"], ["176x144"]
    if codec == "raw" and pixels == "422":
        sizes = ["144x96"]
    late = container in (*EVERY, "3gp", "webm", "ts", "mpg", "flv", "wmv", "ogv")
    copied = codec in ("h264", "hevc", "vp9", "av1", "mpeg4") and not transparent
    return {
        "colour": colours,
        "range": ranges,
        "aspect": aspects,
        # An H.264 stream can hold its turn itself.
        "turn": ["0", "90", "180", "270", "mirrored"] if boxes or (codec, container) == ("h264", "ts") else ["0"],
        "fields": fields,
        "start": ["0", *["5 s"] * late, *["edit list"] * (copied and container in ISO)],
        "size": sizes,
        "crop": ["none", *["container"] * (copied and container in EVERY and pixels != "rgb")],
        "streams": ["one", *["two"] * (copied and container in (*EVERY, "ts")), *["cover"] * (copied and container in ("mp4", "mkv"))],
    }


BASES = [
    (dict(zip(FACTORS, base, strict=False)), choices(*base))
    for codec, (_, containers, opaque, transparent) in CODECS.items()
    for container in containers
    for alpha, formats in (("opaque", opaque), ("alpha", transparent))
    for pixels in formats
    for base in [(container, codec, pixels, alpha)]
    if (codec, container, alpha) not in (("ffv1", "avi", "alpha"), ("vp9", "mp4", "alpha"))
    if (codec, container, pixels) != ("raw", "mkv", "rgb")
]


def clash(clip):
    """Whether two values that occur cannot occur together. `clip` may lack factors."""
    odd = clip.get("size") == "145x93"
    return (odd and clip.get("fields", "progressive") != "progressive") or (odd and clip.get("colour", "unspecified") != "unspecified")


def pairs(clip):
    """The pairs of a clip's values, each as ((factor, value), (factor, value))."""
    return set(itertools.combinations([(factor, clip[factor]) for factor in FACTORS], 2))


def permitted_pairs():
    """Every pair of values that some clip has."""
    found = set()
    for base, free in BASES:
        options = [[(factor, value) for value in ([base[factor]] if factor in base else free[factor])] for factor in FACTORS]
        for one, other in itertools.combinations(options, 2):
            found |= {pair for pair in itertools.product(one, other) if not clash(dict(pair))}
    return found


def covering():
    """Clips that hold every permitted pair; deterministic.

    Greedy: a clip starts from a pair that is still missing, and takes each further value that adds most missing pairs.
    """
    missing, clips = permitted_pairs(), []
    holding = defaultdict(list)  # value -> the bases that can have it
    for number, (base, free) in enumerate(BASES):
        for factor in FACTORS:
            for value in [base[factor]] if factor in base else free[factor]:
                holding[factor, value].append(number)
    for pair in sorted(missing):
        if pair not in missing:
            continue
        fitting = [number for number in holding[pair[0]] if number in set(holding[pair[1]])]
        step = max(1, len(fitting) // 8)
        candidates = [complete(BASES[number], dict(pair), missing) for number in fitting[::step]]
        clips.append(max(candidates, key=lambda clip: len(pairs(clip) & missing)))
        missing -= pairs(clips[-1])
    return clips


def complete(base_and_free, wanted, missing):
    """A clip of a base with the `wanted` values, and of the others those that add most missing pairs; a plain one in a tie."""
    base, free = base_and_free
    clip = base | {factor: value for factor, value in wanted.items() if factor not in base}
    for factor in free:
        if factor in clip:
            continue

        def gain(value, factor=factor):
            tried = clip | {factor: value}
            if clash(tried):
                return -1
            order = [(name, tried[name]) for name in FACTORS if name in tried]
            mine = (factor, value)
            place = order.index(mine)
            return sum((other, mine) in missing for other in order[:place]) + sum((mine, other) in missing for other in order[place + 1 :])

        clip[factor] = max(free[factor], key=gain)
    return {factor: clip[factor] for factor in FACTORS}


def singles(clips):
    """The first few of `clips` that together hold every value of every factor."""
    missing, few = {(factor, value) for clip in clips for factor, value in clip.items()}, []
    while missing:
        few.append(max(clips, key=lambda clip: len(missing & set(clip.items()))))
        missing -= set(few[-1].items())
    return few


def name(clip):
    """A clip's name in the tests: all that is not plain."""
    plain = ("opaque", "unspecified", "1:1", "0", "progressive", "144x96", "none", "one")
    return "-".join(value.replace(":", "_").replace(" ", "") for value in clip.values() if value not in plain)


# -----------------------------------------------------------------------------
# Making a clip


def ffmpeg(*arguments, data=b""):
    """Run ffmpeg. Returns (stdout, stderr)."""
    result = subprocess.run([FFMPEG, "-hide_banner", "-nostdin", "-y", *map(str, arguments)], input=data, capture_output=True)
    told = result.stderr.decode(errors="replace")
    if re.search("Unknown encoder|Unknown decoder|No such filter|Requested output format .* is not", told):
        raise Missing(told[-300:])
    assert result.returncode == 0, "\n".join(line for line in told.splitlines() if "@" in line)[-2000:]
    return result.stdout, told


@functools.lru_cache(maxsize=4)
def pictures(count, width, height, alpha=False):
    """Waves of three colours at three speeds, and moving boxes of full colour with sharp edges.

    With alpha: uint8 [F, H, W, 4]; a moving disc is opaque, its rim is half transparent, and the rest hides magenta.
    """
    if width > 300:  # blocks of 4 x 4 pixels: DV is 720 wide, and the sines would take most of its test's time
        return pictures(count, width // 4, height // 4, alpha).repeat(4, axis=1).repeat(4, axis=2)
    number, row, column, colour = np.ogrid[:count, :height, :width, :3]
    period, strength = np.array([9, 7, 11])[colour], np.array([30, 75, 30])[colour]  # green leads, so that grey moves as well
    waves = np.sin(2 * np.pi * (number / period + (2 * column / width + row / height) / 3) + colour)
    frames = (90 + 60 * column / width + strength * waves).astype(np.uint8)
    for k in range(count):
        for i, paint in enumerate(((255, 0, 0), (255, 255, 255), (0, 0, 255), (0, 0, 0))):
            x, y = int(width * (i / 4 + k / 20)) % width, height * (i % 3) // 3 + k % 3
            size = 8 if i % 2 else 16  # colours with sharp edges are small: readers fill in 4:2:0 in unlike ways
            frames[k, y : y + 2 * height // size, x : x + width // size] = paint
    if not alpha:
        return frames
    number, row, column = np.ogrid[:count, :height, :width]
    far = np.hypot((column - width * (0.3 + number / 40)) / width, (row - height / 2) / height)
    cover = np.where(far < 0.3, 255, np.where(far < 0.38, 128, 0)).astype(np.uint8)
    frames[cover == 0] = (255, 0, 255)
    return np.concatenate([frames, cover[..., None]], axis=-1)


def weave(frames, fields):
    """Two pictures a frame, each in every second row, as an interlaced camera takes them: [2F, H, W, C] -> [F, H, W, C]."""
    first, second = (frames[::2], frames[1::2]) if fields == "tff" else (frames[1::2], frames[::2])
    woven = first.copy()
    woven[:, 1::2] = second[:, 1::2]
    return woven


def make(clip, path):
    """Write the clip's file. Raises Missing where this ffmpeg cannot."""
    width, height = map(int, clip["size"].split("x"))
    alpha, fields, turn = clip["alpha"] == "alpha", clip["fields"], clip["turn"]
    encoder, _, opaque, transparent = CODECS[clip["codec"]]
    pixels = (transparent if alpha else opaque)[clip["pixels"]]
    woven = fields in ("tff", "bff")
    frames = pictures(COUNT * 2 if woven else COUNT, width, height, alpha)
    if woven:
        frames = weave(frames, fields)
    filters = []
    if clip["colour"] in WIDE:
        matrix, primaries, transfer = COLOURS[clip["colour"]]
        # White of the SDR picture becomes 203 cd/m2: 58 % of PQ, 75 % of HLG (ITU-R BT.2408). agamma=0: HLG's gamma acts on the
        # luminance (ITU-R BT.2100), not on each colour.
        filters += ["setparams=colorspace=gbr:color_primaries=bt709:color_trc=bt709:range=pc"]
        filters += [f"zscale=m={matrix}:p={primaries}:t={transfer}:r={clip['range']}:npl=203:agamma=0,format=yuv444p10le"]
    elif clip["range"] == "pc" and "yuv" not in pixels and clip["pixels"] != "gray":
        pass
    else:
        matrix = {"bt709": "bt709", "srgb": "bt709", "smpte240m": "smpte240m"}.get(clip["colour"], "bt601")
        filters += [f"scale=out_color_matrix={matrix}:out_range={clip['range']}"]
        if clip["pixels"] != "gray":
            filters += [f"format={'yuva' if alpha else 'yuv'}444p{'10le' * clip['pixels'].endswith('_10')}"]
    interlaced = fields in ("tff", "bff", "flagged")
    filters += [f"scale=interl={int(interlaced)},format={pixels}"]
    if COLOURS[clip["colour"]]:
        matrix, primaries, transfer = COLOURS[clip["colour"]]
        filters += [f"setparams=colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}:range={clip['range']}"]
    else:
        told = "pc" if clip["range"] == "pc" and "yuv" in pixels else "unknown"
        filters += [f"setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown:range={told}"]
    if clip["pixels"] == "pal8":
        filters = ["split[a][b];[a]palettegen[p];[b][p]paletteuse"]
    filters += [f"setfield={fields if woven else 'tff' if interlaced else 'prog'}", f"setsar={clip['aspect'].replace(':', '/')}"]
    options = ["-c:v", *encoder.split(), "-pix_fmt", pixels]
    options += ["-flags", "+ildct+ilme"] if interlaced else []
    options += ["-x264-params", "fake-interlaced=1"] if fields == "fake" else []
    options += ["-profile:v", "4" if "444" in pixels else "3"] if clip["codec"] == "prores" else []
    options += ["-lossless", "1"] if pixels == "bgra" and clip["codec"] == "webp" else []
    options += ["-f", "apng"] if clip["codec"] == "apng" else []
    options += ["-plays", "0"] if clip["codec"] == "apng" else []
    before, in_stream = [], clip["container"] == "ts"
    if turn != "0" and in_stream:
        options += ["-bsf:v", "h264_metadata=display_orientation=insert:" + ("flip=horizontal" if turn == "mirrored" else f"rotate={turn}")]
    elif turn != "0":
        before = ["-noautorotate", *(["-display_hflip"] if turn == "mirrored" else ["-display_rotation", turn])]
    late = ["-output_ts_offset", "5"] if clip["start"] == "5 s" else []
    cropped, copied = clip["crop"] == "container", clip["start"] == "edit list" or clip["crop"] != "none" or clip["streams"] != "one"
    first = path.with_name("encoded." + ("mp4" if cropped else clip["container"])) if copied else path
    raw = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgba" if alpha else "rgb24",
        "-s",
        clip["size"],
        "-r",
        "30000/1001" if clip["codec"] == "dv_ntsc" else FPS,
    ]
    ffmpeg(*before, *raw, "-i", "-", "-vf", ",".join(filters), *options, *([] if copied else late), first, data=frames.tobytes())
    if not copied:
        return
    if cropped:
        first.write_bytes(with_clap(first.read_bytes(), width, height))
    skip = ["-ss", "0.1"] if clip["start"] == "edit list" else []
    also, maps = [], ["-map", "0"]
    if clip["streams"] == "two":  # the first is the default where a container has one; else players show the larger
        size = "48x32" if clip["container"] == "ts" else "192x160"
        also, maps = ["-f", "lavfi", "-i", f"testsrc2=s={size}:r=25:d=0.6"], ["-map", "0", "-map", "1", "-c:v:1", "mpeg4"]
    elif clip["streams"] == "cover":
        cover = path.with_name("cover.jpg")
        ffmpeg("-f", "lavfi", "-i", "color=red:s=200x200", "-frames:v", "1", cover)
        if clip["container"] == "mkv":
            maps += ["-attach", cover, "-metadata:s:t", "mimetype=image/jpeg"]
        else:
            also, maps = ["-i", cover], ["-map", "1", "-map", "0", "-disposition:v:0", "attached_pic"]
    ffmpeg(*skip, "-i", first, *also, "-c", "copy", *maps, *late, path)


def with_clap(data, width, height):
    """An MP4 with its index last, with a clean aperture box that takes CROP off (ISO/IEC 14496-12, 12.1.4)."""
    left, right, top, bottom = CROP
    numbers = [width - left - right, 1, height - top - bottom, 1, left - right, 2, top - bottom, 2]
    box = (40).to_bytes(4) + b"clap" + b"".join(number.to_bytes(4, signed=True) for number in numbers)
    data, start, places = bytearray(data), 0, []
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        while data[start + 4 : start + 8] != kind:
            start += int.from_bytes(data[start : start + 4])
        places.append(start)
        start += 16 if kind == b"stsd" else 8
    end = start + int.from_bytes(data[start : start + 4])
    data[end:end] = box
    for place in (*places, start):
        data[place : place + 4] = (int.from_bytes(data[place : place + 4]) + len(box)).to_bytes(4)
    return bytes(data)


# -----------------------------------------------------------------------------
# What the ffmpeg program shows

KEEPS_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # ffmpeg's own decoders leave transparency out
# ffmpeg turns a picture first. Fields and colour planes lie along the stored one, so it is turned back for their filters.
TURNED_BACK = {
    "0": ("null", "null"),
    "90": ("transpose=clock", "transpose=cclock"),
    "180": ("hflip,vflip", "hflip,vflip"),
    "270": ("transpose=cclock", "transpose=clock"),
    "mirrored": ("hflip", "hflip"),
}
ON_WHITE = "format=rgba,split[a][b];[a]drawbox=color=white:thickness=fill:replace=1[c];[c][b]overlay=format=rgb"
FINE = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"


def shown(clip, path):
    """What a good player shows: (seconds after the first frame, frames uint8 [F, H, W, 3], what ffmpeg said)."""
    back, again = TURNED_BACK[clip["turn"]]
    filters = ["showinfo", back]
    if clip["fields"] != "progressive":
        filters += ["bwdif=mode=send_frame:deint=interlaced"]
    if clip["alpha"] == "alpha" or clip["pixels"] == "pal8":
        filters += [ON_WHITE]
    elif clip["colour"] in WIDE:
        # The inverse of how the clip was made: reference white is white.
        filters += ["zscale=m=gbr:p=bt709:t=bt709:r=pc:f=bicubic:npl=203:agamma=0,format=gbrp"]
    elif clip["colour"] != "unspecified":
        filters += ["zscale=m=gbr:r=pc:f=bicubic,format=gbrp"]
    square = "w=iw:h='round(ih/sar)'" if clip["turn"] in ("90", "270") else "w='round(iw*sar)':h=ih"
    filters += [f"scale={FINE},format=gbrp", again, f"scale={square}:{FINE}", "format=rgb24,showinfo"]
    decoder = ["-c:v", KEEPS_ALPHA[clip["codec"]]] if clip["alpha"] == "alpha" and clip["codec"] in KEEPS_ALPHA else []
    # Without a new graph half-way: the first frame of a stream that holds its turn would be lost.
    before = [*decoder, "-reinit_filter", 0, "-i", path]
    raw, told = ffmpeg(*before, "-an", "-vf", ",".join(filters), "-f", "rawvideo", "-fps_mode", "passthrough", "-")
    found = [(int(number), *rest) for number, *rest in re.findall(r"showinfo_(\d+) .*? pts_time:(\S+) .* s:(\d+)x(\d+) ", told)]
    last = max(number for number, *_ in found)
    lines = [rest for number, *rest in found if number == last]
    width, height = int(lines[0][1]), int(lines[0][2])
    times = np.array([float(line[0]) for line in lines])
    return times - times[0], np.frombuffer(raw, np.uint8).reshape(len(lines), height, width, 3), told


def stored_size(clip):
    """(width, height) in stored pixels, after cropping and before turning."""
    width, height = map(int, clip["size"].split("x"))
    left, right, top, bottom = CROP if clip["crop"] == "container" else (0, 0, 0, 0)
    return width - left - right, height - top - bottom


def shown_size(clip):
    """(height, width) in square pixels, after turning; not rounded."""
    width, height = stored_size(clip)
    wide, high = map(int, clip["aspect"].split(":"))
    width = width * wide / high if wide else width
    return (width, height) if clip["turn"] in ("90", "270") else (height, width)


def at_times(times, frames, count):
    """The frames nearest in time to each k / READ_FPS. Returns (their indices, frames [count, H, W, 3])."""
    indices = [int(np.argmin(np.abs(times - k / READ_FPS))) for k in range(count)]
    return indices, frames[indices]


def framing(frames):
    """A framing of the size shown, so that nothing is cropped."""
    return Framing(fps=READ_FPS, max_num_frames=5, sizes=(frames.shape[1:3],))


def apart(one, other):
    """The mean difference of each frame of two clips, in levels of 255."""
    return np.abs(one.astype(np.int16) - other).mean(axis=(1, 2, 3))


# -----------------------------------------------------------------------------
# The table


def compare_all(clips, folder, readers=("auto", "pyav", "decord")):
    """Yields (clip, reader, the worst frame's mean difference, or the reason why it was not read)."""
    for number, clip in enumerate(clips):
        path = folder / f"{number}.{clip['container']}"
        try:
            make(clip, path)
            times, frames, _ = shown(clip, path)
        except (Missing, AssertionError) as error:
            yield clip, "ffmpeg", " ".join(str(error).split())[:300]
            continue
        for reader in readers:
            try:
                read, facts = read_clip(path, framing(frames), reader=reader)
            except Untrusted:
                continue
            except Exception as error:  # BadClip, or a fault of the reader: both stand in the table
                yield clip, reader, f"{type(error).__name__}: {error}"
                continue
            _, wanted = at_times(times, frames, 5)
            if read.shape != wanted.shape:
                yield clip, reader, f"shape {read.shape}, not {wanted.shape}"
            else:
                yield clip, reader, float(apart(read, wanted).max())


def table(results):
    """Markdown: of each value of each factor, how many files were compared and the worst frame's mean difference."""
    rows = defaultdict(list)
    for clip, reader, difference in results:
        for item in (*clip.items(), ("reader", reader)):
            rows[item].append((name(clip), difference))
    lines = ["| factor | value: files compared, worst mean difference of a frame in levels of 255 |", "|---|---|"]
    for factor in (*FACTORS, "reader"):
        cells = []
        for value in FACTORS.get(factor, ("auto", "pyav", "decord")):
            numbers = {clip: difference for clip, difference in rows[factor, value] if isinstance(difference, float)}
            cells.append(f"{value}: {len(numbers)}, {max(numbers.values(), default=float('nan')):.1f}")
        lines.append(f"| {factor} | {'; '.join(cells)} |")
    return "\n".join(lines)


def main():
    clips = covering()
    with tempfile.TemporaryDirectory() as folder:
        results = list(compare_all(clips, Path(folder)))
    for clip, reader, difference in results:
        if not isinstance(difference, float):
            print(f"{name(clip)} ({reader}): {difference}", file=sys.stderr)
    print(f"{len(clips)} files with every pair of values that can occur: {len(permitted_pairs())} pairs\n")
    print(table(results))


if __name__ == "__main__":
    main()
