"""Windows: parts of files as clips.

python -m pytest tests/test_windows.py
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from cogvideox.decode import BadClip, Framing, choose_frames, clip_framing
from cogvideox.windows import place_windows, seconds_of, split_line
from dataset import list_clips, read_records

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
    args.id_token, args.encoding_cache_dir = None, two_files
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
    assert len(choose_frames(times, framing(window=(5.0, 5.75), latents_per_patch=2))) == 5
    with pytest.raises(BadClip, match=reason):
        choose_frames(times, framing(window=window, latents_per_patch=2))


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
    times = np.arange(int(100 * source_fps)) / source_fps
    starts = [0.0, *np.random.default_rng(1).uniform(0, 3, 3)]  # at no round time
    for kind in ("slide", "spread"):
        for start in starts:
            windows = place_windows(kind, start, 100.0, num_frames / fps)
            assert len(windows) > 1
            for window in windows:
                assert len(choose_frames(times, framing(fps=fps, max_num_frames=num_frames, window=window))) == num_frames


def test_times_are_read():
    assert [seconds_of(t) for t in ("5", "5.", "0:05", "1:00:05.25", 7, 2.5)] == [5, 5, 5, 3605.25, 7, 2.5]
    assert split_line("a | b.mp4 | 1-2") == ("a | b.mp4", (1.0, 2.0))
