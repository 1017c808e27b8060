"""Images of image-to-video training: listed and checked with the clips, and encoded with noise beside them."""

import io
import json
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import train_cogvideox_lora as script
from cogvideox import encodings, memory, survey
from cogvideox.decode import Framing, clip_framing, image_request, other_shots, read_clip
from cogvideox.files import entry_path, key_of
from cogvideox.folder import COGVIDEOX_2B, open_model, unread_images
from cogvideox.model import encode_pixels, load_vae
from cogvideox.reader import Readers
from dataset import files_left_out, list_clips, read_records
from tests.conftest import lora_of, same, words
from tests.test_encodings import times
from tools import cache as cache_tool
from tools import check_dataset

CPU = torch.device("cpu")


def framing(**settings):
    return Framing(**({"fps": 8, "max_num_frames": 9, "sizes": ((32, 48),)} | settings))


def picture(seed=0, size=(96, 64)):
    """A smooth random picture."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def pictured(clips):
    """Six clips with an image each, in images.txt."""
    (clips / "images").mkdir()
    for number in range(6):
        picture(number).save(clips / f"images/{number}.png")
    (clips / "images.txt").write_text("".join(f"images/{number}.png\n" for number in range(6)))
    return clips


# -----------------------------------------------------------------------------
# Lists


def test_images_pair_with_clips_line_by_line_and_without_the_flag_there_are_none(pictured):
    records, problems, _ = read_records(pictured, image_column="images.txt")
    assert problems == []
    assert [record.image for record in records] == [str(pictured / f"images/{number}.png") for number in range(6)]
    assert [record.image for record in read_records(pictured)[0]] == [None] * 6
    args = SimpleNamespace(caption_column=None, video_column=None, image_column="images.txt", encoding_cache_dir="/no")
    args.instance_data_root, args.eval_data_root, args.prior_data_root = str(pictured), None, None
    assert files_left_out(args, pictured, records, "line files") == []
    args.image_column = None
    assert len(files_left_out(args, pictured, read_records(pictured)[0], "line files")) == 7


def test_every_mistake_in_a_list_of_images_is_named_with_its_line(pictured, tmp_path):
    picture().save(tmp_path / "outside.png")
    (pictured / "empty.png").touch()
    lines = ["images/gone.png", "videos/04.mp4", "../outside.png", "empty.png", "images", "images/5.png"]
    (pictured / "images.txt").write_text("\n".join(lines) + "\n")
    records, problems, _ = read_records(pictured, image_column="images.txt")
    assert problems == []
    reasons = ["no such file", "not an image by its name", "outside the data folder", "empty file", "not a regular file"]
    for number, (record, line, reason) in enumerate(zip(records, lines, reasons, strict=False), 1):
        assert record.where == f"videos.txt:{number}"
        assert record.reason.startswith(f"its image {line}: {reason}")
    assert records[5].reason is None
    allowed = read_records(pictured, allow_external_paths=True, image_column="images.txt")[0]
    assert [record.reason is None for record in allowed] == [False, False, True, False, False, True]


def test_a_clip_and_its_image_that_are_both_missing_are_both_named(pictured):
    (pictured / "videos/02.mp4").unlink()
    (pictured / "images/0.png").unlink()
    [reason] = {record.reason for record in read_records(pictured, image_column="images.txt")[0]} - {None}
    assert reason.startswith("no such file; its image images/0.png: no such file")


def test_another_number_of_images_and_empty_lines_are_named(pictured):
    (pictured / "images.txt").write_text("images/0.png\n\nimages/2.png\nimages/3.png\n")
    records, problems, _ = read_records(pictured, image_column="images.txt")
    assert "images.txt has 4 lines, videos.txt 6" in problems[0]
    assert problems[1] == "images.txt:2: empty line; every clip needs an image"
    assert [(record.where, record.image[-5:]) for record in records] == [(f"videos.txt:{n}", f"{n - 1}.png") for n in (1, 3, 4)]
    [problem] = read_records(pictured, image_column="image.txt")[1]
    assert "image.txt: no such file" in problem
    assert "there is images.txt" in problem


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_column_of_a_table_names_the_images(pictured, kind):
    rows = [{"video": "videos/02.mp4", "text": "a", "still": "images/1.png"}, {"video": "videos/04.mp4", "text": "b", "still": ""}]
    text = "video,text,still\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    (pictured / f"table.{kind}").write_text(text if kind == "csv" else "\n".join(map(json.dumps, rows)))
    records, problems, _ = read_records(pictured / f"table.{kind}", image_column="still")
    assert [record.image for record in records] == [str(pictured / "images/1.png")]
    assert problems == [f"table.{kind}:{3 if kind == 'csv' else 2}: empty still"]
    [problem] = read_records(pictured / f"table.{kind}", image_column="image")[1]
    assert "no column image (it has: video, text, still)" in problem
    assert len(read_records(pictured / f"table.{kind}")[0]) == 2


def test_images_of_the_datasets_package_are_written_to_the_cache_once(pictured, tmp_path, monkeypatch):
    class ImageFeature:
        def __init__(self, decode=True):
            self.decode = decode

    class Rows(list):
        column_names, features = ["text", "video", "still"], {"video": "string", "still": ImageFeature()}

        def cast_column(self, column, feature):
            assert (column, feature.decode) == ("still", False)
            return self

    content = io.BytesIO()
    picture(9).save(content, "JPEG")
    rows = Rows({"text": "a", "video": str(pictured / "videos/02.mp4"), "still": {"bytes": content.getvalue(), "path": None}} for _ in "ab")
    package = SimpleNamespace(load_dataset=lambda *args, **settings: rows, Video=type("Video", (), {}), Image=ImageFeature)
    monkeypatch.setitem(__import__("sys").modules, "datasets", package)
    args = SimpleNamespace(dataset_name="some/clips", dataset_config_name=None, cache_dir=None, caption_column=None, video_column=None)
    args.id_token, args.image_column, args.encoding_cache_dir = None, "still", str(tmp_path)
    records, problems, _ = list_clips(args)
    assert problems == []
    assert records[0].image == records[1].image
    frames, _ = read_clip(records[0].image, framing())
    assert np.abs(frames[0].astype(int) - np.asarray(picture(9).resize((48, 32)))).mean() < 6


def test_a_folder_with_a_text_file_for_each_clip_refuses_images_in_words(pictured):
    for clip, caption in zip(sorted((pictured / "videos").iterdir()), (pictured / "prompts.txt").read_text().splitlines(), strict=True):
        clip.with_suffix(".txt").write_text(caption)
    (pictured / "prompts.txt").unlink()
    _, [problem], layout = read_records(pictured, image_column="images.txt")
    assert layout == "videos with a text file each"
    assert problem.startswith("--image_column images.txt: ")
    assert problem.endswith("has no list of clips to which an image could be assigned; use prompts.txt and videos.txt, or a table")
    assert read_records(pictured)[1] == []


def refused(capsys, **flags):
    """What the flags are refused with."""
    with pytest.raises(SystemExit) as stop:
        script.parse_args(words("m", "d", "o", "c", **flags))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_windows_of_a_clip_share_no_image(capsys):
    for kind in ("slide", "spread"):
        assert f"--image_column images.txt: unsupported with --windows {kind}" in refused(capsys, windows=kind, image_column="images.txt")
    script.parse_args(words("m", "d", "o", "c", image_column="images.txt"))
    script.parse_args(words("m", "d", "o", "c", windows="slide"))


def test_all_validation_prompts_have_one_image_or_each_its_own(capsys):
    told = refused(capsys, validation_prompt="a:::b:::c", validation_images="1.png:::2.png")
    assert "--validation_images 1.png:::2.png: 2 images for 3 prompts; give one for all, or one for each, joined by :::" in told
    assert script.parse_args(words("m", "d", "o", "c", validation_prompt="a:::b", validation_images="1.png ::: 2.png")).image_files == [
        "1.png",
        "2.png",
    ]
    [note] = script.notes_on_flags(script.parse_args(words("m", "d", "o", "c", validation_images="one.png", eval_clips=4)))
    assert "--validation_images one.png (there is no --validation_prompt)" in note


def test_images_for_a_text_to_video_model_are_refused():
    args = script.parse_args(words("m", "d", "o", "c", image_column="images.txt"))
    [problem], notes = unread_images(args, COGVIDEOX_2B)
    assert notes == []
    assert problem.startswith("--image_column images.txt: would do nothing, because this model is text-to-video")
    assert unread_images(args, SimpleNamespace(image_channels=16)) == ([], [])


def test_a_dropout_of_images_that_a_text_to_video_model_does_not_read_is_noted_as_idle(tiny_model, capsys):
    args = script.parse_args(words(tiny_model, "d", "o", "c", noised_image_dropout=0.1))
    assert open_model(args)[3] == []
    assert "--noised_image_dropout 0.1" in capsys.readouterr().err
    problems, [note] = unread_images(args, COGVIDEOX_2B)
    assert problems == []
    assert note == "flags that do nothing here: --noised_image_dropout 0.1 (this model is text-to-video and reads no image)"
    assert unread_images(args, SimpleNamespace(image_channels=16)) == ([], [])
    assert unread_images(script.parse_args(words("m", "d", "o", "c")), COGVIDEOX_2B) == ([], [])


# -----------------------------------------------------------------------------
# Checking


@pytest.mark.slow
def test_images_are_decoded_in_the_size_and_crop_of_their_clips(pictured, tmp_path):
    (pictured / "images/1.png").write_bytes(b"no picture")
    pictures = [picture(seed) for seed in range(3)]
    pictures[0].save(pictured / "images/2.webp", save_all=True, append_images=pictures[1:], duration=100)
    (pictured / "images.txt").write_text((pictured / "images.txt").read_text().replace("2.png", "2.webp"))
    records, wide = read_records(pictured, image_column="images.txt")[0], framing(sizes=((32, 32), (32, 96)), reshape_mode="random")
    with Readers(1, 60) as readers:
        clips = survey.survey_clips(records, wide, 1, tmp_path, readers, show_progress=False)
        images = survey.survey_images(records, clips, wide, 1, tmp_path, readers, show_progress=False)
        assert survey.survey_images(read_records(pictured)[0], clips, wide, 1, tmp_path, readers, show_progress=False) == [None] * 6
    assert [(image["height"], image["width"]) for image in images[3:]] == [(clip["height"], clip["width"]) for clip in clips[3:]]
    share = clip_framing(records[3], wide, 1).crop_x, clip_framing(records[4], wide, 1).crop_x
    assert share[0] != share[1]
    edges = [images[n]["box"][0] / (images[n]["source_width"] - images[n]["box"][2] + images[n]["box"][0]) for n in (3, 4)]
    assert edges == pytest.approx(share)
    clips = survey.without_bad_images(clips, images)
    bad = survey.unusable(records, clips)
    assert [problem.partition(": its image ")[0] for problem in bad] == [f"videos.txt:{n}: {records[n - 1].listed}" for n in (2, 3)]
    assert f"{pictured}/images/1.png: not a readable image" in bad[0]
    assert f"{pictured}/images/2.webp: an animation of 3 pictures; give one" in bad[1]
    readings = survey.read_captions(None, None, records)
    described = survey.describe(records, clips, readings, 226, wide, images=images)["clips"]
    assert described[3]["notes"][-1].startswith("image 3.png: 96x64, cut ")
    assert not any("image" in note for clip in survey.describe(records, clips, readings, 226, wide)["clips"] for note in clip["notes"])


def cut(frames, at, shift=90):
    """The frames, with other grey levels before frame `at`."""
    frames = frames.copy()
    frames[:at] = (frames[:at].astype(int) + shift) % 256
    return frames


def test_frames_of_another_shot_are_found_at_both_ends_and_not_where_a_clip_only_moves(tmp_path):
    moving = np.stack([np.roll(np.asarray(picture(1)), 2 * k, axis=1) for k in range(17)])
    assert other_shots(moving) == (0, 0)
    for count in (1, 2, 3):
        assert other_shots(cut(moving, count)) == (count, 0)
        assert other_shots(cut(moving, 17 - count)) == (0, count)
    assert other_shots(cut(cut(moving, 2), 16)) == (2, 1)
    assert other_shots(cut(moving, 4)) == other_shots(cut(moving, 8)) == other_shots(moving[:5]) == (0, 0)
    assert other_shots(cut(moving, 1, shift=10)) == (0, 0)
    finer = np.stack([np.roll(np.asarray(picture(1)), k, axis=1) for k in range(34)])
    pictures = [Image.fromarray(frame) for frame in cut(finer, 4)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=62, lossless=True)
    _, facts = read_clip(tmp_path / "a.webp", framing(max_num_frames=17, sizes=((64, 96),)))
    assert (facts["shot_before"], facts["shot_after"]) == (4, 0)  # frames of the source
    frames, facts = read_clip(tmp_path / "a.webp", framing(max_num_frames=17, sizes=((64, 96),), skip_frames_start=facts["shot_before"]))
    assert (facts["shot_before"], facts["indices"][0]) == (0, 4)
    assert other_shots(frames) == (0, 0)


def test_the_report_names_clips_that_begin_or_end_with_another_shot():
    clips = [{"path": name, "shot_before": before, "shot_after": after} for name, before, after in (("a", 3, 0), ("b", 0, 0), ("c", 6, 2))]
    begin, end = survey.shot_remarks(clips, "one")
    assert begin.startswith("2 clips begin with frames that seem to be of the shot before")
    assert "--skip_frames_start 6" in begin
    assert begin.endswith("a, c")
    assert end.startswith("1 clips end with frames")
    assert list(survey.shot_remarks(clips[1:2], "one")) == []
    begin, _ = survey.shot_remarks(clips, "slide")
    assert "--skip_frames_start" not in begin  # which is refused then
    assert "FILE | START-END" in begin


@pytest.mark.parametrize(("latents_per_patch", "told"), [(1, False), (2, True)])
def test_the_report_names_clips_of_lengths_that_the_model_was_not_trained_on(latents_per_patch, told):
    plain = dict.fromkeys(("repeated_frames", "cropped_percent", "stretch_percent"), 0) | {"used_percent": 100, "split": "trained"}
    plain |= {"is_caption_cut": False, "caption": "", "line": "1"}
    plain |= dict.fromkeys(("source_height", "source_width", "height", "width"), 64)
    clips = [plain | {"path": f"{frames} frames", "frames": frames} for frames in (1, 17, 25, 33, 41)]
    totals = {"buckets": {}, "seconds": 1.0, "source_seconds": 1.0}
    found = list(survey.remarks(clips, clips, totals, 226, framing(latents_per_patch=latents_per_patch)))
    assert any(one.startswith("2 of 5 clips have a length") and one.endswith("25 frames, 41 frames") for one in found) is told
    assert any("16N + 1" in one for one in found) is told


@pytest.mark.slow
def test_check_dataset_checks_and_shows_images(pictured, tmp_path, capsys):
    line = [str(pictured), "--height", "32", "--width", "48", "--max_num_frames", "9", "--encoding_cache_dir", str(tmp_path / "cache")]
    check_dataset.main([*line, "--sheet", str(tmp_path / "plain.png")])
    assert "image 0.png" not in capsys.readouterr().out
    check_dataset.main([*line, "--sheet", str(tmp_path / "sheet.png"), "--image_column", "images.txt"])
    assert "image 0.png: 96x64, cut 0%" in capsys.readouterr().out
    sheets = [Image.open(tmp_path / name) for name in ("plain.png", "sheet.png")]
    assert sheets[1].size == sheets[0].size  # narrow strips
    shown, plain = (np.asarray(sheet)[36:68, 4:52].astype(int) for sheet in reversed(sheets))
    expected = np.asarray(Image.open(pictured / "images/0.png").resize((48, 32), Image.Resampling.BICUBIC))
    assert np.abs(shown - expected).max() <= 1
    assert np.abs(plain - expected).mean() > 10
    (pictured / "images/3.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        check_dataset.main([*line, "--sheet", str(tmp_path / "sheet.png"), "--image_column", "images.txt"])
    assert stop.value.code == 3
    assert "images/3.png: not a readable image" in capsys.readouterr().err


def test_check_dataset_refuses_sizes_that_the_model_refuses_and_notes_what_it_was_not_made_for(
    image_model, temporal_patch_model, clips, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(check_dataset, "look", lambda *arguments: ([], [], []))
    line = [str(clips), "--encoding_cache_dir", str(tmp_path / "cache")]

    def told(*words):
        with pytest.raises(SystemExit) as stop:
            check_dataset.main([*line, *words])
        assert stop.value.code == 2
        return capsys.readouterr().err

    of_image = ["--pretrained_model_name_or_path", str(image_model)]
    assert "--height 48, --width 48: this model has learned positions, for 32 x 48 only" in told(*of_image, "--height", "48")
    assert "--max_num_frames 13: this model needs 8k + 1 frames" in told(
        "--pretrained_model_name_or_path", str(temporal_patch_model), "--max_num_frames", "13"
    )
    assert "--bucket 33: this model needs multiples of 16" in told(
        "--pretrained_model_name_or_path", str(temporal_patch_model), "--bucket", "33x48"
    )
    check_dataset.main([*line, *of_image, "--max_num_frames", "5", "--fps", "4"])
    noted = capsys.readouterr().err
    assert "5 frames: they get the first of this model's learned positions" in noted
    assert "--fps 4: this model was made for 8 frames a second" in noted
    check_dataset.main([*line, *of_image])
    assert "this model" not in capsys.readouterr().err
    check_dataset.main([*line, "--height", "32", "--width", "48"])  # without a model the data may be another one's
    assert "this model" not in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Encoding


def test_sigmas_are_the_mid_quantiles_of_the_authors_distribution():
    logs = [math.log(encodings.image_sigma(draw)) for draw in range(encodings.IMAGE_DRAWS)]
    normal = statistics.NormalDist(-3.0, 0.5)
    assert [normal.cdf(value) for value in logs] == pytest.approx([(draw + 0.5) / 8 for draw in range(8)])
    assert statistics.fmean(logs) == pytest.approx(-3.0)
    assert 0.4 < statistics.pstdev(logs) < 0.5


FACTS = {"sha256": "a", "indices": [4, 7], "height": 32, "width": 48, "box": [0.0, 0.0, 9.0, 9.0], "reader": "decord", "treatment": {}}


def test_every_setting_that_changes_an_image_changes_its_name_and_what_comes_after_the_first_frame_does_not(monkeypatch):
    base = (FACTS, "vae", torch.float32, False)
    changes = {"sha256": "b", "indices": [5, 7], "height": 48, "width": 32, "box": [1.0, 0.0, 9.0, 9.0], "reader": "pyav"}
    others = [(FACTS | {name: value}, *base[1:]) for name, value in changes.items()]
    others += [(FACTS | {"treatment": {"background": "#000000"}}, *base[1:]), (*base, "libavcodec 62"), (FACTS, "vae2", *base[2:])]
    others += [(*base[:2], torch.bfloat16, False), (*base[:3], True)]
    assert len({encodings.image_key(*each) for each in [base, *others]}) == 12
    assert encodings.image_key(FACTS | {"indices": [4, 8], "frames": 5}, *base[1:]) == encodings.image_key(*base)
    before = encodings.image_key(*base)
    for name, value in {"IMAGE_DRAWS": 4, "IMAGE_NOISE": (-3.0, 0.6)}.items():
        with monkeypatch.context() as patch:
            patch.setattr(encodings, name, value)
            assert encodings.image_key(*base) != before


@pytest.fixture(scope="module")
def vae(tiny_model):
    return load_vae(tiny_model, CPU)


@torch.no_grad()
def test_a_draw_is_the_posterior_of_the_noised_picture_as_the_pipeline_encodes_it(vae):
    frame = np.asarray(picture(3, size=(48, 32)))
    moments = encodings.encode_image(vae, frame, "content")
    assert moments.shape == (8, 32, 4, 6)
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1).float() / 127.5 - 1
    for draw in (0, 7):
        noise = torch.randn(3, 1, 32, 48, generator=encodings.seeded_generator("image noise", "content", draw))[:, 0]
        image = (pixels + encodings.image_sigma(draw) * noise)[None, :, None]  # [1, 3, 1, H, W], as prepare_latents has it
        assert torch.equal(vae.encode(image).latent_dist.parameters[0, :, 0], moments[draw])
    clean = encode_pixels(vae, pixels[:, None])[:, 0]
    far = [(moments[draw] - clean)[:16].pow(2).mean().item() for draw in range(8)]
    assert 0 < 4 * far[0] < far[7]  # sigma is 0.023 and 0.107


def test_another_picture_another_key_and_another_draw_give_another_encoding(vae):
    frame = np.asarray(picture(3, size=(48, 32)))
    moments = encodings.encode_image(vae, frame, "content")
    assert torch.equal(encodings.encode_image(vae, frame, "content"), moments)
    others = [encodings.encode_image(vae, frame, "other"), encodings.encode_image(vae, frame[:, ::-1], "content")]
    others += [encodings.encode_image(vae, np.asarray(picture(4, size=(48, 32))), "content")]
    for number, draw in enumerate(moments):
        assert not any(torch.equal(draw, other[number]) for other in others)
        assert not any(torch.equal(draw, other) for other in moments[number + 1 :])


def test_an_image_is_encoded_whole_beside_clips_in_tiles(tiny_model, vae):
    tiled = load_vae(tiny_model, CPU, tiling=True)
    tiled.tile_sample_min_height = tiled.tile_sample_min_width = 32
    tiled.tile_latent_min_height = tiled.tile_latent_min_width = 4
    frame = np.asarray(picture(3, size=(64, 48)))
    assert torch.equal(encodings.encode_image(tiled, frame, "content"), encodings.encode_image(vae, frame, "content"))
    assert tiled.use_tiling
    video = torch.from_numpy(frame.copy()).permute(2, 0, 1)[:, None].float() / 127.5 - 1
    with pytest.raises(ValueError, match="tiles do not fit this size"):  # in tiles it would have been told
        encode_pixels(tiled, video)


@pytest.mark.slow
def test_the_prediction_of_encoding_counts_a_whole_image_beside_clips_in_tiles():
    args = script.parse_args(words("m", "d", "o", "c", height=768, width=1360, max_num_frames=9))
    image, plain = memory.PRESETS["5b-i2v"], memory.PRESETS["5b"]
    assert memory.encoding_bytes(plain, args, room=0) < memory.encoding_bytes(image, args, room=0)
    assert memory.encoding_bytes(image, args, room=0) == sum(memory.vae_bytes(image, "encode", (1, 768, 1360), tiling=False))
    assert memory.encoding_bytes(image, args) == memory.encoding_bytes(plain, args) > memory.encoding_bytes(image, args, room=0)


class Run:
    """The data of a run, checked and encoded."""

    def __init__(self, model, data, tmp_path, cache="cache", **flags):
        self.cache = tmp_path / cache
        args = self.args = script.parse_args(words(model, data, tmp_path / "output", self.cache, **flags))
        self.folder, self.facts, tokenizer, problems = open_model(args)
        assert problems == []
        self.said, accelerator = [], Accelerator(cpu=True)
        with Readers(1, 60) as readers, pytest.MonkeyPatch.context() as patch:
            patch.setattr(encodings, "say", self.said.append)
            self.data = survey.check_data(args, self.facts, tokenizer, readers, accelerator, lambda: None)
            if not self.data.problems:
                found = encodings.encode_data(args, self.folder, self.facts, tokenizer, self.data, readers, accelerator, lambda: None)
                self.encodings, self.identities = found

    def image_of(self, clip):
        """The picture of a clip's image, decoded alone."""
        facts = self.data.clips[clip]
        frames, _ = read_clip(*image_request(self.data.records[clip], self.data.framing, 42, (facts["height"], facts["width"])))
        return frames[0]

    def expected(self, clip, flipped=False):
        """What the cache should hold of a clip's image."""
        facts, frame = self.data.images[clip] or self.data.clips[clip], self.image_of(clip)
        content = key_of(encodings.image_content(facts))
        return encodings.encode_image(load_vae(self.folder, CPU), frame[:, ::-1] if flipped else frame, content)


@pytest.mark.slow
def test_the_cache_holds_each_image_and_its_mirror_image_and_is_filled_once(
    image_model, six_clips, pictured, tmp_path, monkeypatch, capsys
):
    run = Run(image_model, six_clips, tmp_path, random_flip=True)
    assert "0 of 12 clips, 0 of 12 images and 0 of 7 captions are cached" in run.said[0]
    for flipped in (False, True):
        assert torch.equal(run.encodings.image(1, flipped), run.expected(1, flipped))
        assert not torch.equal(run.encodings.image(1, flipped), run.encodings.image(2, flipped))
        assert not torch.equal(run.encodings.image(1, flipped), run.encodings.image(1, not flipped))
    assert np.array_equal(run.image_of(1), read_clip(run.data.records[1].path, run.data.framing)[0][0])

    before = times(run.cache)
    own = Run(image_model, pictured, tmp_path, random_flip=True, image_column="images.txt")
    assert "12 of 12 clips, 0 of 12 images and 7 of 7 captions are cached" in own.said[0]
    assert {name.partition("/")[0] for name in times(run.cache).keys() - before.keys()} == {"images"}
    assert all(torch.equal(own.encodings.image(1, flipped), own.expected(1, flipped)) for flipped in (False, True))
    assert not torch.equal(own.encodings.image(1), run.encodings.image(1))
    assert torch.equal(own.encodings.moments(1), run.encodings.moments(1))
    assert own.identities["clips"] != run.identities["clips"]
    assert own.identities["transformer"] == run.identities["transformer"]

    monkeypatch.setattr(encodings, "load_vae", None)
    monkeypatch.setattr(Readers, "read", None)  # nothing is decoded
    again = Run(image_model, pictured, tmp_path, random_flip=True, image_column="images.txt")
    assert "12 of 12 clips, 12 of 12 images and 7 of 7 captions are cached" in again.said[0]
    assert again.identities == own.identities


@pytest.mark.slow
def test_lost_and_damaged_images_are_made_again_to_the_bit_and_clips_are_not(image_model, six_clips, tmp_path):
    run = Run(image_model, six_clips, tmp_path)
    paths = [entry_path(run.cache, "images", key) for key in run.encodings.image_keys]
    content, before = [path.read_bytes() for path in paths], times(run.cache)
    assert len(set(paths)) == 6
    paths[0].unlink()
    paths[1].write_bytes(content[1][:1000])
    Run(image_model, six_clips, tmp_path)
    assert [path.read_bytes() for path in paths] == content
    changed = {name for name, time in times(run.cache).items() if before[name] != time}
    assert changed == {str(path.relative_to(run.cache)) for path in paths[:2]}


@pytest.mark.slow
def test_a_full_disk_at_an_image_is_told_and_the_next_run_goes_on(image_model, six_clips, tmp_path, monkeypatch, capsys):
    write, stored = encodings.write_entry, []

    def last(path, tensor):
        if "images" in path.parts and len(stored) == 2:
            raise OSError(28, "No space left on device")
        stored.extend([path] if "images" in path.parts else [])
        write(path, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(encodings, "write_entry", last)
        with pytest.raises(SystemExit) as stop:
            Run(image_model, six_clips, tmp_path)
    assert stop.value.code == 4
    assert "could not be stored (No space left on device)" in capsys.readouterr().err
    assert "3 of 6 clips, 2 of 6 images" in Run(image_model, six_clips, tmp_path).said[0]


@pytest.mark.slow
def test_the_image_of_a_window_is_its_own_first_frame(image_model, clips, tmp_path):
    (clips / "videos.txt").write_text("videos/04.mp4\nvideos/04.mp4 | 0.5-1.9\n")
    (clips / "prompts.txt").write_text("one\ntwo\n")
    run = Run(image_model, clips, tmp_path)
    assert run.data.clips[1]["indices"][0] > run.data.clips[0]["indices"][0] == 0
    assert not np.array_equal(run.image_of(0), run.image_of(1))
    for clip in (0, 1):
        assert torch.equal(run.encodings.image(clip), run.expected(clip))
    skipped = Run(image_model, clips, tmp_path, skip_frames_start=3)
    assert not np.array_equal(skipped.image_of(0), run.image_of(0))
    assert torch.equal(skipped.encodings.image(0), skipped.expected(0))


@pytest.mark.slow
def test_a_text_to_video_model_has_no_images_and_its_runs_keep_their_identity(tiny_model, six_clips, tmp_path):
    run = Run(tiny_model, six_clips, tmp_path)
    assert "0 of 6 clips and 0 of 7 captions are cached" in run.said[0]
    assert not (run.cache / "images").exists()
    assert run.encodings.image_keys == ()
    captions = [run.encodings.caption_keys[record.caption] for record in run.data.records]
    vae, dtype = encodings.identify(run.folder, "vae", run.cache)
    keys = [encodings.clip_key(clip, vae, dtype, True, False, False) for clip in run.data.clips]
    assert run.identities["clips"] == key_of([keys], captions)  # the formula before there were images


@pytest.mark.slow
def test_a_bad_image_makes_its_clip_unusable_and_may_be_skipped(image_model, pictured, tmp_path):
    (pictured / "images/2.png").write_bytes(b"no picture")
    (pictured / "images/4.png").unlink()
    run = Run(image_model, pictured, tmp_path, image_column="images.txt")
    assert [problem.split(": its image")[0] for problem in run.data.problems] == [
        f"videos.txt:{n}: {listed}" for n, listed in ((3, "videos/05.mp4"), (5, "videos/07.mp4"))
    ]
    run = Run(image_model, pictured, tmp_path, image_column="images.txt", bad_videos="skip", max_bad_share=0.5)
    assert run.data.problems == []
    assert [record.image[-5:] for record in run.data.records] == [f"{n}.png" for n in (0, 1, 3, 5)]
    assert torch.equal(run.encodings.image(2), run.expected(2))


@pytest.mark.slow
def test_validation_images_are_those_given_or_those_of_the_first_held_out_clips_in_turn(image_model, pictured, tmp_path):
    flags = {"validation_prompt": "a:::b:::c", "eval_share": 0.4, "image_column": "images.txt"}
    run = Run(image_model, pictured, tmp_path, **flags)
    assert len(run.data.held_out) == 2
    first, second, third = run.data.validation_images
    assert np.array_equal(first, run.image_of(run.data.held_out[0]))
    assert np.array_equal(second, run.image_of(run.data.held_out[1]))
    assert np.array_equal(third, first)
    assert not np.array_equal(second, first)
    trained = Run(image_model, pictured, tmp_path, **flags | {"eval_share": 0.0, "image_column": None})
    assert np.array_equal(trained.data.validation_images[1], trained.image_of(trained.data.own[1]))
    picture(11, size=(70, 40)).save(tmp_path / "given.png")
    expected, _ = read_clip(tmp_path / "given.png", framing())
    for count in (1, 3):  # one for all, one for each
        given = ":::".join([str(tmp_path / "given.png")] * count)
        own = Run(image_model, pictured, tmp_path, **flags | {"validation_images": given})
        assert len(own.data.validation_images) == 3
        assert all(np.array_equal(image, expected[0]) for image in own.data.validation_images)
    assert not np.array_equal(expected[0], first)
    random = Run(image_model, pictured, tmp_path, **flags | {"validation_images": given, "video_reshape_mode": "random"})
    assert np.array_equal(random.data.validation_images[0], expected[0])  # clips are cropped elsewhere, but not what the card names
    assert not np.array_equal(read_clip(tmp_path / "given.png", framing(reshape_mode="random", crop_x=0.0))[0][0], expected[0])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    wrong = ":::".join(map(str, (tmp_path / "gone.png", tmp_path / "broken.png", pictured / "videos/02.mp4")))
    gone, broken, video = Run(image_model, pictured, tmp_path, **flags | {"validation_images": wrong}).data.problems
    assert gone == f"--validation_images: {tmp_path / 'gone.png'}: no such file"
    assert broken.startswith(f"--validation_images: {tmp_path / 'broken.png'}: not a readable image")
    assert "02.mp4: not an image by its name" in video
    [once] = Run(image_model, pictured, tmp_path, **flags | {"validation_images": str(tmp_path / "gone.png")}).data.problems
    assert once == gone  # one file for three prompts


@pytest.mark.parametrize(("validation_prompt", "told"), [("a:::b", True), (None, False)])
def test_validation_images_that_are_not_there_are_told_before_a_clip_is_decoded(
    validation_prompt, told, image_model, pictured, tmp_path, capsys, monkeypatch
):
    def decode(*arguments):
        raise InterruptedError

    monkeypatch.setattr(script, "check_data", decode)
    flags = {"validation_prompt": validation_prompt, "validation_images": str(tmp_path / "gone.png"), "cpu": True}
    with pytest.raises(SystemExit if told else InterruptedError) as stop:
        script.main(script.parse_args(words(image_model, pictured, tmp_path / "output", tmp_path / "cache", **flags)))
    assert capsys.readouterr().err.count(f"--validation_images: {tmp_path / 'gone.png'}: no such file") == told
    assert not told or stop.value.code == 2


@pytest.mark.slow
def test_a_run_trains_on_its_images(train, image_model, pictured, tmp_path, capsys):
    first = train(model=image_model, data=pictured, cache=tmp_path / "cache", noised_image_dropout=0.0)
    own = train(model=image_model, data=pictured, cache=tmp_path / "cache", noised_image_dropout=0.0, image_column="images.txt")
    again = train(model=image_model, data=pictured, cache=tmp_path / "cache", noised_image_dropout=0.0, image_column="images.txt")
    assert same(lora_of(own), lora_of(again))
    assert not same(lora_of(own), lora_of(first))
    capsys.readouterr()
    cache_tool.main(["list", str(tmp_path / "cache")])
    assert "12 images (moments)" in " ".join(capsys.readouterr().out.split())
    bad = next((tmp_path / "cache/images").rglob("*.safetensors"))
    bad.write_bytes(bad.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(SystemExit) as stop:
        cache_tool.main(["check", str(tmp_path / "cache")])
    assert stop.value.code == 1
    assert f"{bad.relative_to(tmp_path / 'cache')}: its content is not what was stored" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_check_and_encode_images_as_one_does(forked, image_model, pictured, tmp_path):
    one = Run(image_model, pictured, tmp_path, image_column="images.txt")
    flags = {"image_column": "images.txt", "validation_prompt": "a", "max_train_steps": 1}
    line = words(image_model, pictured, tmp_path / "two", tmp_path / "other", **flags)
    codes, output = forked.run(line, processes=2)
    assert codes == [0, 0], output[-3000:]
    assert "0 of 6 images" in output
    entries = [
        {path.name: path.read_bytes() for path in (cache / "images").rglob("*.safetensors")} for cache in (one.cache, tmp_path / "other")
    ]
    assert entries[0] == entries[1]
    assert len(entries[0]) == 6
    (pictured / "images/4.png").write_bytes(b"no picture")  # the last line of one rank
    (pictured / "images/5.png").unlink()  # of the other
    codes, output = forked.run([*line, "--overwrite_output_dir"], processes=2)
    assert codes == [3, 3], output[-3000:]
    assert "images/4.png: not a readable image" in output
    assert "its image images/5.png: no such file" in output
