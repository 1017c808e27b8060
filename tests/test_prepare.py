"""From footage to a data folder: cuts, windows, what speaks against them, the lists, the page."""

import base64
import hashlib
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cogvideox.files import read_json
from cogvideox.reader import Readers
from dataset import read_records

pytest.importorskip("scenedetect")
import av

from demo import cut_score
from tests.conftest import FAMILIES, example_of
from tools import footage, prepare, shots
from tools.review import write_page

RULES = {"fps": 8.0, "min_motion": 1.0, "max_blur": 0.6, "min_bright": 50.0, "aspect": 1.5, "trained_aspect": 1.5}


def scene(number, frames, width=96, height=64):
    """Coarse noise that drifts, another one for each number: uint8 [frames, h, w, 3]."""
    noise = np.random.default_rng(number).integers(40, 220, (height // 8, width // 8, 3))
    picture = noise.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(picture, 2 * place, axis=1) for place in range(frames)]).astype(np.uint8)


def write_film(path, frames, times=None, group=12):
    """Encode frames [F, H, W, 3] at 24 fps, or at times in milliseconds."""
    times = times if times is not None else np.round(np.arange(len(frames)) * 1000 / 24).astype(int)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast", "crf": "12", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *frames.shape[1:3], "yuv420p", group
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, when in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = int(when), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def look(path, folder):
    """What is kept of a film, read in this process."""
    index, target = footage.index_film(str(path)), folder / "kept"
    pieces = footage.pieces_of(index, 8.0, target)
    target.mkdir()
    for piece in pieces:
        footage.examine(str(path), piece)
    assert footage.join(index, list(pieces), target)
    return dict(np.load(target.with_suffix(".npz"))), len(pieces)


# -----------------------------------------------------------------------------
# Cuts


@pytest.mark.slow
def test_cuts_are_found_at_their_frames_and_times_also_at_a_variable_rate(tmp_path):
    frames = np.concatenate([scene(1, 20), scene(2, 31), scene(3, 25)])
    times = np.concatenate([np.arange(40) * 40, 1600 + np.arange(36) * 90])  # 25 fps, then 11
    for name, when in (("even", None), ("uneven", times)):
        (tmp_path / name).mkdir()
        film, _ = look(write_film(tmp_path / name / "film.mp4", frames, when), tmp_path / name)
        assert shots.cuts_of(film, "adaptive") == [20, 51]
        assert shots.cuts_of(film, "content") == [20, 51]
        found = shots.shots_of(film, [20, 51], 0.1)
    assert found[0] == pytest.approx((0.0, 0.7))
    assert found[1] == pytest.approx((0.9, 2.49))
    assert found[2][0] == pytest.approx(2.69)


def test_the_detectors_find_what_scenedetect_finds_by_itself(tmp_path):
    from scenedetect import detect
    from scenedetect.detectors import AdaptiveDetector

    path = write_film(tmp_path / "film.mp4", np.concatenate([scene(n, 14 + 3 * n) for n in range(4)]))
    film, _ = look(path, tmp_path)
    by_itself = detect(str(path), AdaptiveDetector(min_scene_len=shots.SHORTEST_SHOT))
    assert shots.cuts_of(film, "adaptive") == [start.frame_num for start, _ in by_itself][1:] == [14, 31, 51]
    assert shots.cuts_of(film, "adaptive", 1000.0) == []


def test_a_film_without_a_cut_is_one_shot(tmp_path):
    film, _ = look(write_film(tmp_path / "film.mp4", scene(1, 48)), tmp_path)
    assert shots.cuts_of(film, "adaptive") == []
    assert shots.shots_of(film, [], 0.1) == [(0.0, pytest.approx(2.0, abs=0.002))]


@pytest.mark.slow
def test_a_film_in_pieces_is_the_same_film(tmp_path, monkeypatch):
    path = write_film(tmp_path / "film.mp4", np.concatenate([scene(n, 24) for n in range(5)]))
    (tmp_path / "whole").mkdir()
    whole, count = look(path, tmp_path / "whole")
    monkeypatch.setattr(footage, "PIECE_SECONDS", 0.9)
    (tmp_path / "parts").mkdir()
    parts, count_of_parts = look(path, tmp_path / "parts")
    assert (count, count_of_parts) == (1, 5)
    for name in footage.ARRAYS:
        same = np.isclose(parts[name], whole[name], equal_nan=True).reshape(len(whole[name]), -1).all(axis=1)
        assert same.all() or (name == "motion" and np.isnan(parts[name][~same]).all())  # a piece's first sample follows none
    for folder in ("whole", "parts"):
        with av.open(str(tmp_path / folder / "kept.mp4")) as preview:
            assert [frame.time for frame in preview.decode(video=0)] == pytest.approx([n / 8 for n in range(40)], abs=1e-3)


def test_cuts_are_scored_against_the_known_ones():
    known, described = cut_score.boundaries()
    assert len(known) == 99
    assert cut_score.score(known, known, described, 0) == (1.0, 1.0, 1.0)
    late = [frame + 2 for frame in known]
    assert cut_score.score(late, known, described, 1)[2] == 0
    assert cut_score.score(late, known, described, 2)[2] == 1
    assert cut_score.score(known + [100, 14000], known, described, 0)[0] == 99 / 100  # one in a shot, one in the credits


# -----------------------------------------------------------------------------
# What speaks against a window


@pytest.mark.slow
def test_each_fault_of_a_window_is_named_and_a_good_window_has_none(tmp_path):
    count = 48
    good, dark, barred, faded = scene(1, count), scene(2, count) // 8, scene(3, count), scene(4, count).astype(float)
    static = scene(5, 1).repeat(count, axis=0)
    barred[:, :10], barred[:, -10:] = 0, 0
    faded *= np.clip(np.abs(np.arange(count) - 24) / 12, 0.02, 1)[:, None, None, None]
    ramp = np.linspace(60, 200, 192).reshape(1, 1, 192, 1)
    blurred = np.concatenate([np.roll(np.concatenate([ramp, ramp[:, :, ::-1]], 2), 6 * n, 2)[:, :, :96] for n in range(count)])
    blurred = np.broadcast_to(blurred, (count, 64, 96, 3))
    scenes = {"good": good, "dark": dark, "bars": barred, "fade": faded, "static": static, "blurred": blurred}
    film, _ = look(write_film(tmp_path / "film.mp4", np.concatenate(list(scenes.values())).astype(np.uint8)), tmp_path)
    for number, name in enumerate(scenes):
        window = shots.Window("film", 2 * number + 0.15, 2 * number + 1.9, 13)
        shots.judge(film, window, RULES)
        assert list(window.reasons) == ([] if name == "good" else [name]), (name, window.reasons)
    assert "15.6 % at the top and bottom" in shots.bars_of(np.array([[0, 0.156, 0, 0.156]]), 1.5, 1.5)
    assert shots.bars_of(np.array([[0.05, 0, 0.05, 0]]), 1.9, 1.5) is None  # the centre crop takes them


def test_windows_like_an_earlier_one_are_named_across_files():
    windows = [shots.Window(name, 0, 1, 9) for name in ("a", "b", "c")]
    pictures = [np.full((3, 8, 12, 3), level, np.float32) for level in (10, 60, 12)]
    shots.find_duplicates(windows, pictures, 4.0, lambda window: window.film)
    assert [list(window.reasons) for window in windows] == [[], [], ["duplicate"]]
    assert windows[2].reasons["duplicate"].startswith("2.0 grey levels from a")


def test_a_logo_that_stays_across_shots_is_found_and_a_film_without_one_has_none():
    pictures = np.stack([np.roll(scene(n, 1, 192, 128)[0], (3 * n, 3 * n), (0, 1)) for n in range(8)])
    assert shots.overlay_of(pictures) is None
    marked = pictures.copy()
    marked[:, 100:120:3, 150:180] = 255
    overlay = shots.overlay_of(marked)
    assert "78 to 94 % from the left" in shots.shows_overlay(marked[3], overlay)
    assert shots.shows_overlay(pictures[3], overlay) is None
    assert shots.overlay_of(marked[:7]) is None  # too few shots to tell


def test_windows_within_shots_and_shots_that_are_too_short():
    windows, short = shots.windows_of("a", [(0.0, 10.0), (10.2, 12.0)], "one", 8.0, 49, 49)
    assert [(w.start, w.end) for w in windows] == [(1.938, 8.063)]
    assert short == [(10.2, 12.0)]
    windows, short = shots.windows_of("a", [(0.0, 13.0), (13.2, 15.5)], "slide", 8.0, 49, 17)
    assert [w.frames for w in windows] == [49, 49, 17]
    assert short == []
    # CogVideoX 1.5 takes 8k + 1 frames.
    shots_of_15 = [(0.0, 6.0), (6.2, 10.1), (10.2, 11.0)]
    windows, short = shots.windows_of("a", shots_of_15, "one", 16.0, 81, 17, 2)
    assert [w.frames for w in windows] == [81, 57]
    assert [w.frames for w in shots.windows_of("a", shots_of_15, "one", 16.0, 81, 17)[0]] == [81, 61]
    assert short == [(10.2, 11.0)]


@pytest.mark.parametrize("family", ["2b", "1.5-5b"])
def test_windows_have_the_length_and_rate_of_the_model_to_be_trained(family_model, tmp_path, family):
    (tmp_path / "film.mp4").write_text("x")
    words = [str(tmp_path / "film.mp4"), "--output_dir", str(tmp_path / "data")]
    model = ["--pretrained_model_name_or_path", str(family_model(family))]
    args = prepare.parse(words)
    assert (args.fps, args.frames, args.height, args.width) == (8, 49, 480, 720)
    args = prepare.parse([*words, *model, "--min_num_frames", "10"])
    is_15 = family == "1.5-5b"
    assert (args.fps, args.frames, args.height, args.width, args.least) == (16 if is_15 else 8, 17, 64, 96, 17 if is_15 else 13)
    args = prepare.parse([*words, *model, "--max_num_frames", "85", "--fps", "12"])
    assert (args.fps, args.frames) == (12, 81 if is_15 else 85)


# -----------------------------------------------------------------------------
# Lists and mistakes


SIZE_OF_10 = ["--height", "480", "--width", "720", "--max_num_frames", "49"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_commands_at_the_end_are_of_the_model_and_the_windows(family_model, tmp_path, family):
    """finetune_single_gpu.sh gives the 2B's size, length and rate: windows made for another model would be trained as half their seconds."""
    script = "finetune_single_gpu.sh" if family == "2b" else example_of(family)
    assert (Path(__file__).resolve().parent.parent / script).is_file()
    (tmp_path / "film.mp4").touch()
    words = [str(tmp_path / "film.mp4"), "--output_dir", str(tmp_path / "data")]
    model, data = family_model(family), tmp_path / "data"
    of_model = [*words, "--pretrained_model_name_or_path", str(model)]
    captions, train = prepare.following_commands(prepare.parse(of_model))
    assert captions == f"python -m tools.caption {data} --pretrained_model_name_or_path {model}"
    published = [*of_model, *(["--height", "768", "--width", "1360", "--max_num_frames", "81"] if family.startswith("1.5") else SIZE_OF_10)]
    start = f"MODEL_PATH={model} DATASET_PATH={data} bash {script}"
    assert prepare.following_commands(prepare.parse(published))[1] == start
    assert train.startswith(f"{start} --height ")  # the script gives the published size, and this model has another
    others = prepare.parse([*of_model, "--height", "16", "--max_num_frames", "4", "--fps", "12.5"])
    captions_of_others, train_of_others = prepare.following_commands(others)
    assert captions_of_others == f"{captions} --height 16 --max_num_frames {others.frames} --fps 12.5"
    assert train_of_others == f"{start} --height 16 --width {others.width} --max_num_frames {others.frames} --fps 12.5"
    assert prepare.following_commands(prepare.parse(words)) == (
        f"python -m tools.caption {data}", f"DATASET_PATH={data} bash finetune_single_gpu.sh"
    )  # fmt: skip


def test_captions_that_somebody_wrote_are_never_lost():
    state = {"placeholders": {"a": "film", "b": "film"}, "captions": {}}
    pairs = [("a", "a rabbit"), ("b", "film"), ("own | 1.000-2.000", "my window")]
    lists, state, _ = prepare.merge(["b", "c"], {"a": "film", "b": "other", "c": "film"}, pairs, state)
    assert lists == [("b", "other"), ("c", "film"), ("own | 1.000-2.000", "my window")]
    assert state["captions"] == {"a": "a rabbit"}
    lists, state, told = prepare.merge(["a", "b"], {"a": "film", "b": "film"}, lists, state)
    assert lists[:2] == [("a", "a rabbit"), ("b", "film")]
    assert lists[2][1] == "my window"
    assert not state["captions"]
    assert told[0] == "1 captions kept"


def test_a_kill_between_the_lists_parts_no_caption_from_its_clip(tmp_path, monkeypatch):
    prepare.write_lists(tmp_path, [("a", "one"), ("b", "two")], {"placeholders": {}, "captions": {}})
    write = prepare.write_bytes

    def killed(path, content):
        if path.name == "videos.txt":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(prepare, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.write_lists(tmp_path, [("b", "two"), ("c", "three")], {"placeholders": {}, "captions": {"a": "one"}})
    assert (tmp_path / "videos.txt").read_text() == "a\nb\n"
    assert (tmp_path / "prompts.txt").read_text() == "two\nthree\n"
    pairs, state, problem = prepare.read_lists(tmp_path)
    assert pairs == [("b", "two"), ("c", "three")]
    assert state["captions"] == {"a": "one"}
    assert problem is None


def test_films_are_linked_not_copied_and_two_of_one_name_stay_apart(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "film.mp4").write_text(name)
    films = [tmp_path / "x/film.mp4", tmp_path / "y/film.mp4"]
    for _ in range(2):
        assert list(prepare.name_films(films, tmp_path / "data").values()) == ["videos/film.mp4", "videos/film-2.mp4"]
    assert os.path.samefile(tmp_path / "data/videos/film-2.mp4", films[1])


def test_names_become_words():
    assert prepare.in_words("Big_Buck-Bunny.720p") == "Big Buck Bunny 720p"
    assert prepare.in_words("___") == "a video"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere.mp4"], 2, "nowhere.mp4: no such file or folder"),
        (["."], 3, "no video in it"),
        (["film.mp4", "--review", "none.txt"], 2, "save it from review.html"),
        (["film.mp4", "--review", "bad.txt"], 3, "bad.txt:1: 'perhaps film.mp4' is neither"),
        (["film.mp4", "--detector", "none", "--cut_threshold", "3"], 2, "--detector none finds no cuts"),
        (["film.mp4", "--min_num_frames", "99"], 2, "is above --max_num_frames 49"),
        (["film.mp4", "--pretrained_model_name_or_path", "./no-model"], 2, "--pretrained_model_name_or_path ./no-model: no such folder"),
        (["film.mp4", "--pretrained_model_name_or_path", "other"], 2, "--pretrained_model_name_or_path other: cannot be read"),
        (["film.mp4", "--output_dir", "other"], 4, "has a prompts.txt that tools.prepare did not write"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capfd, words, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_text("perhaps film.mp4\n")
    if words != ["."]:
        (tmp_path / "film.mp4").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/prompts.txt").write_text("x\n")
    with pytest.raises(SystemExit) as ended:
        prepare.main([*words, *([] if "--output_dir" in words else ["--output_dir", "data"])])
    assert ended.value.code == code
    assert message in capfd.readouterr().err


def test_the_page_runs_only_its_own_script_and_shows_names_as_text(tmp_path):
    window = {"listed": "<b>.mp4 | 0.000-1.000", "train": True, "reasons": {"dark": "level <3"}, "frames": 9, "caption": "<script>x"}
    window |= {"strip": "s.jpg", "width": 10, "height": 5, "preview": "p.mp4", "start": 0.0, "end": 1.0}
    write_page(tmp_path / "review.html", "t", "s", [window], ["a shot"], {"dark": ("too dark", 1)}, "python -m x")
    page = (tmp_path / "review.html").read_text()
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    assert page.count("<script>") == 1
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page
    assert "&lt;b&gt;.mp4" in page
    assert "&lt;script&gt;x" in page
    assert "http" not in page.replace("http-equiv", "")


# -----------------------------------------------------------------------------
# The command

WORDS = ["--max_num_frames", "9", "--height", "64", "--width", "96", "--workers", "2"]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with a film of three shots, the first of them again in another file, and a file that is no video."""
    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "one.mp4", np.concatenate([scene(n, 40) for n in range(3)]))
    write_film(folder / "two.mp4", np.concatenate([scene(0, 40), scene(7, 40)]))
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    return folder


@pytest.mark.slow
def test_footage_becomes_a_folder_that_the_trainer_reads_and_a_review_decides(films, tmp_path, capfd, monkeypatch):
    data = tmp_path / "data"
    prepare.main([str(films), "--output_dir", str(data), *WORDS])
    told = capfd.readouterr().err
    assert "broken.mp4: left out: " in told
    assert "1 left out: duplicate" in told
    records, problems, _ = read_records(data)
    assert not problems
    assert [(record.reason, record.caption) for record in records] == [(None, "one")] * 3 + [(None, "two")]
    assert all(record.window[1] - record.window[0] == pytest.approx(1.125) for record in records)
    assert [(films / name).stat().st_nlink for name in ("one.mp4", "two.mp4", "broken.mp4")] == [2, 2, 1]

    lines = (data / "videos.txt").read_text().splitlines()
    (duplicate,) = read_json(data / "prepare.json")["placeholders"].keys() - set(lines)
    (data / "prompts.txt").write_text("first\none\nthird\ntwo\n")
    review = f"leave {lines[0]}\n" + "".join(f"keep  {line}\n" for line in [*lines[1:3], duplicate])
    (tmp_path / "review.txt").write_text(review)
    monkeypatch.setattr(Readers, "start", lambda self: pytest.fail("a second run reads the footage again"))
    footage_again = [str(films / name) for name in ("one.mp4", "two.mp4")]
    prepare.main([*footage_again, "--output_dir", str(data), *WORDS, "--review", str(tmp_path / "review.txt")])
    assert (data / "videos.txt").read_text().splitlines() == [*lines[1:3], duplicate, lines[3]]
    assert (data / "prompts.txt").read_text().splitlines() == ["one", "third", "two", "two"]
    assert read_json(data / "prepare.json")["captions"] == {lines[0]: "first"}


@pytest.mark.slow
def test_nothing_left_ends_with_the_reasons(films, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        prepare.main([str(films / "broken.mp4"), "--output_dir", str(tmp_path), *WORDS])
    assert ended.value.code == 3
    assert "nothing is left to train on" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_from_the_pieces_that_a_killed_one_left(tmp_path, monkeypatch):
    frames = np.concatenate([scene(n, 16) for n in range(8)])  # 4 frames a second: 32 s
    path = write_film(tmp_path / "film.mp4", frames, np.arange(len(frames)) * 250, group=16)
    monkeypatch.setattr(footage, "PIECE_SECONDS", 8.0)
    target = tmp_path / "data/.prepare" / footage.film_key(path, 8.0)
    target.mkdir(parents=True)
    pieces = list(footage.pieces_of(footage.index_film(str(path)), 8.0, target))
    footage.examine(str(path), pieces[1])
    (target / "00002.mkv").write_bytes(b"half of a preview, and no numbers yet")
    (target / "00003.1.partial").write_bytes(b"half")
    seen, join = [], footage.join

    def watched(index, given, joined):
        seen.extend((target / f"{piece.number:05d}.npz").stat().st_mtime_ns for piece in given)
        return join(index, given, joined)

    kept = (target / "00001.npz").stat().st_mtime_ns
    monkeypatch.setattr(footage, "join", watched)
    prepare.main([str(path), "--output_dir", str(tmp_path / "data"), *WORDS])
    assert len(seen) == len(pieces) == 4
    assert seen[1] == kept < min(seen[:1] + seen[2:])
    assert not target.exists()
    monkeypatch.setattr(footage, "join", join)
    prepare.main([str(path), "--output_dir", str(tmp_path / "fresh"), *WORDS])
    assert (tmp_path / "data/videos.txt").read_text() == (tmp_path / "fresh/videos.txt").read_text() != ""


@pytest.mark.slow
def test_a_film_whose_pieces_lack_frames_is_read_whole_and_a_copy_only_once(tmp_path, monkeypatch):
    path = write_film(tmp_path / "film.mp4", np.concatenate([scene(n, 24) for n in range(3)]))
    copy = Path(shutil.copy2(path, tmp_path / "copy.mp4"))
    monkeypatch.setattr(footage, "PIECE_SECONDS", 0.9)
    join, joined = footage.join, []

    def watched(index, pieces, target):
        joined.append(len(pieces))
        return len(pieces) == 1 and join(index, pieces, target)

    monkeypatch.setattr(footage, "join", watched)
    assert footage.examine_films([path, copy], 8.0, tmp_path / "kept", 60.0, 2) == {}
    assert joined == [3, 1]
    film = dict(np.load(tmp_path / "kept" / f"{footage.film_key(copy, 8.0)}.npz"))
    assert len(film["stamps"]) == 72
    assert [place.name for place in (tmp_path / "kept").iterdir() if place.is_dir()] == []
