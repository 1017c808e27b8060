"""Data folders: pairs that never shift, every fault named at once, frames by time."""

import dataclasses
import json
import os
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train_cogvideox_lora as script
from cogvideox import survey, versions
from cogvideox.decode import BadClip, Framing, choose_frames, exact_scale, fit, longest_legal_length, read_clip, source_box
from cogvideox.files import read_json
from cogvideox.reader import Readers
from dataset import lacking_shared_memory, one_ahead, read_records
from tests.conftest import lora_of, same, words


def framing(**settings):
    return Framing(**({"fps": 8, "max_num_frames": 49, "sizes": ((32, 48),)} | settings))


# -----------------------------------------------------------------------------
# Records


def test_captions_and_clips_pair_line_by_line(clips):
    records, problems, layout = read_records(clips)
    assert problems == []
    assert layout == "line files"
    captions = (clips / "prompts.txt").read_text().splitlines()
    listed = (clips / "videos.txt").read_text().splitlines()
    assert [(r.listed, r.caption) for r in records] == list(zip(listed, captions, strict=True))


def test_a_byte_order_mark_crlf_and_a_final_empty_line_are_fine(clips):
    for name in ("prompts.txt", "videos.txt"):
        text = (clips / name).read_text().replace("\n", "\r\n")
        (clips / name).write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    records, problems, _ = read_records(clips)
    assert problems == []
    assert len(records) == 6
    assert records[0].caption.startswith("BUNNYTOON a grey")


def test_empty_lines_are_named_and_never_shift_a_pair(clips):
    captions, videos = (clips / "prompts.txt").read_text().splitlines(), (clips / "videos.txt").read_text().splitlines()
    (clips / "prompts.txt").write_text("\n".join([captions[0], "", *captions[1:]]) + "\n")
    (clips / "videos.txt").write_text("\n".join([*videos[:3], "  ", *videos[3:]]) + "\n")
    records, problems, _ = read_records(clips)
    assert [p.split(":")[:2] for p in problems] == [["prompts.txt", "2"], ["videos.txt", "4"]]
    assert (records[0].listed, records[0].caption) == (videos[0], captions[0])


def test_a_missing_line_is_named_with_both_counts(clips):
    lines = (clips / "prompts.txt").read_text().splitlines()
    (clips / "prompts.txt").write_text("\n".join(lines[:-1]) + "\n")
    _, problems, _ = read_records(clips)
    assert problems == ["prompts.txt has 5 lines, videos.txt 6: videos.txt:6 ('videos/08.mp4') has no partner in prompts.txt"]


def test_a_file_that_is_not_utf8_names_its_line(clips):
    (clips / "prompts.txt").write_bytes(b"one\ncaf\xe9\n")
    assert "prompts.txt:2: not UTF-8 (byte 0xe9)" in read_records(clips)[1][0]


def test_a_missing_list_offers_the_one_that_is_there(clips):
    (clips / "prompts.txt").rename(clips / "prompt.txt")
    assert "there is prompt.txt" in read_records(clips)[1][0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder, path: path.unlink(), "no such file"),
        (lambda folder, path: path.write_bytes(b""), "empty file"),
        (lambda folder, path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda folder, path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda folder, path: (path.unlink(), path.symlink_to(folder / "nothing")), "a broken link"),
        (lambda folder, path: (path.unlink(), path.symlink_to(path)), "cannot be opened"),
    ],
    ids=["missing", "empty", "fifo", "folder", "dangling link", "link loop"],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(clips, make, words):
    make(clips, clips / "videos/04.mp4")
    records, problems, _ = read_records(clips)
    assert problems == []
    assert [r.reason for r in records].count(None) == 5
    assert (records[1].where, records[1].listed) == ("videos.txt:2", "videos/04.mp4")
    assert words in records[1].reason


def test_a_relative_path_out_of_the_folder_is_refused_unless_allowed(clips, tmp_path):
    outside = tmp_path / "outside.mp4"
    (clips / "videos/04.mp4").rename(outside)
    (clips / "videos/04.mp4").symlink_to(outside)
    text = (clips / "videos.txt").read_text().replace("videos/05.mp4", "../outside.mp4")
    (clips / "videos.txt").write_text(text)

    def refused(**flags):
        return [number for number, r in enumerate(read_records(clips, **flags)[0], 1) if r.reason and "outside the data folder" in r.reason]

    assert refused() == [2, 3]
    assert refused(allow_external_paths=True) == []
    (clips / "videos.txt").write_text(text.replace("../outside.mp4", str(outside)))  # written out, it was meant
    assert refused() == [2]


@pytest.mark.parametrize("listed", ["http://127.0.0.1/clip.mp4", "concat://a", "file:///etc/passwd"])
def test_an_address_is_not_a_file(clips, listed):
    (clips / "videos.txt").write_text((clips / "videos.txt").read_text().replace("videos/04.mp4", listed))
    assert read_records(clips)[0][1].reason == "not a file name"


@pytest.mark.slow
def test_a_table_names_its_columns(clips, train):
    records, _, _ = read_records(clips)
    rows = [{"file": r.listed, "words": r.caption, "empty": ""} for r in records]
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (clips / "list.csv").write_text("file,words\n" + "".join(f'{r.listed},"{r.caption}"\n' for r in records))
    names = {"caption_column": "words", "video_column": "file"}
    for table in (clips / "metadata.jsonl", clips / "list.csv"):
        pairs, problems, _ = read_records(table, "words", "file")
        assert problems == []
        assert [(r.path, r.caption) for r in pairs] == [(r.path, r.caption) for r in records]
    assert "no column text, video (it has: file, words, empty)" in read_records(clips / "metadata.jsonl")[1][0]
    assert len(read_records(clips / "metadata.jsonl", "empty", "file")[1]) == 6
    os.rename(clips / "prompts.txt", clips / "captions.txt")
    from_table = train(data=clips, **names)
    (clips / "metadata.jsonl").unlink()
    from_lines = train(data=clips, caption_column="captions.txt")
    assert same(lora_of(from_table), lora_of(from_lines))


def test_a_text_file_a_clip_is_read_in_both_places(clips):
    records, _, _ = read_records(clips)
    (clips / "labels").mkdir()
    for record in records:
        (clips / "labels" / record.listed.split("/")[1]).with_suffix(".txt").write_text(record.caption + "\n")
    for name in ("prompts.txt", "videos.txt"):
        (clips / name).unlink()
    found, problems, layout = read_records(clips)
    assert (problems, layout) == ([], "videos with a text file each")
    assert [(r.path, r.caption) for r in found] == [(r.path, r.caption) for r in records]
    for text in (clips / "labels").iterdir():
        text.rename(clips / "videos" / text.name)
    (clips / "labels").rmdir()
    (clips / "videos/04.txt").write_text(" ")
    found, problems, _ = read_records(clips)
    assert len(found) == 5
    assert "videos/04.mp4: the caption videos/04.txt is empty" in problems[0]


def test_dataset_flags_reach_the_datasets_package(monkeypatch, clips, tmp_path):
    from cogvideox.survey import list_clips

    asked = {}

    class Rows(list):
        column_names = ["text", "video"]
        features = {"video": "string"}

    class Package:
        Video = type("Video", (), {})

        @staticmethod
        def load_dataset(name, config, cache_dir, split):
            asked.update(name=name, config=config, split=split)
            return Rows([{"text": "a\nrabbit", "video": str(clips / "videos/04.mp4")}, {"text": "", "video": "nothing.mp4"}])

    monkeypatch.setitem(__import__("sys").modules, "datasets", Package)
    monkeypatch.setattr(versions, "installed", lambda name: "3.2.0")
    args = script.parse_args(words("m", None, "o", tmp_path, dataset_name="someone/clips", dataset_config_name="small", id_token="T"))
    records, problems, _ = list_clips(args)
    assert asked == {"name": "someone/clips", "config": "small", "split": "train"}
    assert [r.caption for r in records] == ["T a rabbit"]
    assert problems == ["someone/clips:2: empty text"]


# -----------------------------------------------------------------------------
# Frames


def test_a_24_fps_clip_gives_every_third_frame_at_8_fps():
    times = np.arange(49) / 24
    assert choose_frames(times, framing()) == list(range(0, 49, 3))
    assert choose_frames(times, framing(max_num_frames=9)) == list(range(0, 27, 3))
    assert choose_frames(times, framing(fps=24)) == list(range(49))
    assert choose_frames(times, framing(fps=12))[:3] == [0, 2, 4]


@pytest.mark.parametrize("source_fps", [8, 10, 15, 23.976, 25, 29.97, 30, 50, 60, 120])
def test_frames_lie_within_half_a_source_frame_of_their_time(source_fps):
    times = np.arange(int(7 * source_fps)) / source_fps
    chosen = choose_frames(times, framing())
    assert len(chosen) == 49
    assert np.abs(times[chosen] - np.arange(49) / 8).max() <= 0.5 / source_fps + 1e-9


def test_a_variable_frame_rate_keeps_its_speed():
    times = np.concatenate([np.arange(0, 1, 1 / 30), np.arange(1, 3, 1 / 10)])
    chosen = choose_frames(times, framing())
    assert len(chosen) == 21  # 3 seconds hold 24, and 4k + 1 is 21
    assert np.abs(times[chosen] - np.arange(21) / 8).max() <= 0.05


def test_a_frame_that_is_held_for_long_is_seen_until_the_next_one_comes():
    times = np.concatenate([np.arange(0, 1, 1 / 24), 3 + np.arange(0, 1, 1 / 24)])  # a pause of two seconds after the 24th frame
    chosen = choose_frames(times, framing())
    held = [k for k, index in enumerate(chosen) if index == 23]
    assert held == list(range(8, 23))  # from 1.0 s to 2.75 s; half-way would be 2.0 s
    assert chosen[24] == 24


def test_skipped_frames_are_left_out_and_too_many_are_told():
    times = np.arange(49) / 24
    assert choose_frames(times, framing(skip_frames_start=6))[0] == 6
    assert choose_frames(times, framing(skip_frames_end=24))[-1] <= 24
    with pytest.raises(BadClip, match="--skip_frames_start 40 and --skip_frames_end 9 leave none"):
        choose_frames(times, framing(skip_frames_start=40, skip_frames_end=9))


@pytest.mark.parametrize(
    ("frames", "plain", "by_two"),
    [(0, 0, 0), (1, 1, 1), (4, 1, 1), (5, 5, 1), (12, 9, 9), (49, 49, 49), (53, 53, 49), (81, 81, 81), (85, 85, 81)],
)
def test_a_clip_is_cut_to_the_longest_legal_length(frames, plain, by_two):
    assert longest_legal_length(frames) == plain
    assert longest_legal_length(frames, latents_per_patch=2) == by_two


def test_the_crop_is_centred_keeps_the_aspect_and_none_stretches():
    assert source_box(320, 160, 48, 32, framing()) == (40.0, 0.0, 280.0, 160.0)
    assert source_box(160, 320, 48, 32, framing(crop_y=0.0)) == pytest.approx((0.0, 0.0, 160.0, 106.667), abs=1e-3)
    assert source_box(320, 160, 48, 32, framing(reshape_mode="none")) == (0.0, 0.0, 320.0, 160.0)
    picture = np.zeros((160, 320, 3), np.uint8)
    picture[:, 140:180] = 255  # a bar of an eighth of the width, in the middle
    for mode, expected in (("center", 48 * 40 / 240), ("none", 48 / 8)):
        facts = {"width": 48, "height": 32, "box": list(source_box(320, 160, 48, 32, framing(reshape_mode=mode)))}
        bar = fit(picture, facts)[16, :, 0] > 127
        assert bar.sum() == pytest.approx(expected, abs=1)
        assert np.nonzero(bar)[0].mean() == pytest.approx(23.5, abs=0.6)


def test_a_decoder_scales_only_where_that_is_exact():
    facts = {"stored_width": 240, "stored_height": 160, "width": 96, "height": 64, "box": [0.0, 0.0, 240.0, 160.0]}
    assert exact_scale(facts) == (96, 64)
    assert exact_scale(facts | {"stored_width": 1280, "stored_height": 720, "box": [100.0, 0.0, 1180.0, 720.0]}) is None


def test_scaling_in_the_decoder_gives_the_picture_that_pillow_gives(six_clips):
    frames, facts = read_clip(six_clips / "videos/04.mp4", framing(sizes=((64, 96),), max_num_frames=5), reader="decord")
    full, _ = read_clip(six_clips / "videos/04.mp4", framing(sizes=((160, 240),), max_num_frames=5), reader="decord")
    reference = np.stack([np.asarray(Image.fromarray(f).resize((96, 64), Image.Resampling.BICUBIC)) for f in full])
    assert np.abs(frames.astype(int) - reference).mean() < 3
    assert np.abs(frames.astype(int) - np.roll(reference, 4, axis=2)).mean() > 6


# -----------------------------------------------------------------------------
# The survey and the run


def spoil(clips):
    """Five faults of five kinds."""
    (clips / "videos/04.mp4").write_bytes((clips / "videos/04.mp4").read_bytes()[:6000])
    (clips / "videos/05.mp4").write_bytes(b"")
    (clips / "videos/06.mp4").write_text("not a video at all\n" * 50)
    (clips / "videos/07.mp4").unlink()
    with (clips / "videos.txt").open("a") as file:
        file.write("videos/02.mp4\n")


def test_a_bad_folder_ends_before_any_model_loads_with_every_fault_named(clips, train, monkeypatch, capsys, tmp_path):
    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("cogvideox.encodings.load_text_encoder", forbidden)
    monkeypatch.setattr("cogvideox.encodings.load_vae", forbidden)
    monkeypatch.setattr("cogvideox.lora.load_transformer", forbidden)
    spoil(clips)
    with pytest.raises(SystemExit) as stop:
        train(data=clips, output=tmp_path / "out", cache=tmp_path / "cache")
    assert stop.value.code == 3
    told = capsys.readouterr().err
    for sentence in (
        "videos/04.mp4",
        "videos/05.mp4: empty file",
        "videos/06.mp4",
        "videos/07.mp4: no such file",
        "prompts.txt has 6 lines, videos.txt 7",
    ):
        assert sentence in told
    assert told.count("ERROR[3]") == 5
    assert {p.name for p in (tmp_path / "out").rglob("*")} == {".lock", ".files_of_runs.jsonl", "dataset.json", "dataset_report.txt"}
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and "hashes" not in str(p)] == []


def test_faults_of_the_model_the_size_and_the_data_are_told_together(clips, train, capsys, tmp_path):
    (clips / "videos/05.mp4").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        train(model=tmp_path / "nothing", data=clips, height=36)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "no such folder" in told
    assert "--height 36" in told
    assert "videos/05.mp4: empty file" in told


@pytest.mark.slow
def test_clips_of_unlike_length_need_batches_of_one(clips, train, capsys):
    (clips / "videos/04.mp4").write_bytes(short_clip())
    with pytest.raises(SystemExit) as stop:
        train(data=clips, train_batch_size=2)
    assert stop.value.code == 3
    assert "--train_batch_size 2: the clips differ in length" in capsys.readouterr().err
    assert len(lora_of(train(data=clips))) == 16


def short_clip():
    """An mp4 of five frames."""
    import tempfile
    from pathlib import Path

    from cogvideox.video import write_video

    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "short.mp4", np.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), np.uint8), fps=8)
        return (Path(folder) / "short.mp4").read_bytes()


def test_the_report_says_what_a_user_would_want_to_know(clips, train):
    captions = (clips / "prompts.txt").read_text().splitlines()
    captions[1], captions[2] = "long " * 300, captions[3]
    (clips / "prompts.txt").write_text("\n".join(captions))
    (clips / "videos/05.mp4").write_bytes((clips / "videos/06.mp4").read_bytes())
    folder = train(data=clips, width=32)
    report = (folder / "dataset_report.txt").read_text()
    assert "240x160 49f @24" in report
    assert "6 of 6 clips use less than 90 % of their clip" in report
    assert "6 of 6 clips lose more than 5 % of the picture" in report
    assert "1 captions are longer than 226 tokens" in report
    assert "2 clips have the same content as another: videos/05.mp4, videos/06.mp4" in report
    assert "2 clips share their caption with another" in report
    assert survey.report_text(read_json(folder / "dataset.json")) == report


def test_dataset_json_says_of_each_clip_what_is_trained_and_the_text_report_is_made_from_it(clips, train):
    captions = (clips / "prompts.txt").read_text().splitlines()
    captions[0] = "a <script>alert(1)</script> {{ 7 * 7 }} \x1b[31m"
    (clips / "prompts.txt").write_text("\n".join(captions))
    (clips / "videos/05.mp4").write_bytes(b"")
    folder = train(data=clips, bad_videos="skip", max_bad_share=0.5, eval_share=0.2, id_token="TOK")
    dataset = read_json(folder / "dataset.json")
    assert survey.report_text(dataset) == (folder / "dataset_report.txt").read_text()
    records, _, _ = read_records(clips)
    assert [(clip["line"], clip["path"]) for clip in dataset["clips"]] == [(r.where, r.listed) for r in records]
    assert [clip["caption"] for clip in dataset["clips"]] == [f"TOK {r.caption}" for r in records]
    bad = next(clip for clip in dataset["clips"] if clip["path"] == "videos/05.mp4")
    assert (bad["split"], bad["problem"]) == (None, "empty file")
    usable = [clip for clip in dataset["clips"] if clip is not bad]
    assert sorted(clip["split"] for clip in usable) == ["held out"] + ["trained"] * 4
    assert all((clip["frames"], clip["height"], clip["width"], clip["fps"]) == (9, 32, 48, 8) for clip in usable)
    totals = {name: dataset["totals"][name] for name in ("clips", "usable", "held_out", "buckets")}
    assert totals == {"clips": 6, "usable": 5, "held_out": 1, "buckets": {"9x32x48": 5}}
    page = (folder / "report.html").read_text()
    assert "TOK a &lt;script&gt;alert(1)&lt;/script&gt; {{ 7 * 7 }}" in page
    assert "unusable: empty file" in page


@pytest.mark.slow
def test_the_time_limit_reaches_the_readers(train, monkeypatch, tmp_path, capsys):
    import sys

    from cogvideox import reader

    hanging = lambda workers, seconds: reader.Readers(workers, seconds, command=[sys.executable, "-c", "import time; time.sleep(99)"])  # noqa: E731
    monkeypatch.setattr(script, "Readers", hanging)
    with pytest.raises(SystemExit) as stop:
        train(clip_timeout_seconds=0.5, cache=tmp_path / "cache")
    assert stop.value.code == 3
    assert capsys.readouterr().err.count("not decoded within 0.5 seconds") >= 6


def test_a_random_crop_depends_on_the_seed_and_the_file_alone(six_clips):
    records, _, _ = read_records(six_clips)
    wide = framing(sizes=((48, 32),), reshape_mode="random")
    places = [survey.clip_framing(r, wide, 1).crop_x for r in records]
    assert places == [survey.clip_framing(r, wide, 1).crop_x for r in records]
    assert len(set(places)) > 3
    assert places != [survey.clip_framing(r, wide, 2).crop_x for r in records]


def test_a_caption_in_a_json_table_may_hold_a_line_separator_and_a_row_is_an_object(six_clips, tmp_path):
    for name in ("04.mp4", "05.mp4"):
        (tmp_path / name).symlink_to(six_clips / "videos" / name)
    rows = [{"text": "a rabbit\u2028in the grass", "video": "04.mp4"}, {"text": "a squirrel", "video": "05.mp4"}]
    table = tmp_path / "metadata.jsonl"
    table.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    records, problems, _ = read_records(tmp_path, allow_external_paths=True)
    assert problems == []
    assert [record.caption for record in records] == ["a rabbit in the grass", "a squirrel"]
    table.write_text('["no", "object"]\n')
    assert "metadata.jsonl:1: is no object" in read_records(tmp_path)[1][0]


def test_a_file_that_only_another_machine_sees_is_named_with_the_machine(six_clips, tmp_path):
    records, _, _ = read_records(six_clips)
    framing = survey.Framing(8.0, 5, ((32, 48),))
    gone = dataclasses.replace(records[0], path=str(tmp_path / "not here.mp4"))
    with Readers(1) as readers:
        found = survey.survey_clips([gone, records[1]], framing, 42, tmp_path, readers, show_progress=False)
    assert re.fullmatch(r"cannot be read on \S+ \(No such file or directory\)", found[0]["reason"])
    assert "reason" not in found[1]


# -----------------------------------------------------------------------------
# Loading batches


def test_a_batch_is_made_while_the_one_before_is_in_use():
    made = [threading.Event() for _ in range(4)]

    def batches():
        for number, event in enumerate(made):
            event.set()
            yield number, threading.current_thread() is threading.main_thread()

    ahead = one_ahead(batches(), torch.device("cpu"))
    for number in range(4):
        assert next(ahead) == (number, False)
        assert number == 3 or made[number + 1].wait(10)  # nobody has asked for it yet
        assert number > 1 or not made[number + 2].is_set()  # one, and no more
    assert next(ahead, "the end") == "the end"


def test_an_error_in_the_thread_reaches_the_step_that_needs_the_batch():
    def batches():
        yield 1
        raise FileNotFoundError("an entry")

    ahead = one_ahead(batches(), torch.device("cpu"))
    assert next(ahead) == 1
    with pytest.raises(FileNotFoundError, match="an entry"):
        next(ahead)


class Positions(torch.utils.data.Dataset):
    """Stands for TrainingClips: an item tells its position and whether the main thread has made it."""

    def __getitem__(self, position):
        return {"position": position, "in_main_thread": threading.current_thread() is threading.main_thread()}


@pytest.mark.parametrize(("name", "ahead"), [("cuda:3", True), ("cuda", True), ("cpu", False)])  # one process has no index
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_on_a_gpu_batches_are_made_ahead_in_a_thread_of_its_device(monkeypatch, name, ahead):
    devices = []
    # torch's own function refuses a device without an index; the rest of it needs a GPU.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append(torch.cuda._utils._get_device_index(device)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    device = torch.device(name)
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=device)
    args = SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=1, dataloader_num_workers=0)
    batches = list(script.load_batches(args, accelerator, Positions(), {}, 1, 4))
    assert [batch["position"].tolist() for batch in batches] == [[2, 3], [4, 5], [6, 7]]
    assert {flag for batch in batches for flag in batch["in_main_thread"].tolist()} == {not ahead}
    assert devices == ([3] if ahead else [])


def test_workers_that_would_fill_the_shared_memory_are_not_started(monkeypatch, capsys, tmp_path):
    batch = {"latents": torch.zeros(1024, 256), "prompt": torch.zeros(2**20, dtype=torch.float16)}  # 1 and 2 MiB
    monkeypatch.setattr("dataset.shutil.disk_usage", lambda folder: SimpleNamespace(free=64 * 2**20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert lacking_shared_memory(batch, 2, tmp_path) is None  # 4 processes x 5 batches x 3 MiB
    told = lacking_shared_memory(batch, 3, tmp_path)
    assert "--dataloader_num_workers 3: the batches need 84 MiB of" in told
    assert "64 are free: loading without workers" in told
    assert lacking_shared_memory(batch, 0, tmp_path) is lacking_shared_memory(batch, 3, tmp_path / "no") is None

    started = []
    monkeypatch.setattr("train_cogvideox_lora.DataLoader", lambda clips, num_workers, **settings: started.append(num_workers) or [])
    monkeypatch.setattr("train_cogvideox_lora.lacking_shared_memory", lambda batch, workers: "too small" if workers > 2 else None)
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    for workers in (2, 3):
        args = SimpleNamespace(train_batch_size=1, gradient_accumulation_steps=1, dataloader_num_workers=workers)
        script.load_batches(args, accelerator, Positions(), batch, 0, 2)
    assert started == [2, 0]
    assert capsys.readouterr().err == "warning: too small\n"
