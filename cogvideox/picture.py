"""What a viewer sees of a decoded frame: deinterlaced, in SDR, over one background, in sRGB.

Without torch: the guarded reader processes import this module and must start fast.
"""

import contextlib
import functools
import hashlib
import io
import struct
import tempfile
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from cogvideox.container import HDR_TRANSFERS, BadClip

PRIMARIES = {  # AVColorPrimaries, the code points of ITU-T H.273: x and y of red, green and blue; the white of all is D65
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),  # BT.709
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}
SDR_WHITE_NITS, HDR_PEAK_NITS, DARKEST_PEAK_NITS = 203.0, 1000.0, 100.0  # ITU-R BT.2408; the usual mastering display
CUBE_SIZE = 65

# -----------------------------------------------------------------------------
# HDR to SDR


def pq_to_nits(code):
    """Luminance of a PQ code from 0 to 1 (SMPTE ST 2084)."""
    root = np.power(code, 1 / 78.84375)
    return 10000 * np.power(np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root), 1 / 0.1593017578125)


def nits_to_pq(nits):
    """PQ code of a luminance (SMPTE ST 2084)."""
    power = np.power(np.asarray(nits) / 10000, 0.1593017578125)
    return np.power((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power), 78.84375)


def hlg_to_nits(code):
    """Luminance of HLG codes [..., 3] on a display of 1000 nits (ITU-R BT.2100, gamma 1.2)."""
    scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    return HDR_PEAK_NITS * np.maximum(luminance, 1e-6)[..., None] ** 0.2 * scene


def roll_off(nits, peak_nits):
    """Map luminances up to `peak_nits` to SDR's range; what is dark stays (the EETF of ITU-R BT.2390)."""
    if peak_nits <= SDR_WHITE_NITS:
        return np.minimum(nits, SDR_WHITE_NITS)
    peak = nits_to_pq(peak_nits)
    value, white = np.minimum(nits_to_pq(nits) / peak, 1), nits_to_pq(SDR_WHITE_NITS) / peak
    knee = 1.5 * white - 0.5
    t = (value - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * white
    return pq_to_nits(np.where(value < knee, value, spline) * peak)


def to_xyz(primaries):
    """The matrix from linear RGB with these primaries and a white of D65 to CIE XYZ, up to a factor."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    return columns * np.linalg.solve(columns, np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290]))


def to_sdr(codes, transfer, primaries, peak_nits):
    """PQ or HLG codes to BT.709 codes (BT.1886: gamma 2.4), both RGB [..., 3] from 0 to 1.

    The roll-off is applied to the largest of the three channels and scales all of them, so that hues stay.
    """
    nits = pq_to_nits(codes) if transfer == "PQ" else hlg_to_nits(codes)
    matrix = np.linalg.solve(to_xyz(PRIMARIES[1]), to_xyz(PRIMARIES.get(primaries, PRIMARIES[9])))
    nits = np.maximum(nits @ matrix.T, 0)
    largest = np.maximum(nits.max(axis=-1, keepdims=True), 1e-4)
    return np.clip(nits * roll_off(largest, peak_nits) / largest / SDR_WHITE_NITS, 0, 1) ** (1 / 2.4)


@functools.lru_cache(maxsize=4)
def tone_cube(transfer, primaries, peak_nits):
    """`to_sdr` as the text of a .cube file for FFmpeg's lut3d, red fastest."""
    axis = np.linspace(0, 1, CUBE_SIZE)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")
    table = to_sdr(np.stack([red, green, blue], axis=-1), transfer, primaries, peak_nits).reshape(-1, 3)
    text = io.BytesIO()
    np.savetxt(text, table, fmt="%.5f", header=f"LUT_3D_SIZE {CUBE_SIZE}", comments="")
    return text.getvalue()


def peak_nits_of(frame):
    """The luminance of the brightest pixel: MaxCLL, or else the mastering display's, or else 1000 nits."""
    peak = 0.0
    if side := side_data(frame, "MASTERING_DISPLAY_METADATA"):
        # AVMasteringDisplayMetadata: ten rationals, of which the last is max_luminance; has_primaries; has_luminance
        numbers = struct.unpack_from("22i", side)
        peak = numbers[18] / numbers[19] if numbers[21] and numbers[19] else 0.0
    if side := side_data(frame, "CONTENT_LIGHT_LEVEL"):
        peak = float(struct.unpack_from("I", side)[0]) or peak
    return float(np.clip(round(peak or HDR_PEAK_NITS, -2), DARKEST_PEAK_NITS, 10000))  # in steps: each has a cube of its own


# -----------------------------------------------------------------------------
# Frames of a video

# AVColorSpace and AVColorTransferCharacteristic that neither decord nor swscale converts: they would train other colours silently.
UNKNOWN_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "SMPTE 2085",
    12: "chromaticity-derived",
    13: "chromaticity-derived",
    14: "ICtCp",
    15: "IPT (Dolby Vision)",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
UNKNOWN_TRANSFERS = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE 428"}


def side_data(frame, name):
    """The bytes of a frame's side data of this kind, or b"" if it has none."""
    try:
        side = frame.side_data.get(name)
    except ValueError:  # PyAV 18 cannot list data of a kind that it does not know, such as EXIF
        return b""
    return b"" if side is None else bytes(side)


def has_alpha(frame):
    """Whether a frame's format can be transparent."""
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def treatment_of(frame, interlaced):
    """What FFmpeg's filters have to change before a video is shown: (JSON-ready settings, words for the report).

    frame: the clip's first. interlaced: whether the decoder marks any of its frames so. Raises BadClip for colours that cannot be
    converted.
    """
    if frame.color_trc == 2 and side_data(frame, "DOVI_METADATA"):
        raise BadClip("Dolby Vision without a layer for other screens (profile 5); convert it to HDR10 or SDR first")
    for kind, names, value in (("matrix", UNKNOWN_MATRICES, frame.colorspace), ("transfer", UNKNOWN_TRANSFERS, frame.color_trc)):
        if name := names.get(int(value)):
            raise BadClip(f"its colours have a {name} {kind}, which cannot be converted; convert it to BT.709 first")
    treatment, words = ({"deinterlaced": "bwdif"}, ["deinterlaced"]) if interlaced else ({}, [])
    if transfer := HDR_TRANSFERS.get(frame.color_trc):
        treatment["tone_mapped"] = [transfer, int(frame.color_primaries), peak_nits_of(frame)]
        words.append(f"{transfer} to SDR")
    return treatment, words


def treated(frames, first, time_base, treatment, chosen):
    """(number, frame) of the chosen frames after FFmpeg's filters. frames: from number `first` on, in order."""
    if "deinterlaced" in treatment:  # looks at a frame's neighbours
        frames = filtered(frames, time_base, deinterlacing)
    frames = (frame for number, frame in enumerate(frames, first) if number in chosen)
    if "tone_mapped" in treatment:  # takes four times as long as decoding
        frames = filtered(frames, time_base, functools.partial(tone_mapping, *treatment["tone_mapped"]))
    yield from zip(sorted(chosen), frames, strict=True)


def filtered(frames, time_base, filters_for):
    """Pass frames through a filter graph, one out for each one in. Raises BadClip where FFmpeg cannot.

    filters_for: a context manager of a frame that gives the filters as (name, options).
    """
    import av

    graph = None
    try:
        for frame in frames:
            if graph is None:
                with filters_for(frame) as filters:
                    graph = filter_graph(frame, time_base, filters)
            graph.push(frame)
            yield from ready_frames(graph)
        if graph is not None:
            graph.push(None)
            yield from ready_frames(graph)
    except av.FFmpegError as error:
        raise BadClip(f"its frames cannot be converted ({error.strerror})") from None


def ready_frames(graph):
    """The frames that a filter graph has ready."""
    import av

    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


@contextlib.contextmanager
def deinterlacing(_):
    """One frame for each pair of fields, of the frames that are marked as interlaced."""
    yield [("bwdif", {"mode": "send_frame", "parity": "auto", "deint": "interlaced"})]


@contextlib.contextmanager
def tone_mapping(transfer, primaries, peak_nits, frame):
    """`to_sdr` for frames like `frame`. The cube's file lives as long as the block: lut3d reads it once."""
    alpha = "a" if has_alpha(frame) else ""
    with tempfile.NamedTemporaryFile(suffix=".cube") as file:
        file.write(tone_cube(transfer, primaries, peak_nits))
        file.flush()
        # 16 bits: PQ spends a quarter of its codes on what SDR shows as the lowest tenth
        yield [
            ("scale", {"flags": "bicubic+full_chroma_int+accurate_rnd"}),
            ("format", {"pix_fmts": f"gbr{alpha}p16le"}),
            ("lut3d", {"file": file.name, "interp": "tetrahedral"}),
            ("format", {"pix_fmts": f"gbr{alpha}p"}),
        ]


def filter_graph(frame, time_base, filters):
    """A configured av.filter.Graph for frames like `frame`. filters: (name, options) in order."""
    import av.filter

    graph = av.filter.Graph()
    source = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={time_base.numerator}/{time_base.denominator}"
        f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}",
    )
    for name, options in [*filters, ("buffersink", {})]:
        following = graph.add(name, **options)
        source.link_to(following)
        source = following
    graph.configure()
    return graph


def rgb_of(frame, background):
    """(a frame as uint8 [H, W, 3], whether any of it was transparent)."""
    if has_alpha(frame):
        pixels = frame.to_ndarray(format="rgba")
        if pixels[..., 3].min() < 255:
            return flatten(Image.fromarray(pixels), background), True
    return frame.to_ndarray(format="rgb24"), False


def flatten(picture, background):
    """An RGBA picture over a background colour, as uint8 [H, W, 3]."""
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB"))


# -----------------------------------------------------------------------------
# Pictures


def picture_times(picture):
    """The seconds at which each frame of an animated picture appears; [0.0] for a still.

    Only of animations: the second picture in a JPEG is a thumbnail or another eye's view, in a TIFF another page.
    """
    if picture.format not in ("GIF", "WEBP", "AVIF") or getattr(picture, "n_frames", 1) == 1:
        return [0.0]
    times, now = [], 0.0
    for number in range(picture.n_frames):
        picture.seek(number)
        picture.load()  # WebP knows a frame's duration only then
        times.append(now)
        milliseconds = picture.info.get("duration") or 0
        now += (milliseconds if milliseconds > 10 else 100) / 1000  # as browsers do
    return times


def rgb_of_picture(picture, background, profile=None):
    """(a Pillow picture as uint8 [H, W, 3], whether any of it was transparent). profile: see `colour_profile`."""
    picture = simple_mode(picture)
    if profile is not None:
        picture = ImageCms.applyTransform(picture.convert(profile.transform.input_mode), profile.transform)
    if picture.mode == "RGBA" and picture.getextrema()[3][0] < 255:
        return flatten(picture, background), True
    return np.asarray(picture.convert("RGB")), False


def simple_mode(picture):
    """A picture in 8 bits, without a palette, with transparency as a channel."""
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
        return picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return picture.convert("RGBA")
    return picture.convert("RGB") if picture.mode == "P" else picture


class ColourProfile(NamedTuple):
    """A transform to sRGB, the profile's name for the report, and a hash of the profile."""

    transform: ImageCms.ImageCmsTransform
    name: str
    sha256: str


def colour_profile(picture):
    """The ColourProfile of a picture; None if it has none, a damaged one, which viewers ignore, or one that changes no colour of a
    small copy by more than rounding."""
    if not (content := picture.info.get("icc_profile")):
        return None
    small = simple_mode(picture).resize((64, 64))
    if small.mode not in ("RGB", "RGBA", "L", "CMYK"):
        return None
    mode = "RGBA" if small.mode == "RGBA" else "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), small.mode, mode)
        converted, name = ImageCms.applyTransform(small, transform), ImageCms.getProfileDescription(profile)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if np.abs(np.asarray(converted) - np.asarray(small.convert(mode)).astype(np.int16)).max() < 8:
        return None
    return ColourProfile(transform, " ".join(name.split())[:60] or "a colour profile", hashlib.sha256(content).hexdigest())
