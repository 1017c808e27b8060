"""Windows: parts of files as clips.

python -m pytest tests/test_windows.py
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from cogvideox import container, decode, survey
from cogvideox.decode import BadClip, Framing, choose_frames, clip_framing, read_clip
from cogvideox.files import read_json
from cogvideox.windows import place_windows, seconds_of, seconds_trained, split_line
from dataset import Record, list_clips, read_records
from tests.conftest import lora_of, same, words
from tests.test_decode import BT709, MPEG4, OPEN, TWO_RATES, blot, copy_streams, ffmpeg, make, x264
from tools import check_dataset

# -----------------------------------------------------------------------------
# Lists that name windows


@pytest.fixture
def two_files(tmp_path):
    """A folder with two files; lists are the tests' own."""
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "videos" / name).write_bytes(b"not decoded here")
    return tmp_path


def listed(root, lines, **options):
    """The records and problems of a folder whose videos.txt has these lines."""
    (root / "videos.txt").write_text("\n".join(lines) + "\n")
    (root / "prompts.txt").write_text("".join(f"caption {number}\n" for number in range(len(lines))))
    return read_records(root, **options)[:2]


def test_lines_name_windows_in_seconds_minutes_or_hours(two_files):
    lines = ["videos/a.mp4", "videos/a.mp4 | 12.500-18.625", "videos/b.mp4|1:02.5-0:01:08", "videos/b.mp4 | 1:00:00 \u2013 1:00:06"]
    records, problems = listed(two_files, lines)
    assert problems == []
    assert [record.reason for record in records] == [None] * 4
    assert [record.window for record in records] == [None, (12.5, 18.625), (62.5, 68.0), (3600.0, 3606.0)]
    assert [record.listed for record in records] == lines
    assert [record.path.rpartition("/")[2] for record in records] == ["a.mp4", "a.mp4", "b.mp4", "b.mp4"]


def test_a_file_whose_name_is_the_whole_line_wins(two_files):
    line = "videos/a.mp4 | 1-2"
    assert listed(two_files, [line])[0][0].window == (1.0, 2.0)
    (two_files / line).write_bytes(b"a name with a bar")
    records, problems = listed(two_files, [line])
    assert problems == []
    assert (records[0].window, records[0].path) == (None, str(two_files / line))


def test_wrong_windows_are_named_together_and_other_clips_keep_their_captions(two_files):
    wrong = {
        "videos/a.mp4 | 5-3": "ends at 3, not after its start at 5",
        "videos/a.mp4 | 5-5": "ends at 5, not after its start at 5",
        "videos/a.mp4 | 5-": "'' is no time in seconds (12.5) or minutes (1:02.5)",
        "videos/a.mp4 | 5": "'5' is no window",
        "videos/a.mp4 | -5-6": "'-5-6' is no window",
        "videos/a.mp4 | two-three": "'two' is no time",
        "videos/a.mp4 | 1,5-2": "'1,5' is no time",
        "videos/a.mp4 | 0:75-2:00": "'0:75' has 60 or more after a colon",
        "| 1-2": "'1-2' is no window",
    }
    records, problems = listed(two_files, [*wrong, "videos/gone.mp4 | 1-2", "videos/b.mp4 | 1-2"])
    assert len(problems) == len(wrong)
    for number, (problem, told) in enumerate(zip(problems, wrong.values(), strict=True), 1):
        assert problem.startswith(f"videos.txt:{number}: {told}")
        assert problem.endswith("write FILE | START-END in seconds (film.mp4 | 12.5-18.625) or minutes (1:02.5-1:08)")
    assert [(record.reason, record.caption) for record in records] == [("no such file", "caption 9"), (None, "caption 10")]


ROWS = [
    {"video": "videos/a.mp4", "text": "whole"},
    {"video": "videos/a.mp4", "text": "numbers", "start": 1, "end": 2.5},
    {"video": "videos/b.mp4", "text": "texts", "start": "0:01", "end": " 2.5 "},
    {"video": "videos/b.mp4", "text": "empty", "start": None, "end": ""},
    {"video": "videos/b.mp4", "text": "missing", "start": float("nan"), "end": "NaN"},
]
WRONG_ROWS = {
    "start is 1.0 without end; give both or neither": {"start": 1.0},
    "end is 2 without start; give both or neither": {"end": 2, "start": ""},
    "ends at 1, not after its start at 2": {"start": 2, "end": 1},
    "-1 is no time in seconds": {"start": -1, "end": 1},
    "inf is no time in seconds": {"start": 1, "end": float("inf")},
    "'True' is no time in seconds (12.5) or minutes (1:02.5)": {"start": 0, "end": True},
    "'[1]' is no time in seconds (12.5) or minutes (1:02.5)": {"start": 0, "end": [1]},
}


def assert_rows_are_read(records, problems, where="metadata"):
    """The records and problems of ROWS and WRONG_ROWS."""
    assert [record.window for record in records] == [None, (1.0, 2.5), (1.0, 2.5), None, None]
    assert [record.listed for record in records[:3]] == ["videos/a.mp4", "videos/a.mp4 | 1.000-2.500", "videos/b.mp4 | 1.000-2.500"]
    assert [record.reason for record in records] == [None] * 5
    assert [problem.split(": ", 1)[1] for problem in problems] == list(WRONG_ROWS)


ALL_ROWS = ROWS + [{"video": "videos/a.mp4", "text": "wrong"} | wrong for wrong in WRONG_ROWS.values()]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_columns_of_a_json_table_name_windows(kind, two_files):
    text = "\n".join(map(json.dumps, ALL_ROWS)) if kind == "jsonl" else json.dumps(ALL_ROWS)
    (two_files / f"metadata.{kind}").write_text(text)
    assert_rows_are_read(*read_records(two_files)[:2])


def test_columns_of_a_csv_table_name_windows(two_files):
    (two_files / "metadata.csv").write_text("video,text,start,end\nvideos/a.mp4,x,1,2.5\nvideos/a.mp4,y,,\nvideos/b.mp4,z,3,\n")
    records, problems, _ = read_records(two_files)
    assert [record.window for record in records] == [(1.0, 2.5), None]
    assert problems == ["metadata.csv:4: start is '3' without end; give both or neither"]


def test_columns_of_parquet_and_of_the_datasets_package_name_windows(two_files, monkeypatch):
    full = [{"start": None, "end": None} | row for row in ALL_ROWS]
    reader = SimpleNamespace(read_table=lambda path: SimpleNamespace(column_names=list(full[0]), to_pylist=lambda: full))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", SimpleNamespace(parquet=reader))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", reader)
    (two_files / "metadata.parquet").touch()
    assert_rows_are_read(*read_records(two_files)[:2])

    class Rows(list):
        column_names, features = list(full[0]), {"video": None}

    package = SimpleNamespace(load_dataset=lambda *a, **k: Rows(full), Video=type("Video", (), {}))
    monkeypatch.setitem(__import__("sys").modules, "datasets", package)
    monkeypatch.chdir(two_files)
    args = SimpleNamespace(dataset_name="some/clips", dataset_config_name=None, cache_dir=None, caption_column=None, video_column=None)
    args.id_token, args.image_column, args.encoding_cache_dir = None, None, two_files
    assert_rows_are_read(*list_clips(args)[:2])


def test_a_text_file_per_clip_names_no_window(two_files):
    name = "videos/c | 1-2.mp4"
    (two_files / name).write_bytes(b"a name with a bar")
    for video in (two_files / "videos").iterdir():
        video.with_suffix(".txt").write_text("caption") if video.suffix == ".mp4" else None
    records, problems, _ = read_records(two_files)
    assert problems == []
    assert {record.listed: record.window for record in records}[name] is None


# -----------------------------------------------------------------------------
# The frames of a window


def framing(**changes):
    return Framing(**{"fps": 8, "max_num_frames": 49, "sizes": ((32, 48),)} | changes)


def test_a_frame_belongs_to_the_window_in_whose_milliseconds_it_lies():
    """A film at 30000/1001: every frame belongs to exactly one of the windows that meet at a time in milliseconds."""
    times = np.arange(300) * 1001 / 30000
    for border in range(5, 295, 7):
        ends = [(0.0, round(float(times[border]), 3)), (round(float(times[border]), 3), 20.0)]
        before, after = (choose_frames(times, framing(fps=30, max_num_frames=400, frames_per_latent=1, window=w)) for w in ends)
        assert before[-1] == border - 1
        assert after[0] == border


def test_a_window_has_the_same_frames_as_a_file_of_them():
    times = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.1, 400))
    times -= times[0]
    for first, end in ((0, 200), (37, 120), (200, 400)):
        window = float(times[first]), float(times[end - 1]) + 0.01
        for skipped in (0, 5):
            inside = choose_frames(times, framing(window=window, skip_frames_start=skipped))
            assert inside == [i + first for i in choose_frames(times[first:end] - times[first], framing(skip_frames_start=skipped))]
            assert inside != [i + first for i in choose_frames(times, framing(skip_frames_start=skipped))][: len(inside)] or first == 0


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        ((10.0, 12.0), r"its window starts after its end \(the file has 10.0 seconds\)"),
        ((5.06, 5.08), "no frame between 5.060 and 5.080 seconds"),
        ((5.0, 5.5), "4 frames at 8 fps, at least 5 are needed"),
    ],
)
def test_a_window_that_cannot_be_trained_is_named(window, reason):
    times = np.arange(240) / 24
    assert len(choose_frames(times, framing(window=(5.0, 5.75), lengths=(5,)))) == 5
    with pytest.raises(BadClip, match=reason):
        choose_frames(times, framing(window=window, lengths=(5,)))


def test_clip_framing_gives_each_window_its_own_frames_and_random_crop():
    records = [SimpleNamespace(listed=f"a.mp4 | {start}-9", window=(start, 9.0)) for start in (1.0, 2.0)]
    one, two = (clip_framing(record, framing(reshape_mode="random"), 42) for record in records)
    assert (one.window, two.window) == ((1.0, 9.0), (2.0, 9.0))
    assert (one.crop_x, one.crop_y) != (two.crop_x, two.crop_y)
    assert clip_framing(SimpleNamespace(listed="a.mp4", window=None), framing(), 42) == framing()


# -----------------------------------------------------------------------------
# Placing windows


@pytest.mark.parametrize(
    ("kind", "end", "starts"),
    [
        ("one", 10.0, [1.938]),
        ("slide", 12.24, [0.0]),
        ("slide", 12.25, [0.0, 6.125]),
        ("slide", 20.0, [0.0, 6.125, 12.25]),
        ("spread", 12.25, [0.0, 6.125]),
        ("spread", 12.5, [0.0, 3.188, 6.375]),
    ],
)
def test_windows_are_placed_in_a_stretch(kind, end, starts):
    windows = place_windows(kind, 0.0, end, 6.125)
    assert [start for start, _ in windows] == starts
    assert all(window_end - start == pytest.approx(6.125, abs=1e-9) for start, window_end in windows)
    assert [s for s, _ in place_windows(kind, 100.0, 100 + end, 6.125)] == [round(100 + s, 3) for s in starts]


@pytest.mark.parametrize("kind", ["one", "slide", "spread"])
def test_a_stretch_shorter_than_a_window_is_one_window(kind):
    assert place_windows(kind, 2.0, 5.0, 6.125) == [(2.0, 5.0)]
    assert place_windows(kind, 2.0, 8.125, 6.125) == [(2.0, 8.125)]


@pytest.mark.parametrize(("num_frames", "fps"), [(49, 8), (81, 16), (85, 16), (9, 8)])
@pytest.mark.parametrize("source_fps", [16, 24, 25, 30000 / 1001, 60])
def test_every_placed_window_has_all_its_frames(num_frames, fps, source_fps):
    """Also where neither the length nor the frames' times are whole milliseconds."""
    times = np.arange(int(30 * source_fps)) / source_fps
    starts = [0.0, *np.random.default_rng(1).uniform(0, 3, 3)]  # at no round time
    for kind in ("slide", "spread"):
        for start in starts:
            windows = place_windows(kind, start, 30.0, num_frames / fps)
            assert len(windows) > 1
            for window in windows:
                assert len(choose_frames(times, framing(fps=fps, max_num_frames=num_frames, window=window))) == num_frames


def test_times_are_read():
    assert [seconds_of(t) for t in ("5", "5.", "0:05", "1:00:05.25", 7, 2.5)] == [5, 5, 5, 3605.25, 7, 2.5]
    assert split_line("a | b.mp4 | 1-2") == ("a | b.mp4", (1.0, 2.0))


# -----------------------------------------------------------------------------
# Decoding windows: the same pixels as of a file that holds nothing else

FIRST, END, COUNT = 25, 55, 72  # the frames of the window, and of the file

INTRA_REFRESH = "intra-refresh=1:keyint=12:bframes=2:scenecut=0:b-adapt=0"
# name: the encoder's options. A key frame every 12 frames: none is the window's first.
SOURCES = {
    "b_frames.mp4": x264(),
    "two_rates.mp4": x264(*TWO_RATES),
    "h264.ts": x264(),
    "mpeg4.avi": MPEG4,
    "mjpeg.avi": ["-c:v", "mjpeg", "-q:v", 2],
    "open_group.mkv": ["-c:v", "libx264", "-x264-params", OPEN],
    "starts_late.mkv": x264("-output_ts_offset", 5),
    "bt709.mp4": x264(*BT709),
    "interlaced.mp4": x264("-flags", "+ildct+ilme"),
    "intra_refresh.mp4": ["-c:v", "libx264", "-preset", "veryfast", "-x264-params", INTRA_REFRESH],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-b:v", "500k", "-cpu-used", 8, "-g", 20, "-auto-alt-ref", 1, "-lag-in-frames", 16],
    "wmv2.wmv": ["-c:v", "wmv2", "-q:v", 3, "-g", 12],
    "animation.gif": [],
}


def time_of(name, number):
    """The time of a frame of a source, in whole milliseconds."""
    rates = {"two_rates.mp4": number / 24 if number < 24 else 1 + (number - 24) / 12, "animation.gif": number / 10}
    return round(rates.get(name, number / 24), 3)


def cut_losslessly(source, target, first=FIRST, end=END):
    """Write frames of a video to a file of their own, without changing a pixel."""
    if source.name == "mjpeg.avi":  # every frame is a key frame, and no other codec keeps its full range
        copy_streams(source, target, "-ss", (first - 0.1) / 24, after=("-t", (end - first) / 24))
        return
    codec = ["-c:v", "libx264", "-qp", 0, "-flags", "+ildct+ilme"] if "interlaced" in source.name else ["-c:v", "ffv1"]
    frames = f"trim=start_frame={first}:end_frame={end},setpts=PTS-STARTPTS"
    ffmpeg("-i", source, "-map", "0:v", "-vf", frames, "-fps_mode", "passthrough", "-enc_time_base", "1:12000", *codec, target)


def inside(name, first=FIRST, end=END, **changes):
    """The framing of a window of a source: 9 frames as they are stored, the last ones of the window among them."""
    window = (time_of(name, first), time_of(name, end))
    fps = 8 / (window[1] - window[0] - 0.1)
    return Framing(**{"fps": fps, "max_num_frames": 9, "sizes": ((64, 96),), "window": window} | changes)


def assert_window_is_cut(name, source, cut):
    """Both readers decode the window as the file of its frames, and a window one frame later as another."""
    framing = inside(name)
    for reader in ("auto", "pyav"):
        frames, facts = read_clip(source, framing, reader)
        alone, facts_alone = read_clip(cut, inside(name, window=None, fps=framing.fps), reader)
        assert facts["indices"] == [index + FIRST for index in facts_alone["indices"]]
        assert (facts["source_frames"], facts["frames"]) == (END - FIRST, 9)
        assert facts["source_seconds"] == pytest.approx(facts_alone["source_seconds"], abs=0.002)
        assert facts["reader"] == facts_alone["reader"] or "read with PyAV" in facts["note"]
        if facts["reader"] == facts_alone["reader"]:
            np.testing.assert_array_equal(frames, alone)
        later, _ = read_clip(source, inside(name, FIRST + 1, END + 1, fps=framing.fps), reader)
        assert np.abs(later.astype(int) - alone).mean(axis=(1, 2, 3)).min() > 1


def test_a_window_is_decoded_as_the_same_frames_cut_losslessly_into_a_file(tmp_path):
    make(tmp_path / "b_frames.mp4", *SOURCES["b_frames.mp4"], count=COUNT)
    cut_losslessly(tmp_path / "b_frames.mp4", tmp_path / "cut.mkv")
    assert_window_is_cut("b_frames.mp4", tmp_path / "b_frames.mp4", tmp_path / "cut.mkv")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SOURCES if name != "b_frames.mp4"])
def test_a_window_of_any_kind_of_file_is_decoded_as_the_same_frames_in_a_file(name, tmp_path):
    make(tmp_path / name, *SOURCES[name], count=COUNT, **({"fps": "10"} if name == "animation.gif" else {}))
    cut_losslessly(tmp_path / name, tmp_path / "cut.mkv")
    assert_window_is_cut(name, tmp_path / name, tmp_path / "cut.mkv")


@pytest.mark.slow
def test_a_window_of_a_turned_file_stands_upright(tmp_path):
    make(tmp_path / "b_frames.mp4", *SOURCES["b_frames.mp4"], count=COUNT)
    cut_losslessly(tmp_path / "b_frames.mp4", tmp_path / "flat.mkv")
    for name, source in (("turned.mp4", "b_frames.mp4"), ("cut.mkv", "flat.mkv")):
        copy_streams(tmp_path / source, tmp_path / name, "-display_rotation", 90)
    assert_window_is_cut("b_frames.mp4", tmp_path / "turned.mp4", tmp_path / "cut.mkv")


@pytest.mark.slow
def test_a_window_of_a_file_with_an_edit_list_counts_from_its_first_shown_frame(tmp_path):
    make(tmp_path / "b_frames.mp4", *SOURCES["b_frames.mp4"], count=COUNT + 24)
    copy_streams(tmp_path / "b_frames.mp4", tmp_path / "edit_list.mp4", "-ss", 0.9)
    cut_losslessly(tmp_path / "edit_list.mp4", tmp_path / "cut.mkv")
    assert_window_is_cut("edit_list.mp4", tmp_path / "edit_list.mp4", tmp_path / "cut.mkv")


@pytest.mark.slow
def test_a_window_is_decoded_as_a_stream_copied_at_its_key_frames(tmp_path):
    make(tmp_path / "film.mp4", *x264(b_frames=0), count=COUNT)
    copy_streams(tmp_path / "film.mp4", tmp_path / "cut.mp4", "-ss", 1, after=("-t", 1.25))
    for reader in ("decord", "pyav"):
        frames, facts = read_clip(tmp_path / "film.mp4", inside("film.mp4", 24, 54), reader)
        alone, facts_alone = read_clip(tmp_path / "cut.mp4", inside("film.mp4", 24, 54, window=None), reader)
        assert facts["indices"][0] == 24
        assert facts["source_frames"] == facts_alone["source_frames"] == 30
        np.testing.assert_array_equal(frames, alone)


@pytest.fixture
def counted(monkeypatch):
    """The number of frames that PyAV has decoded, in a list."""
    count, decoded = [0], container.decoded

    def counting(*arguments):
        for frame in decoded(*arguments):
            count[0] += 1
            yield frame

    monkeypatch.setattr(container, "decoded", counting)
    return count


def test_a_window_at_the_end_decodes_only_from_the_key_frame_before_it(tmp_path, counted):
    make(tmp_path / "film.mp4", *x264(), count=240)
    window = Framing(8, 5, ((64, 96),), window=(9.5, 10.0), latents_per_patch=1)
    frames, facts = read_clip(tmp_path / "film.mp4", window, "decord")
    assert (facts["indices"][0], facts["note"]) == (228, "")
    assert 0 < counted[0] <= 2 * 12
    counted[0] = 0
    read_clip(tmp_path / "film.mp4", window, "pyav")
    assert 0 < counted[0] <= 4 * 12
    counted[0] = 0
    _, facts = read_clip(tmp_path / "film.mp4", Framing(8, 5, ((64, 96),), skip_frames_start=228), "pyav")
    assert facts["indices"][0] == 228
    assert counted[0] > 2 * 228  # the control: what the same frames cost without a window
    assert len(frames) == 1


def test_damage_before_a_window_does_not_matter_and_damage_inside_it_is_named(tmp_path):
    make(tmp_path / "film.mp4", *x264(b_frames=0), "-movflags", "+faststart", count=96)
    blot(tmp_path / "film.mp4", tmp_path / "spoilt.mp4", share=0.3)
    late = Framing(8, 5, ((64, 96),), window=(3.0, 4.0))
    np.testing.assert_array_equal(*(read_clip(tmp_path / name, late)[0] for name in ("spoilt.mp4", "film.mp4")))
    with pytest.raises(BadClip, match="damaged: frame"):
        read_clip(tmp_path / "spoilt.mp4", Framing(8, 33, ((64, 96),), window=(0.5, 4.0)))


def test_the_packets_of_a_file_are_listed_once_until_it_changes(tmp_path, monkeypatch):
    film, listed, cropping = tmp_path / "film.mp4", [], container.cropping
    monkeypatch.setattr(container, "cropping", lambda *a: listed.append(a) or cropping(*a))
    make(film, *x264(), count=48)
    for start in (0.0, 0.5, 1.0):
        assert read_clip(film, Framing(8, 5, ((64, 96),), window=(start, start + 0.7)))[1]["indices"][0] == 24 * start
    assert len(listed) == 1
    make(film, *x264(), count=24)
    assert read_clip(film, Framing(8, 49, ((64, 96),)))[1]["source_frames"] == 24
    assert len(listed) == 2
    with pytest.raises(BadClip, match=r"starts after its end \(the file has 1.0 seconds\)"):
        read_clip(film, Framing(8, 5, ((64, 96),), window=(1.0, 1.7)))


def test_a_window_that_ends_after_the_file_is_told_and_a_picture_has_none(tmp_path):
    make(tmp_path / "film.mp4", *x264(), count=48)
    read, facts = read_clip(tmp_path / "film.mp4", Framing(8, 49, ((64, 96),), window=(1.0, 9.0)))
    assert facts["note"] == "its window ends after the file (2.0 seconds)"
    assert (facts["window"], facts["source_frames"], len(read)) == ([1.0, 2.0], 24, 5)
    make(tmp_path / "still.png", count=1)
    with pytest.raises(BadClip, match="a picture has no windows"):
        read_clip(tmp_path / "still.png", Framing(8, 49, ((64, 96),), window=(0.0, 1.0)))


# -----------------------------------------------------------------------------
# Several windows of a clip


def survey_of(seconds):
    """A stand-in for decoding: records -> facts of files of so many seconds at 24 fps, by their path."""
    surveyed = []

    def survey(records):
        surveyed.append([record.listed for record in records])
        return [facts_of(record, seconds[record.path]) for record in records]

    return survey, surveyed


def facts_of(record, seconds):
    """The facts of a clip as `read_clip` gives them, as far as windows need them."""
    if seconds is None:
        return {"reason": "damaged"}
    times = np.arange(round(24 * seconds)) / 24
    own = Framing(8, 9, ((64, 96),), window=record.window)
    facts = decode.clip_facts(times, choose_frames(times, own), (96, 64), own)
    return facts | {"sha256": record.path, "survey": record.listed}


def record_of(path, window=None, where=None):
    listed = f"{path} | {window[0]:.3f}-{window[1]:.3f}" if window else path
    return Record(where or f"videos.txt:{listed}", listed, path, f"caption of {listed}", window=window)


RECORDS = [record_of("a.mp4"), record_of("b.mp4"), record_of("c.mp4"), record_of("a.mp4", (1.0, 3.5)), record_of("bad.mp4")]
SECONDS = {"a.mp4": 4.0, "b.mp4": 1.0, "c.mp4": 1.125, "bad.mp4": None, "still.png": 1 / 24}


@pytest.mark.parametrize(
    ("kind", "of_a", "of_window"),
    [
        ("slide", [(0.0, 1.125), (1.125, 2.25), (2.25, 3.375)], [(1.0, 2.125), (2.125, 3.25)]),
        ("spread", [(0.0, 1.125), (0.958, 2.083), (1.917, 3.042), (2.875, 4.0)], [(1.0, 2.125), (1.688, 2.813), (2.375, 3.5)]),
    ],
)
def test_longer_clips_and_windows_are_split_and_the_others_stay_as_they_are(kind, of_a, of_window):
    survey_all, surveyed = survey_of(SECONDS)
    records, facts, parts_of, split = survey.survey_windows(kind, RECORDS, framing(max_num_frames=9), survey_all)
    assert [record.window for record in records] == [*of_a, None, None, *of_window, None]
    assert parts_of == [0] * len(of_a) + [1, 2] + [3] * len(of_window) + [4]
    assert [clip.get("window") for clip in facts] == [record.window and list(record.window) for record in records]
    assert all(clip["frames"] == 9 and clip["used_percent"] == 100 for record, clip in zip(records, facts, strict=True) if record.window)
    assert len({record.listed for record in records}) == len(records)
    assert all(record.listed.count("|") == bool(record.window) for record in records)
    assert [len(listed) for listed in surveyed] == [5, len(of_a) + len(of_window)]  # what is not split is decoded once
    assert [clip["survey"] for clip in split] == ["a.mp4", "a.mp4 | 1.000-3.500"]


def test_without_the_flag_no_clip_is_split():
    survey_all, surveyed = survey_of(SECONDS)
    records, facts, parts_of, split = survey.survey_windows("one", RECORDS, framing(max_num_frames=9), survey_all)
    assert (records, list(parts_of), split, len(surveyed)) == (RECORDS, [0, 1, 2, 3, 4], [], 1)
    assert "window" not in facts[0]


def test_a_source_with_few_frames_gets_longer_windows_that_have_all_of_them():
    for source_fps in (3, 5, 6, 7.9, 8, 8.1, 10, 24):
        length = seconds_trained(49, 8, source_fps)
        assert length == 49 / 8 or source_fps < 8.5
        times = np.arange(int(40 * source_fps)) / source_fps
        for window in place_windows("slide", 0.3, 30.0, length):
            assert len(choose_frames(times, framing(window=window))) == 49, (source_fps, window)


def test_the_cache_key_of_a_clip_without_a_window_is_that_of_before_windows(monkeypatch):
    monkeypatch.setattr(survey, "decoders", lambda: ["1", "2", "3"])
    monkeypatch.setattr(survey, "SURVEY_VERSION", 2)  # that of before windows
    assert survey.survey_key("content", framing()) == "de319f2e61666f78bbe8f9a927c7972f03387474"
    assert survey.survey_key("content", framing(window=(1.0, 2.0))) not in (
        "de319f2e61666f78bbe8f9a927c7972f03387474",
        survey.survey_key("content", framing(window=(1.0, 2.5))),
    )


def described(records, facts, held_out, kind="one"):
    readings = [survey.Reading()] * len(records)
    return survey.describe(records, facts, readings, 226, framing(max_num_frames=9), held_out, windows=kind)


def test_held_out_windows_that_overlap_trained_ones_are_named():
    windows = [(0.0, 1.2), (1.0, 2.2), (2.2, 3.4), (3.4, 4.0)]
    records = [record_of("a.mp4", window) for window in windows] + [record_of("b.mp4")]
    facts = [facts_of(record, SECONDS[record.path]) for record in records]
    remarks = described(records, facts, held_out={1, 3})["remarks"]
    assert "2 clips overlap another of the same file: a.mp4 | 0.000-1.200, a.mp4 | 1.000-2.200" in remarks
    told = "1 of the held-out clips overlap a training clip: their score does not detect memorising: a.mp4 | 1.000-2.200"
    assert told in remarks
    assert not any("training clip" in remark for remark in described(records, facts, held_out={0, 1, 3})["remarks"])


def test_windows_of_one_clip_are_counted_and_not_named_as_copies():
    records, facts, _, _ = survey.survey_windows("spread", RECORDS[:1], framing(max_num_frames=9), survey_of(SECONDS)[0])
    remarks = described(records, facts, (), "spread")["remarks"]
    assert remarks[0] == "1 clips give 4 windows (--windows spread)"
    assert not any("another" in remark for remark in remarks)


# -----------------------------------------------------------------------------
# Runs


def folder_of(path, lines):
    """A data folder with these lines in videos.txt, and a caption for each."""
    path.mkdir(exist_ok=True)
    (path / "videos.txt").write_text("\n".join(map(str, lines)) + "\n")
    (path / "prompts.txt").write_text("".join(f"the rabbit number {number}\n" for number in range(len(lines))))
    return path


@pytest.mark.slow
def test_a_run_of_windows_trains_what_a_run_of_the_same_frames_in_files_trains(train, tmp_path):
    film, starts = tmp_path / "film.mp4", (5, 25, 40)
    make(film, *x264(), count=COUNT)
    for start in starts:
        cut_losslessly(film, tmp_path / f"{start}.mkv", start, start + 30)
    lines = [f"{film} | {time_of('film.mp4', start)}-{time_of('film.mp4', start + 30)}" for start in starts]
    windows = train(data=folder_of(tmp_path / "windows", lines), max_train_steps=3)
    files = train(data=folder_of(tmp_path / "files", [tmp_path / f"{start}.mkv" for start in starts]), max_train_steps=3)
    assert same(lora_of(windows), lora_of(files))
    moved = lines[:2] + [f"{film} | {time_of('film.mp4', 41)}-{time_of('film.mp4', 71)}"]
    assert not same(lora_of(windows), lora_of(train(data=folder_of(tmp_path / "moved", moved), max_train_steps=3)))
    clips = read_json(windows / "dataset.json")["clips"]
    assert [clip["path"] for clip in clips] == lines
    assert [clip["source_frames"] for clip in clips] == [30] * 3
    assert len({clip["sha256"] for clip in clips}) == 1


@pytest.mark.slow
def test_a_run_with_windows_trains_all_of_them_and_is_resumed_with_the_same_only(train, tmp_path, six_clips, capsys):
    flags = {"windows": "slide", "max_num_frames": 5, "eval_share": 0.34, "max_train_steps": 2}
    folder = train(**flags)
    clips = read_json(folder / "dataset.json")["clips"]
    assert len(clips) == 18  # 49 frames at 24 per second hold 5 frames at 8 three times
    sides = {line: {clip["split"] for clip in clips if clip["line"] == line} for line in (clip["line"] for clip in clips)}
    assert sorted(map(str, sides.values())) == ["{'held out'}"] * 2 + ["{'trained'}"] * 4
    whole = read_json(train(**flags | {"windows": "one"}) / "dataset.json")["clips"]
    assert [clip["line"] for clip in whole if clip["split"] == "held out"] == [line for line in sides if sides[line] == {"held out"}]
    report = (folder / "dataset_report.txt").read_text()
    assert "6 clips give 18 windows (--windows slide)" in report
    assert "videos/02.mp4 | 0.625-1.250" in report
    assert "12 clips; 1 per batch" in capsys.readouterr().err
    train(output=folder, resume_from_checkpoint="latest", **flags | {"max_train_steps": 3})
    with pytest.raises(SystemExit) as stop:
        train(output=folder, resume_from_checkpoint="latest", **flags | {"max_train_steps": 4, "windows": "spread"})
    assert stop.value.code == 4


@pytest.mark.slow
def test_two_processes_split_clips_in_the_same_windows_as_one(forked, train, tiny_model, six_clips, encodings, tmp_path):
    flags = {"windows": "spread", "max_num_frames": 5, "eval_share": 0.34}
    codes, output = forked.run(words(tiny_model, six_clips, tmp_path / "two", tmp_path / "fresh", **flags), processes=2)
    assert codes == [0, 0], output[-2000:]
    clips = [read_json(folder / "dataset.json")["clips"] for folder in (tmp_path / "two", train(**flags))]
    assert len(clips[0]) == 24
    assert clips[0] == clips[1]


@pytest.mark.slow
def test_the_check_of_a_folder_shows_the_windows(six_clips, encodings, tmp_path, capsys):
    line = [str(six_clips), "--windows", "slide", "--max_num_frames", "5", "--height", "32", "--width", "48"]
    check_dataset.main([*line, "--encoding_cache_dir", str(encodings), "--sheet", str(tmp_path / "sheet.png")])
    told = capsys.readouterr().out
    assert "6 clips give 18 windows (--windows slide)" in told
    assert "02.mp4 | 0.625-1.250" in told


@pytest.mark.parametrize("name", ["skip_frames_start", "skip_frames_end"])
def test_frames_are_not_skipped_in_each_of_several_windows(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        check_dataset.main([str(tmp_path), "--windows", "slide", f"--{name}", "3"])
    assert stop.value.code == 2
    assert "--windows slide: --skip_frames_start and --skip_frames_end would skip in each window" in capsys.readouterr().err
