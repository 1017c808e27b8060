"""What a viewer sees of a decoded frame: deinterlaced, in SDR, over one background, in sRGB.

Without torch: the guarded reader processes import this module and must start fast.
"""

import functools
import io
import os
import struct
import tempfile

import numpy as np
from PIL import Image, ImageCms

from cogvideox.container import BadClip

# AVColorTransferCharacteristic and AVColorPrimaries, which are the code points of ITU-T H.273
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
PRIMARIES = {  # x and y of red, green and blue; the white of all is D65
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
    return float(np.clip(peak or HDR_PEAK_NITS, DARKEST_PEAK_NITS, 10000))


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


def treated(frames, time_base, treatment):
    """Pass frames through FFmpeg's filters, one out for each one in."""
    if not treatment.keys() & {"deinterlaced", "tone_mapped"}:
        yield from frames
        return
    import av

    graph = None
    for frame in frames:
        if graph is None:
            graph = filter_graph(frame, time_base, treatment)
        graph.push(frame)
        yield from pulled(av, graph)
    if graph is not None:
        graph.push(None)
        yield from pulled(av, graph)


def pulled(av, graph):
    """The frames that a filter graph has ready."""
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def filter_graph(frame, time_base, treatment):
    """A configured av.filter.Graph for frames like `frame`."""
    import av.filter

    graph, filters, cube = av.filter.Graph(), [], None
    if "deinterlaced" in treatment:
        filters.append(("bwdif", {"mode": "send_frame", "parity": "auto", "deint": "interlaced"}))
    if "tone_mapped" in treatment:
        descriptor, cube = tempfile.mkstemp(suffix=".cube")
        with open(descriptor, "wb") as file:
            file.write(tone_cube(*treatment["tone_mapped"]))
        # 16 bits: PQ spends a quarter of its codes on what SDR shows as the lowest tenth
        filters += [("scale", {"flags": "bicubic+full_chroma_int+accurate_rnd"}), ("format", {"pix_fmts": "gbrp16le"})]
        filters += [("lut3d", {"file": cube, "interp": "tetrahedral"}), ("format", {"pix_fmts": "gbrp"})]
    source = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={time_base.numerator}/{time_base.denominator}"
        f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}",
    )
    for name, options in [*filters, ("buffersink", {})]:
        following = graph.add(name, **options)
        source.link_to(following)
        source = following
    try:
        graph.configure()
    finally:
        if cube:
            os.unlink(cube)  # lut3d has read it
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
    """(the numbers of an animated picture's frames, the seconds at which each appears); one frame for a still.

    Only of animations: the second picture in a JPEG is a thumbnail or another eye's view, in a TIFF another page.
    """
    if picture.format not in ("GIF", "PNG", "WEBP", "AVIF") or getattr(picture, "n_frames", 1) == 1:
        return [0], [0.0]
    numbers = list(range(int(bool(picture.info.get("default_image"))), picture.n_frames))  # APNG: a still for old programs comes first
    times, now = [], 0.0
    for number in numbers:
        picture.seek(number)
        picture.load()  # WebP knows a frame's duration only then
        times.append(now)
        milliseconds = picture.info.get("duration") or 0
        now += (milliseconds if milliseconds > 10 else 100) / 1000  # as browsers do
    return numbers, times


def rgb_of_picture(picture, background):
    """(a Pillow picture as uint8 [H, W, 3] in sRGB, what was changed as words)."""
    changes = []
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
        picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    in_srgb, profile = as_srgb(picture), picture.info.get("icc_profile")
    if in_srgb is not None:
        picture = in_srgb
        changes.append(f"{profile_name(profile)} to sRGB")
    if picture.mode == "RGBA" and picture.getextrema()[3][0] < 255:
        return flatten(picture, background), [*changes, "transparent"]
    return np.asarray(picture.convert("RGB")), changes


def as_srgb(picture):
    """A picture with a colour profile in sRGB, or None if it has none, or one that changes less than a grey level in the mean."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA", "L", "CMYK"):
        return None
    mode = "RGBA" if picture.mode == "RGBA" else "RGB"
    try:
        converted = ImageCms.profileToProfile(picture, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile: viewers ignore it
        return None
    plain = np.asarray(picture.convert(mode)).astype(np.int16)
    return converted if np.abs(np.asarray(converted) - plain).mean() >= 1 else None


def profile_name(profile):
    """The name that a colour profile gives itself."""
    return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip() or "its colour profile"
