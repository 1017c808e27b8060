"""The cache of encodings: right or not found, whole or not there, filled once, by one process or many."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import train_cogvideox_lora as script
from cogvideox import encodings, survey
from tests.conftest import ROOT, environment, lora_of, same, words
from tests.stand_ins import LateNames
from tools import cache as cache_tool
from tools.processes import family, strike


def content(cache):
    """name -> bytes of every entry."""
    return {
        str(p.relative_to(cache)): p.read_bytes() for kind in ("clips", "captions") for p in Path(cache).rglob(f"{kind}/*/*.safetensors")
    }


def times(cache):
    """name -> when it was written."""
    return {str(p.relative_to(cache)): p.stat().st_mtime_ns for p in Path(cache).rglob("*/??/*.safetensors")}


@pytest.mark.slow
def test_a_full_cache_needs_neither_t5_nor_the_vae(train, tiny_model, tmp_path, monkeypatch):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    first = train(model=model, cache=tmp_path / "cache")
    before = times(tmp_path / "cache")
    for part in ("text_encoder", "vae"):
        for file in (model / part).glob("*.safetensors"):
            file.unlink()
    second = train(model=model, cache=tmp_path / "cache", learning_rate=1e-3)
    assert not same(lora_of(first), lora_of(second))
    assert times(tmp_path / "cache") == before


@pytest.mark.slow
def test_weights_that_are_gone_and_needed_are_told_in_a_sentence(train, tiny_model, tmp_path, clips, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    train(model=model, data=clips, cache=tmp_path / "cache")
    (model / "text_encoder/model.safetensors").unlink()
    (clips / "prompts.txt").write_text((clips / "prompts.txt").read_text().replace("bird", "crow"))
    with pytest.raises(SystemExit) as stop:
        train(model=model, data=clips, cache=tmp_path / "cache")
    assert stop.value.code == 2
    assert "text_encoder: no safetensors weights; 1 captions need them" in capsys.readouterr().err


@pytest.mark.slow
def test_editing_one_caption_encodes_exactly_one_entry(train, clips, tmp_path):
    train(data=clips, cache=tmp_path / "cache")
    before = times(tmp_path / "cache")
    lines = (clips / "prompts.txt").read_text().splitlines()
    lines[3] += " at night"
    (clips / "prompts.txt").write_text("\n".join(lines) + "\n")
    train(data=clips, cache=tmp_path / "cache")
    after = times(tmp_path / "cache")
    assert len(set(after) - set(before)) == 1
    assert next(iter(set(after) - set(before))).startswith("captions/")
    assert all(after[name] == before[name] for name in before)


@pytest.mark.slow
def test_changing_the_height_encodes_all_clips_again_and_keeps_the_old(train, tmp_path):
    train(cache=tmp_path / "cache")
    before = times(tmp_path / "cache")
    train(cache=tmp_path / "cache", height=48)
    middle = times(tmp_path / "cache")
    assert len([name for name in set(middle) - set(before) if name.startswith("clips/")]) == 6
    train(cache=tmp_path / "cache")
    assert times(tmp_path / "cache") == middle
    assert all(middle[name] == before[name] for name in before)


@pytest.mark.slow
def test_files_of_equal_name_never_share_an_entry(train, six_clips, tmp_path):
    other = shutil.copytree(six_clips, tmp_path / "other")
    names = sorted(p.name for p in (other / "videos").iterdir())
    for name, source in zip(names, names[1:] + names[:1], strict=True):  # the same names, each with another clip
        shutil.copy(six_clips / "videos" / source, other / "videos" / name)
    first, second = train(cache=tmp_path / "cache"), train(data=other, cache=tmp_path / "cache")
    assert not same(lora_of(first), lora_of(second))
    assert len([name for name in content(tmp_path / "cache") if name.startswith("clips/")]) == 6  # the same six contents


def test_a_changed_file_is_seen_even_with_its_old_size_and_time(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"a" * 100)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    old = path.stat()
    first = encodings.hash_file(path, tmp_path / "cache")
    time.sleep(2.1)  # so that the hash is remembered
    assert encodings.hash_file(path, tmp_path / "cache") == first
    assert len(list((tmp_path / "cache/hashes").iterdir())) == 1
    path.write_bytes(b"b" * 100)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert (path.stat().st_size, path.stat().st_mtime) == (old.st_size, old.st_mtime)
    assert encodings.hash_file(path, tmp_path / "cache") != first


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_other_weights_or_another_config_are_another_component(tiny_model, tmp_path, part):
    before = encodings.identify(tiny_model, part, tmp_path)
    assert encodings.identify(shutil.copytree(tiny_model, tmp_path / "copy"), part, tmp_path) == before  # its place does not matter
    changed = shutil.copytree(tiny_model, tmp_path / "changed")
    weights = next((changed / part).glob("*.safetensors"))
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    assert encodings.identify(changed, part, tmp_path)[0] != before[0]
    config = shutil.copytree(tiny_model, tmp_path / "config") / part / "config.json"
    config.write_text(
        config.read_text().replace('"norm_num_groups": 4', '"norm_num_groups": 2').replace('"num_layers": 2', '"num_layers": 1')
    )
    assert encodings.identify(tmp_path / "config", part, tmp_path)[0] != before[0]


def test_the_encodings_of_plain_clips_keep_their_names():
    facts = {"sha256": "a", "indices": [0, 3], "height": 32, "width": 48, "box": [0.0, 0.0, 9.0, 9.0], "reader": "decord", "treatment": {}}
    written_before = "c9513a7b6cbde5018bac695e60bf0205a63230d9"
    assert encodings.clip_key(facts, "vae", torch.float32, True, True, False) == written_before
    assert encodings.clip_key(facts | {"treatment": {"deinterlaced": "bwdif"}}, "vae", torch.float32, True, True, False) != written_before


def test_every_setting_that_changes_an_encoding_changes_its_name():
    facts = {"sha256": "a", "indices": [0, 3], "height": 32, "width": 48, "box": [0.0, 0.0, 9.0, 9.0], "reader": "decord"}
    facts |= {"treatment": {}}
    base = (facts, "vae", torch.float32, True, True, False)
    others = [
        (facts | {name: value}, *base[1:])
        for name, value in {"sha256": "b", "indices": [0], "height": 48, "width": 32, "box": [1.0, 0.0, 9.0, 9.0], "reader": "pyav"}.items()
    ]
    others += [
        (facts | {"treatment": {"deinterlaced": "bwdif"}}, *base[1:]),
        (facts | {"treatment": {"background": "#ffffff"}}, *base[1:]),
        (facts | {"treatment": {"background": "#000000"}}, *base[1:]),
        (*base, "libavcodec 62"),
        (*base, "libavcodec 63"),
        (facts, "vae2", *base[2:]),
        (*base[:2], torch.bfloat16, *base[3:]),
        (*base[:3], False, *base[4:]),
        (*base[:4], False, False),
        (*base[:5], True),
    ]
    assert len({encodings.clip_key(*each) for each in [base, *others]}) == 17
    captions = [
        ("a", "t5", torch.float32, 226),
        ("b", "t5", torch.float32, 226),
        ("a", "t6", torch.float32, 226),
        ("a", "t5", torch.float16, 226),
        ("a", "t5", torch.float32, 224),
    ]
    assert len({encodings.caption_key(*each) for each in captions}) == 5


@pytest.mark.slow
def test_a_damaged_entry_is_encoded_again(train, tmp_path):
    first = train(cache=tmp_path / "cache")
    whole = content(tmp_path / "cache")
    for number, name in enumerate(sorted(whole)):
        if number % 2:
            (tmp_path / "cache" / name).write_bytes(whole[name][: len(whole[name]) // 2])
    second = train(cache=tmp_path / "cache")
    assert content(tmp_path / "cache") == whole
    assert same(lora_of(first), lora_of(second))


def test_an_encoding_that_is_not_finite_is_never_stored(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        encodings.write_entry(tmp_path / "x.safetensors", torch.tensor([1.0, float("nan")]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "found"), [(45, True), (120, False)])
def test_an_entry_that_another_machine_has_just_written_is_waited_for(tmp_path, monkeypatch, capsys, seconds, found):
    path, tensor = encodings.entry_path(tmp_path, "clips", "abcd"), torch.arange(6.0)
    client = LateNames(monkeypatch, seconds, lambda: encodings.write_entry(path, tensor))
    if found:
        assert torch.equal(encodings.read_entry(path), tensor)
    else:
        with pytest.raises(FileNotFoundError):
            encodings.read_entry(path)
    assert client.now == min(seconds, 90)
    assert client.listed[:3] == [tmp_path, tmp_path / "clips", tmp_path / "clips/ab"]  # any of them may be unknown yet
    assert capsys.readouterr().err.count(f"waiting for {path}") == 1


def test_no_time_is_lost_on_entries_that_are_there_or_were_never_written(tmp_path, monkeypatch):
    client = LateNames(monkeypatch, 0, None)
    there, missing = (encodings.entry_path(tmp_path, "clips", key) for key in ("abcd", "efgh"))
    encodings.write_entry(there, torch.zeros(2))
    assert encodings.read_entry(there).tolist() == [0, 0]
    assert encodings.missing_entries(tmp_path, "clips", {"abcd": (2,), "efgh": (2,)}) == ["efgh"]
    assert not missing.exists()
    assert (client.now, client.listed) == (0, [])


@pytest.mark.slow
def test_both_orientations_are_cached_for_random_flip(train, tmp_path):
    train(cache=tmp_path / "cache", random_flip=True)
    clips = [name for name in content(tmp_path / "cache") if name.startswith("clips/")]
    assert len(clips) == 12


def test_an_embedding_does_not_depend_on_what_was_left_to_encode(tiny_model, tmp_path):
    from cogvideox.folder import load_tokenizer
    from cogvideox.model import load_text_encoder

    captions = [f"caption number {i}" for i in range(19)]
    encoder = load_tokenizer(tiny_model), load_text_encoder(tiny_model, torch.device("cpu"))

    by_key = {encodings.key_of(caption): caption for caption in captions}
    encodings.fill_captions(tmp_path / "at once", by_key, lambda: encoder, 226)
    for rank in (1, 0):  # two processes, and a second run that finds some missing
        some = dict(list(by_key.items())[::2])
        encodings.fill_captions(tmp_path / "in parts", some, lambda: encoder, 226, rank, 2)
    shapes = dict.fromkeys(by_key, (226, encoder[1].config.d_model))
    missing = encodings.missing_entries(tmp_path / "in parts", "captions", shapes)
    assert len(missing) == 9
    encodings.fill_captions(tmp_path / "in parts", {key: by_key[key] for key in missing}, lambda: encoder, 226)
    assert content(tmp_path / "at once") == content(tmp_path / "in parts")
    assert len(content(tmp_path / "at once")) == 19


@pytest.mark.parametrize(("captions", "loads"), [(0, 0), (1, 1), (399, 1), (400, 2), (1000, 4)])
def test_t5_is_loaded_by_as_many_processes_as_the_captions_are_worth(monkeypatch, tmp_path, captions, loads):
    """Four processes: none of them encodes a caption of another, and none is left out."""
    loaded, encoded = [], []
    monkeypatch.setattr(encodings, "encode_caption", lambda cache, key, *rest: encoded.append(key))
    missing = {str(number): f"caption {number}" for number in range(captions)}
    for rank in range(4):
        encodings.fill_captions(tmp_path, missing, lambda rank=rank: loaded.append(rank) or ("tokenizer", "T5"), 226, rank, 4)
    assert loaded == list(range(loads))
    assert sorted(encoded) == sorted(missing)


def test_work_is_shared_by_frames_without_overlap():
    sizes = [49, 9, 49, 25, 9, 9, 49, 1]
    shares = [encodings.share(sizes, rank, 3) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(8))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 25


def test_a_read_only_data_folder_works(train, clips):
    for path in [*clips.rglob("*"), clips]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert len(lora_of(train(data=clips))) == 16


@pytest.mark.slow
def test_clips_are_shown_beside_what_the_vae_keeps_of_them(train, tmp_path):
    from cogvideox.video import read_video

    folder = train(cache=tmp_path / "cache") / "encoded"
    assert len(list(folder.glob("*.mp4"))) == 3
    assert (folder / "contact_sheet.png").exists()
    assert read_video(next(folder.glob("*.mp4"))).shape == (9, 32, 96, 3)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [pytest.param(4, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)])
def test_kills_in_encoding_leave_the_cache_that_an_unbroken_run_fills(forked, tiny_model, six_clips, tmp_path, kills):
    flags = {"random_flip": True, "max_num_frames": 17, "height": 64, "width": 96}
    codes, output = forked.run(words(tiny_model, six_clips, tmp_path / "a", tmp_path / "unbroken", **flags))
    assert codes == [0], output[-2000:]
    killed, chance = 0, random.Random(0)
    for _ in range(kills):
        line = words(tiny_model, six_clips, tmp_path / "b", tmp_path / "killed", **flags)
        [process] = forked.start([*line, "--overwrite_output_dir"])
        started, seen = time.monotonic(), len(content(tmp_path / "killed"))
        while process.poll() is None and time.monotonic() - started < 60:
            if len(content(tmp_path / "killed")) > seen:  # it has begun to write: strike some random moment later
                time.sleep(chance.random() * 0.3)
                strike(family(process.pid), signal.SIGKILL)
                break
            time.sleep(0.005)
        killed += process.wait(60) == -signal.SIGKILL
        if len(content(tmp_path / "killed")) == len(content(tmp_path / "unbroken")):
            shutil.rmtree(tmp_path / "killed/clips")
            shutil.rmtree(tmp_path / "killed/captions")
    assert killed >= 0.75 * kills
    codes, output = forked.run(words(tiny_model, six_clips, tmp_path / "c", tmp_path / "killed", **flags))
    assert codes == [0], output[-2000:]
    assert content(tmp_path / "killed") == content(tmp_path / "unbroken")
    assert len(content(tmp_path / "killed")) == 12 + 7


@pytest.mark.slow
def test_one_process_and_two_fill_identical_caches(forked, tiny_model, six_clips, tmp_path):
    for processes in (1, 2):
        out, cache = tmp_path / f"out-{processes}", tmp_path / f"cache-{processes}"
        line = words(tiny_model, six_clips, out, cache, max_train_steps=1, validation_prompt="a:::b:::c")
        codes, output = forked.run(line, processes)
        assert codes == [0] * processes, output[-2000:]
    assert content(tmp_path / "cache-1") == content(tmp_path / "cache-2")
    assert len(content(tmp_path / "cache-1")) == 6 + 7 + 3


@pytest.mark.slow
def test_two_runs_may_fill_one_cache_at_once(forked, tiny_model, six_clips, tmp_path):
    lines = [words(tiny_model, six_clips, tmp_path / f"out-{i}", tmp_path / "cache", max_train_steps=1) for i in range(2)]
    runs = [forked.start(line)[0] for line in lines]
    assert [run.wait(180) for run in runs] == [0, 0], runs[0].output()[-1500:] + runs[1].output()[-1500:]
    assert same(lora_of(tmp_path / "out-0"), lora_of(tmp_path / "out-1"))
    assert not list((tmp_path / "cache").rglob("*.partial"))


# -----------------------------------------------------------------------------
# Whole frames or tiles

GIB = 2**30


@pytest.mark.parametrize(
    ("missing", "resumed", "free", "tiled", "reason"),
    [
        ({False: 6, True: 6}, None, 9 * GIB, False, "encoded whole (8.4 GiB for whole frames, 9.0 free)"),
        ({False: 6, True: 6}, None, 8 * GIB, True, "in tiles (8.4 GiB for whole frames, 8.0 free)"),
        ({False: 6, True: 0}, None, 9 * GIB, True, "the cache has the clips in tiles"),
        ({False: 6, True: 2}, None, 9 * GIB, True, "in tiles, as most are in the cache"),
        ({False: 2, True: 6}, None, 8 * GIB, True, "in tiles (8.4 GiB"),
        ({False: 0, True: 6}, None, 0, False, "encoded whole"),
        ({False: 0, True: 0}, None, 0, False, "encoded whole"),
        ({False: 0, True: 0}, True, 9 * GIB, True, "in tiles, as those of the checkpoint"),
        ({False: 0, True: 6}, True, 9 * GIB, True, "in tiles, as those of the checkpoint"),
        ({False: 6, True: 0}, False, 9 * GIB, False, "whole, as those of the checkpoint"),
        ({False: 6, True: 0}, False, 8 * GIB, False, "whole, as those of the checkpoint"),
        ({False: 6}, None, 0, False, "encoded whole"),
    ],
)
def test_whole_frames_are_encoded_where_they_fit_and_nothing_is_encoded_twice(missing, resumed, free, tiled, reason, capsys):
    chosen = encodings.choose_tiling(missing, resumed, lambda: 8.4 * GIB, free)
    assert chosen.used is tiled
    assert reason in chosen.reason
    warned = resumed is False and free < 8.4 * GIB
    assert ("were encoded whole, and 6 are missing" in capsys.readouterr().err) is warned


def test_whole_frames_are_the_pipelines_own_encoding_and_tiles_are_not(tiny_model):
    from diffusers import AutoencoderKLCogVideoX

    from cogvideox.model import encode_frames, load_vae

    frames = np.random.default_rng(0).integers(0, 255, (5, 288, 432, 3), np.uint8)
    stock = AutoencoderKLCogVideoX.from_pretrained(tiny_model / "vae")
    with torch.no_grad():
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        expected = stock.encode(video).latent_dist.parameters[0]
    whole, tiles = (encode_frames(load_vae(tiny_model, torch.device("cpu"), tiling=tiled), frames) for tiled in (False, True))
    assert torch.equal(whole, expected)
    assert not torch.allclose(tiles, expected, atol=1e-2)


def clips_in(cache):
    return {name for name in content(cache) if name.startswith("clips/")}


@pytest.fixture
def free_memory(monkeypatch):
    """A function that sets what is free for encoding."""
    return lambda size: monkeypatch.setattr(encodings, "memory_for_encoding", lambda device: size)


@pytest.mark.slow
def test_a_run_says_how_it_encoded_and_uses_what_an_earlier_one_has_left(train, tmp_path, free_memory, capsys):
    cache = tmp_path / "cache"
    free_memory(0)
    train(cache=cache, max_train_steps=1)
    assert "clips are encoded in tiles (" in capsys.readouterr().err
    tiles = clips_in(cache)
    free_memory(2**40)
    train(cache=cache, max_train_steps=1)
    assert "6 of 6 clips" in (told := capsys.readouterr().err)
    assert "the cache has the clips in tiles, and they are not encoded again" in told
    assert clips_in(cache) == tiles
    train(cache=cache, max_train_steps=1, enable_tiling=False)
    assert "clips are encoded whole" in capsys.readouterr().err
    assert len(clips_in(cache) - tiles) == 6
    train(cache=tmp_path / "other", max_train_steps=1)
    assert clips_in(tmp_path / "other") == clips_in(cache) - tiles  # the entries' names say what was done


@pytest.mark.slow
@pytest.mark.parametrize(("first", "later"), [(2**40, 0), (0, 2**40)], ids=["a large GPU first", "a small GPU first"])
def test_a_run_resumed_on_another_gpu_trains_on_the_same_encodings(train, tmp_path, free_memory, capsys, first, later):
    straight = train(cache=tmp_path / "both", max_train_steps=4, enable_tiling=False)
    free_memory(first)
    folder = train(cache=tmp_path / "cache", max_train_steps=2)
    before = content(tmp_path / "cache")
    free_memory(later)
    shutil.copytree(tmp_path / "cache", tmp_path / "both", dirs_exist_ok=True)  # whole and, once, in tiles too
    for cache in ("cache", "both", "emptied"):
        resumed = train(cache=tmp_path / cache, output=folder, resume_from_checkpoint="checkpoint-2", max_train_steps=4)
        told = capsys.readouterr().err
        if cache == "emptied":
            assert f"clips are encoded {'in tiles' if first == 0 else 'whole'}, as those of the checkpoint" in told
        assert same(lora_of(resumed), lora_of(straight))  # at this size one tile is the whole frame
        shutil.rmtree(folder / "checkpoint-4")
    assert content(tmp_path / "cache") == content(tmp_path / "emptied") == before


@pytest.mark.slow
def test_all_processes_encode_as_the_one_with_the_least_memory_can(forked, tiny_model, six_clips, tmp_path):
    little = "import cogvideox.encodings as encodings\nencodings.memory_for_encoding = lambda device: 0 if rank == 1 else 2**40\n"
    codes, output = forked.run(words(tiny_model, six_clips, tmp_path / "out", tmp_path / "cache"), processes=2, before=little)
    assert codes == [0, 0], output[-2000:]
    assert "clips are encoded in tiles (" in output
    assert len(clips_in(tmp_path / "cache")) == 6


# -----------------------------------------------------------------------------
# Buckets and bad clips


@pytest.mark.slow
def test_clips_go_to_the_nearest_bucket_and_every_step_holds_one_shape(train, clips, monkeypatch):
    from cogvideox.video import write_video

    tall = np.random.default_rng(0).integers(0, 255, (30, 96, 64, 3), np.uint8)
    write_video(clips / "videos/04.mp4", tall, fps=8)
    write_video(clips / "videos/05.mp4", tall[:6, :64, :], fps=8)
    seen = []
    loss = script.velocity_loss

    def watch(model, scheduler, batch, *rest):
        seen.append((tuple(batch["latents"].shape[1:]), batch["position"].tolist()))
        return loss(model, scheduler, batch, *rest)

    monkeypatch.setattr(script, "velocity_loss", watch)
    folder = train(data=clips, bucket=["32x48", "48x32", "9", "5"], train_batch_size=2, max_train_steps=None, num_train_epochs=2)
    del seen[0]  # the rehearsal
    assert {shape[0] for shape, _ in seen} == {2, 3}
    assert {shape[2:] for shape, _ in seen} == {(4, 6), (6, 4)}
    report = (folder / "dataset_report.txt").read_text()
    assert "4 of 9x32x48" in report
    assert "1 of 9x48x32" in report
    assert len(seen) == 2 * 4  # two epochs of two landscape steps, one portrait and one short step
    repeated = lora_of(
        train(data=clips, bucket=["32x48", "48x32", "9", "5"], gradient_accumulation_steps=2, max_train_steps=None, num_train_epochs=2)
    )
    assert max((lora_of(folder)[n] - repeated[n]).abs().max() for n in repeated) < 1e-5  # any split of a step trains the same


@pytest.mark.slow
def test_bad_clips_can_be_skipped_up_to_a_share(train, clips, capsys):
    (clips / "videos/05.mp4").write_bytes(b"")
    with pytest.raises(SystemExit):
        train(data=clips)
    with pytest.raises(SystemExit):
        train(data=clips, bad_videos="skip")  # one of six is more than a tenth
    assert "1 of 6 clips are unusable, more than --max_bad_share 0.1" in capsys.readouterr().err
    folder = train(data=clips, bad_videos="skip", max_bad_share=0.2)
    assert "warning: skipped videos.txt:3: videos/05.mp4: empty file" in capsys.readouterr().err
    for name in ("prompts.txt", "videos.txt"):
        lines = (clips / name).read_text().splitlines()
        (clips / name).write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    assert same(lora_of(folder), lora_of(train(data=clips)))


# -----------------------------------------------------------------------------
# The tools


def tool(*command):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_cache_tool_finds_and_removes_what_is_damaged(train, tmp_path):
    train(cache=tmp_path / "cache")
    code, output = tool("tools.cache", "check", tmp_path / "cache")
    assert (code, output.splitlines()[0]) == (0, "13 entries, 0 bad, 0 leftovers")
    code, output = tool("tools.cache", "list", tmp_path / "cache")
    assert "6 clips (moments)" in output
    cut, flipped = sorted((tmp_path / "cache").rglob("*/??/*.safetensors"))[:2]
    cut.write_bytes(cut.read_bytes()[:-1])
    blob = bytearray(flipped.read_bytes())
    blob[-2] ^= 4
    flipped.write_bytes(blob)
    code, output = tool("tools.cache", "check", tmp_path / "cache")
    assert code == 1
    assert "13 entries, 2 bad" in output
    assert "its content is not what was stored" in output
    code, output = tool("tools.cache", "prune", tmp_path / "cache")
    assert "removed 2 bad entries, 0 leftovers\n" in output
    code, output = tool("tools.cache", "check", tmp_path / "cache")
    assert (code, output.splitlines()[0]) == (0, "11 entries, 0 bad, 0 leftovers")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["check", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["prune", ".", "--older_than", "-1"], "--older_than -1.0: must be at least 0"),
        (["check", ".", "--older_than", "3"], "--older_than: only prune removes entries, check does not; leave it out"),
    ],
)
def test_the_cache_tool_refuses_flags_that_would_do_harm_or_nothing(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        cache_tool.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"ERROR[2]: {sentence}\n"


@pytest.mark.slow
def test_the_dataset_tool_needs_no_model_and_tells_the_verdict(clips, tmp_path):
    from cogvideox.video import write_video

    still = np.repeat(np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), np.uint8), 20, axis=0)
    write_video(clips / "videos/06.mp4", still, fps=8)
    again = subprocess.run(["cp", clips / "videos/04.mp4", clips / "videos/05.mp4"])
    assert again.returncode == 0
    sheet, flags = tmp_path / "sheet.png", ["--height", "32", "--width", "48", "--encoding_cache_dir", tmp_path / "cache"]
    code, output = tool("tools.check_dataset", clips, "--sheet", sheet, *flags)
    assert code == 0
    assert "6 clips are few" in output
    assert "1 clips hardly move, and a LoRA learns that too: videos/06.mp4" in output
    assert "1 pairs of clips look alike: videos/04.mp4 and videos/05.mp4" in output
    assert sheet.stat().st_size > 10_000
    (clips / "videos/07.mp4").write_text("no video")
    code, output = tool("tools.check_dataset", clips, "--sheet", sheet, *flags)
    assert code == 3
    assert "ERROR[3]: videos.txt:5: videos/07.mp4" in output
    assert not (tmp_path / "cache/clips").exists()


def test_surveys_are_remembered_by_content(train, six_clips, tmp_path, monkeypatch):
    train(cache=tmp_path / "cache")
    asked = []
    read_all = survey.progress
    monkeypatch.setattr(survey, "progress", lambda pairs, *rest, **more: asked.extend(pairs) or read_all([], disable=True))
    train(cache=tmp_path / "cache")
    assert asked == []


@pytest.mark.slow
def test_a_clip_that_pyav_decodes_is_encoded_again_after_an_upgrade_and_its_run_goes_on(train, clips, tmp_path, capsys):
    listed = (clips / "videos.txt").read_text().split()[:2]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", clips / listed[0], "-c:v", "mpeg4", "-q:v", "2", clips / "old.avi"]
    subprocess.run(command, check=True)
    (clips / "videos.txt").write_text(f"old.avi\n{listed[1]}\n")
    (clips / "prompts.txt").write_text("A rabbit\nA squirrel\n")
    cache, output = tmp_path / "cache", tmp_path / "run"
    train(data=clips, cache=cache, output=output, max_train_steps=1)
    entries = {path.stem for path in (cache / "clips").rglob("*.safetensors")}
    assert len(entries) == 2
    surveys = {path: json.loads(path.read_text()) for path in (cache / "surveys").iterdir()}
    (by_pyav,) = [path for path, facts in surveys.items() if facts["reader"] == "pyav"]
    assert "libavcodec" in surveys[by_pyav]["decoder"]
    by_pyav.write_text(json.dumps(surveys[by_pyav] | {"decoder": "libavcodec 99"}))
    train(data=clips, cache=cache, output=output, max_train_steps=2, resume_from_checkpoint="latest")  # no other clips: it is not refused
    after = {path.stem for path in (cache / "clips").rglob("*.safetensors")}
    assert len(after) == 3
    assert after > entries

    capsys.readouterr()
    records, facts = [SimpleNamespace(listed="old.avi")], [surveys[by_pyav]]
    encodings.say_encoded_again(cache, SimpleNamespace(records=records, clips=facts), ["new"], [min(entries)], {"new"})
    assert "1 clips are encoded again (old.avi)" in capsys.readouterr().err
    encodings.say_encoded_again(cache, SimpleNamespace(records=records, clips=facts), ["new"], ["never written"], {"new"})
    assert capsys.readouterr().err == ""
