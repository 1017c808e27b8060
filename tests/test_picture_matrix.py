"""What the trainer reads of a clip is what ffmpeg shows of it: containers, codecs, shapes, fields and colours (tests/clip_matrix.py)."""

import colorsys
import re

import numpy as np
import pytest

from cogvideox.decode import BadClip, Framing, Untrusted, read_clip
from tests import clip_matrix as matrix

TOLERANCE = 3.0  # mean levels of 255
# HDR that was made from SDR looks as it did, but for white, which leaves room for what is brighter.
TOLERANCE_OF = {"pq": 5.0, "hlg": 5.0}
CLIPS = matrix.covering()
QUICK = matrix.singles(CLIPS)


of_each_clip = pytest.mark.parametrize(
    "clip", [pytest.param(c, id=matrix.name(c), marks=[] if c in QUICK else pytest.mark.slow) for c in CLIPS]
)


@pytest.fixture(scope="module")
def show(tmp_path_factory):
    """clip -> (its file, seconds, what ffmpeg shows, what ffmpeg said), made once."""
    made = {}

    def of(clip):
        key = matrix.name(clip)
        if key not in made:
            path = tmp_path_factory.mktemp("clip") / f"clip.{clip['container']}"
            try:
                matrix.make(clip, path)
                made[key] = (path, *matrix.shown(clip, path))
            except matrix.Missing as reason:
                pytest.skip(f"this ffmpeg cannot make it: {reason}")
        return made[key]

    return of


def check_made(clip, frames, told):
    """Assert that a file has what its clip names, by what ffmpeg says of it and shows. Keeps the matrix from being one file 200 times."""
    first = re.search(r"showinfo_0 .* n: *0 (.*\n)+?.* color_range.*", told)[0]
    assert np.abs(np.array(frames.shape[1:3]) - matrix.shown_size(clip)).max() <= 0.5
    names = {
        "mpeg1": "mpeg1video",
        "mpeg2": "mpeg2video",
        "dv": "dvvideo",
        "dv_ntsc": "dvvideo",
        "raw": "rawvideo",
        "h264_rgb": "h264",
        "webp": "webp_anim",
    }
    assert re.search(rf"Video: {names.get(clip['codec'], clip['codec'])}\b", told)
    assert told.split("Stream mapping")[0].count(": Video: ") == (1 if clip["streams"] == "one" else 2)
    assert ("Frame Cropping: 8/4/4/8" in told) == (clip["crop"] == "container")
    kind = {"tff": "T", "bff": "B", "flagged": "T"}.get(clip["fields"], "P")
    assert f" i:{kind} " in first
    start = re.search(r"Duration: .*, start: (-?[\d.]+)", told)
    assert bool(start and float(start[1]) >= 5) == (clip["start"] == "5 s")
    assert (len(frames) >= matrix.COUNT - 1) == (clip["start"] != "edit list")
    if clip["colour"] != "unspecified":
        wanted = "color_range:{} color_space:{} color_primaries:{} color_trc:{}".format(clip["range"], *matrix.COLOURS[clip["colour"]])
        assert wanted in first
    elif clip["codec"] in ("h264", "hevc", "av1", "mpeg2", "prores") and clip["pixels"] != "rgb":
        assert "color_primaries:unknown color_trc:unknown" in first
        assert "color_space:unknown" in first
    assert (frames[:, -1, -1].min() > 250) == (clip["alpha"] == "alpha")


def test_every_pair_of_values_that_can_occur_is_in_a_clip():
    wanted = matrix.permitted_pairs()
    assert len(wanted) > 2000
    assert wanted == set().union(*map(matrix.pairs, CLIPS))
    assert not any(map(matrix.clash, CLIPS))
    assert len(set(map(matrix.name, CLIPS))) == len(CLIPS)


def test_the_quick_clips_have_every_value():
    values = {item for clip in QUICK for item in clip.items()}
    assert values == {(factor, value) for factor, values in matrix.FACTORS.items() for value in values}


@of_each_clip
def test_a_clip_is_read_as_ffmpeg_shows_it(clip, show):
    path, times, frames, _ = show(clip)
    indices, wanted = matrix.at_times(times, frames, 5)
    readers = {}
    for reader in ("auto", "pyav", "decord"):
        try:
            read, facts = read_clip(path, matrix.framing(frames), reader=reader)
        except Untrusted:
            continue
        readers[reader] = facts["reader"]
        assert read.shape == wanted.shape
        shown = np.array([facts["source_height"], facts["source_width"]])
        assert np.abs(shown - matrix.shown_size(clip)).max() <= 0.5
        assert facts["indices"] == indices
        assert matrix.apart(read, wanted).max() <= TOLERANCE_OF.get(clip["colour"], TOLERANCE)
        assert told_changes(facts["note"]) == changes(clip)
        # The control: the next frame of the clip is further away than the tolerance.
        assert matrix.apart(read, frames[np.array(indices) + 1]).min() > 2 * TOLERANCE
    assert readers["auto"] == readers.get("decord", readers["pyav"])


def changes(clip):
    """What has to be done to a clip before it is shown, as its row in the report says it."""
    return {
        "deinterlaced": clip["fields"] in ("tff", "bff", "flagged"),
        "PQ to SDR": clip["colour"] == "pq",
        "HLG to SDR": clip["colour"] == "hlg",
        " pixels": clip["aspect"] not in ("1:1", "0:1"),
        "transparent over #ffffff": clip["alpha"] == "alpha",
        "video stream 1 of 2": clip["streams"] == "two",
    }


def told_changes(note):
    """Which changes a note names."""
    return {
        words: words in note
        for words in ("deinterlaced", "PQ to SDR", "HLG to SDR", " pixels", "transparent over #ffffff", "video stream 1 of 2")
    }


@of_each_clip
def test_a_clip_of_the_matrix_is_what_its_name_says(clip, show):
    """Against a matrix of clips that are all alike: ffmpeg reports of the file what was asked for."""
    _, _, frames, told = show(clip)
    check_made(clip, frames, told)


# -----------------------------------------------------------------------------
# HDR


def hdr_file(path, nits, transfer):
    """Write light of float32 [H, W, 3] in cd/m2, BT.2020 primaries, as HEVC of 10 bits."""
    height, width, _ = nits.shape
    planes = np.stack([nits[..., 1], nits[..., 2], nits[..., 0]]) / 1000  # planar GBR
    tags = f"-color_primaries bt2020 -color_trc {transfer} -colorspace bt2020nc -color_range tv".split()
    matrix.ffmpeg(
        *["-f", "rawvideo", "-pix_fmt", "gbrpf32le", "-s", f"{width}x{height}", "-r", 25, "-i", "-"],
        "-vf",
        "setparams=colorspace=gbr:color_primaries=bt2020:color_trc=linear:range=pc,"
        f"zscale=t={transfer}:m=bt2020nc:r=tv:npl=1000:agamma=0,format=yuv444p10le",
        *["-c:v", "libx265", "-x265-params", "log-level=none:pools=1:lossless=1", *tags, path],
        data=np.stack([planes] * 9).astype("<f4").tobytes(),
    )


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_brighter_light_of_hdr_is_never_darker_in_sdr_and_highlights_keep_their_steps(transfer, tmp_path):
    """A grey ramp from 0 to 1000 cd/m2. White of SDR, 203 cd/m2, stays bright but leaves room for what is brighter."""
    ramp = np.linspace(0, 1000, 256)
    hdr_file(tmp_path / "ramp.mkv", np.broadcast_to(ramp[None, :, None], (64, 256, 3)), transfer)
    read, _ = read_clip(tmp_path / "ramp.mkv", Framing(25, 1, ((64, 256),)))
    row = read[0, 32].astype(int)
    assert np.diff(row, axis=0).min() >= -1
    assert row[0].max() <= 2
    assert row[-1].min() >= 250
    assert np.ptp(row, axis=1).max() <= 3  # grey stays grey
    assert 150 <= row[np.searchsorted(ramp, 203)].mean() <= 254
    highlights = row[np.searchsorted(ramp, 203) :, 0]
    assert len(np.unique(highlights)) > 5
    assert row[np.searchsorted(ramp, 26)].mean() == pytest.approx(255 * (26 / 203) ** (1 / 2.4), abs=20)  # 18 % grey


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
@pytest.mark.parametrize("nits", [100, 600])
def test_colours_of_hdr_keep_their_hue_and_are_not_grey(transfer, nits, tmp_path):
    """Colours that BT.709 has, at the light of a wall and of a lamp."""
    colours = {"red": (1, 0.05, 0.05), "green": (0.05, 1, 0.05), "blue": (0.05, 0.05, 1), "skin": (1, 0.55, 0.4), "sky": (0.3, 0.5, 1)}
    # BT.709 to BT.2020 in linear light (ITU-R BT.2087)
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    patches = np.concatenate([np.broadcast_to(np.array(colour) @ to_2020.T * nits, (64, 64, 3)) for colour in colours.values()], axis=1)
    hdr_file(tmp_path / "patches.mkv", patches, transfer)
    read, _ = read_clip(tmp_path / "patches.mkv", Framing(25, 1, ((64, 64 * len(colours)),)))
    for number, (colour, wanted) in enumerate(colours.items()):
        shown = read[0, 32, 32 + 64 * number] / 255
        hue, saturation, _ = colorsys.rgb_to_hsv(*shown)
        wanted_hue, wanted_saturation, _ = colorsys.rgb_to_hsv(*np.array(wanted) ** (1 / 2.4))
        assert abs((hue - wanted_hue + 0.5) % 1 - 0.5) < 10 / 360, colour
        assert saturation > 0.75 * wanted_saturation, colour


# -----------------------------------------------------------------------------
# What is refused

SDR = "setparams=colorspace=gbr:color_primaries=bt709:color_trc=bt709:range=pc,format=gbrp"
H264, HEVC = "-c:v libx264 -crf 5", "-c:v libx265 -x265-params log-level=none:pools=1"
# file: (filters, options, what the reason has to say)
REFUSED = {
    "ycgco.mp4": (f"{SDR},zscale=m=ycgco:r=tv,format=yuv444p", H264, "(?i)ycgco"),
    "ictcp.mkv": (
        f"{SDR},zscale=m=ictcp:p=bt2020:t=smpte2084:r=tv:npl=203:agamma=0,format=yuv444p10le",
        f"{HEVC}:colormatrix=ictcp",
        "(?i)ictcp",
    ),
    "constant.mp4": (f"{SDR},zscale=m=bt2020c:p=bt2020:t=bt2020-10:r=tv,format=yuv444p10le", H264, "(?i)bt2020c|constant luminance"),
    "linear.mp4": (f"{SDR},zscale=m=bt709:t=linear:r=tv,format=yuv444p10le", H264, "(?i)linear"),
    "log.mp4": (f"{SDR},zscale=m=bt709:t=log100:r=tv,format=yuv444p10le", H264, "(?i)log"),
    "h264_in_a_program_stream.mpg": ("null", f"{H264} -pix_fmt yuv420p", "its frames have no timestamps"),
    "bare.h264": ("null", f"{H264} -pix_fmt yuv420p", "not a video in a supported container"),
    "bare.y4m": ("null", "-pix_fmt yuv420p", "not a video in a supported container"),
    "bare.ivf": ("null", "-c:v libvpx -b:v 1M -pix_fmt yuv420p", "not a video in a supported container"),
    "real.rm": ("null", "-c:v rv10", "not a video in a supported container"),
}


@pytest.mark.parametrize("reader", ["auto", "pyav"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_can_show_is_refused_by_name(name, reader, tmp_path):
    """Colours for which FFmpeg's scaler has no formula: it would show another colour. And containers of one bare stream."""
    filters, options, reason = REFUSED[name]
    pictures = matrix.pictures(9, 144, 96)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "144x96", "-r", 25, "-i", "-"]
    matrix.ffmpeg(*raw, "-vf", filters, *options.split(), tmp_path / name, data=pictures.tobytes())
    with pytest.raises(BadClip, match=reason):
        read_clip(tmp_path / name, Framing(25, 9, ((96, 144),)), reader=reader)
