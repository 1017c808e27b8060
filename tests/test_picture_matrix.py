"""What the trainer reads of a clip is what ffmpeg shows of it: containers, codecs, shapes, fields and colours (tests/clip_matrix.py)."""

import re

import numpy as np
import pytest

from cogvideox.decode import Untrusted, read_clip
from tests import clip_matrix as matrix

TOLERANCE = 3.0  # mean levels of 255
# Tone mapping has no single right answer. What was SDR before it became HDR should look about as it did.
TOLERANCE_OF = {"pq": 12.0, "hlg": 12.0}
CLIPS = matrix.covering()
QUICK = matrix.singles(CLIPS)


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
    assert frames.shape[1:3] == matrix.shown_size(clip)
    names = {"mpeg1": "mpeg1video", "mpeg2": "mpeg2video", "dv": "dvvideo", "raw": "rawvideo", "h264_rgb": "h264", "webp": "webp_anim"}
    assert re.search(rf"Video: {names.get(clip['codec'], clip['codec'])}\b", told)
    assert told.split("Stream mapping")[0].count(": Video: ") == (1 if clip["streams"] == "one" else 2)
    assert ("Frame Cropping: 8/4/2/6" in told) == (clip["crop"] == "container")
    kind = {"tff": "T", "bff": "B", "flagged": "T"}.get(clip["fields"], "P")
    assert f" i:{kind} " in first
    start = re.search(r"Duration: .*, start: (-?[\d.]+)", told)
    assert bool(start and float(start[1]) >= 5) == (clip["start"] == "5 s")
    assert (len(frames) >= matrix.COUNT - 1) == (clip["start"] != "edit list")
    if clip["colour"] in ("bt709", "bt601", "pal", "srgb", "bt2020", *matrix.HDR):
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


@pytest.mark.parametrize("clip", [pytest.param(c, id=matrix.name(c), marks=[] if c in QUICK else pytest.mark.slow) for c in CLIPS])
def test_a_clip_is_read_as_ffmpeg_shows_it(clip, show):
    path, times, frames, _ = show(clip)
    tolerance = TOLERANCE_OF.get(clip["colour"], TOLERANCE)
    assert len(frames) >= matrix.COUNT - 3
    indices, wanted = matrix.at_times(times, frames, 5)
    for reader in ("auto", "pyav", "decord"):
        try:
            read, facts = read_clip(path, matrix.framing(frames), reader=reader)
        except Untrusted:
            assert reader == "decord"
            continue
        assert read.shape == wanted.shape, reader
        assert (facts["source_height"], facts["source_width"]) == frames.shape[1:3], reader
        assert facts["indices"] == indices, reader
        assert matrix.apart(read, wanted).max() <= tolerance, (reader, facts)
        # The control: another frame of the clip is further away than the tolerance.
        assert matrix.apart(read, frames[np.array(indices) + 1]).min() > 2 * TOLERANCE, reader


@pytest.mark.parametrize("clip", [pytest.param(c, id=matrix.name(c), marks=[] if c in QUICK else pytest.mark.slow) for c in CLIPS])
def test_a_clip_of_the_matrix_is_what_its_name_says(clip, show):
    """Against a matrix of clips that are all alike: ffmpeg reports of the file what was asked for."""
    _, _, frames, told = show(clip)
    check_made(clip, frames, told)
