"""Faults of docs/faults.md that no other file here has a test of, and that every test named there exists."""

import ast
import codecs
import contextlib
import errno
import gc
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import train_cogvideox_lora as script
from cogvideox import checkpoint, encodings, hub, rehearsal, stopping, validation
from cogvideox import folder as folder_of
from cogvideox.reader import Readers
from dataset import read_records
from tests.conftest import ROOT, STEADY_ADAM, STEADY_BOUND, environment, lora_of, same, words
from tests.test_faults import TWO, start, steps_of

NOBODY = 65534


def worst_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def content(folder):
    """name -> bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ended(code, run, **flags):
    """Run the script, which has to end with this exit code."""
    with pytest.raises(SystemExit) as stop:
        run(**flags)
    assert stop.value.code == code
    del stop
    gc.collect()  # the traceback held the run's lock of its folder


@contextlib.contextmanager
def without_privileges():
    """Bound by file modes for a while, which do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    codecs.lookup("utf-8-sig")  # Python's own files may be closed to others
    try:
        os.setresuid(NOBODY, NOBODY, 0)
    except OSError as error:
        pytest.skip(f"this account cannot become another: {error}")
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def open_folder():
    """A folder that any user can look into; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def mount(folder, options):
    """Mount a file system in memory, or skip the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("mounting a file system is not allowed here")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MiB."""
    folder = mount(tmp_path / "disk", "size=3m")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def read_only_disk(tmp_path):
    """A real file system that nobody can write to."""
    folder = mount(tmp_path / "disk", "size=3m,ro")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Take all that is free on a file system."""
    with open(folder / "ballast", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    assert os.statvfs(folder).f_bavail == 0


def at_step(monkeypatch, step, action):
    """Do something once, when the loss of an optimizer step is computed (one clip a step; the rehearsal computes one before)."""
    loss, calls = script.velocity_loss, []

    def watched(*args):
        calls.append(1)
        if len(calls) == step + 1:
            action()
        return loss(*args)

    monkeypatch.setattr(script, "velocity_loss", watched)


# -----------------------------------------------------------------------------
# The table


@pytest.mark.parametrize(("page", "least"), [("faults", 60), ("gpu", 30), ("models", 12)])
def test_every_test_that_a_table_names_exists(page, least):
    text = (ROOT / f"docs/{page}.md").read_text()
    named = set(re.findall(r"`(tests/\w+\.py)::(\w+)`", text))
    defined = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        defined |= {(f"tests/{path.name}", name) for name in functions}
    assert len(named) >= least
    assert named <= defined, named - defined
    assert text.count("::test_") == len(re.findall(r"`tests/\w+\.py::", text))  # nothing is named in another way
    if page == "gpu":
        numbers = re.findall(r"^\| (\d+) \|", text.split("## What the trainer does on a GPU")[1], re.M)
        assert numbers == [str(number) for number in range(1, 17)]


def table_rows():
    """The rows of all tables of faults, without their heads."""
    tables = (ROOT / "docs/faults.md").read_text().split("| fault | what happens | test |\n| --- | --- | --- |\n")[1:]
    return [row.removesuffix(" |") for table in tables for row in table.partition("\n\n")[0].splitlines()]


def test_every_row_of_the_table_has_a_test_or_says_why_not():
    rows = table_rows()
    assert len(rows) >= 160
    for row in rows:
        assert row.count(" | ") == 2, row
        last = row.rsplit(" | ", 1)[1]
        assert last.startswith(("`tests/", "not run: ", "none: ")), row


def test_every_test_of_this_file_is_in_the_table():
    text = (ROOT / "docs/faults.md").read_text()
    mine = {node.name for node in ast.parse(Path(__file__).read_text()).body if isinstance(node, ast.FunctionDef)}
    absent = {name for name in mine if name.startswith("test_") and f"::{name}`" not in text}
    assert {name for name in absent if not name.startswith("test_every_")} == set()


def test_every_row_that_is_marked_as_not_yet_so_has_an_expected_failure_and_no_other():
    marked = {name for row in table_rows() if "†" in row for name in re.findall(r"`tests/test_fault_table.py::(\w+)`", row)}
    expected = set()
    for node in ast.parse(Path(__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef) and any("mark.xfail" in ast.unparse(decorator) for decorator in node.decorator_list):
            expected.add(node.name)
    assert marked == expected


# -----------------------------------------------------------------------------
# Dataset files


def test_two_empty_lists_are_named_and_nothing_is_loaded(clips, train, capsys):
    for name in ("prompts.txt", "videos.txt"):
        (clips / name).write_text("\n\n")
    ended(3, train, data=clips)
    told = capsys.readouterr().err
    assert "prompts.txt: no entries" in told
    assert "videos.txt: no entries" in told


def test_flags_that_do_not_fit_the_model_end_the_run_before_a_clip_is_decoded(clips, train, capsys, monkeypatch):
    decoded, read_all = [], Readers.read_all
    monkeypatch.setattr(Readers, "read_all", lambda *arguments, **named: decoded.append(1) or read_all(*arguments, **named))
    (clips / "videos/02.mp4").unlink()
    captions = (clips / "prompts.txt").read_text().splitlines()
    (clips / "prompts.txt").write_text("\n".join([*captions[:-1], "兔子在草地上跑"]) + "\n", encoding="utf-8")
    ended(2, train, data=clips, max_num_frames=10, height=30)
    told = capsys.readouterr().err
    assert told.count("ERROR[2]") == 4
    for part in ("--max_num_frames 10: this model needs", "--height 30: this model needs", "02.mp4: no such file", "unknown to T5"):
        assert part in told
    assert not decoded
    ended(2, train, data=clips, max_num_frames=10, bad_videos="skip", max_bad_share=0.5)
    told = capsys.readouterr().err
    assert told.count("ERROR[2]") == 1
    assert "--max_num_frames 10" in told
    ended(3, train, data=clips)
    assert "02.mp4: no such file" in capsys.readouterr().err
    assert decoded


def test_skipping_more_frames_than_a_clip_has_names_the_clip(clips, train, capsys):
    ended(3, train, data=clips, skip_frames_start=100_000)
    told = capsys.readouterr().err
    assert told.count("ERROR[3]") == 6
    assert re.search(r"videos\.txt:2: videos/04\.mp4: \d+ frames, of which --skip_frames_start 100000", told)


def test_a_clip_that_may_not_be_read_is_named(clips, train, capsys, open_folder, monkeypatch):
    data = shutil.copytree(clips, open_folder / "clips")
    data.chmod(0o755)

    def read(*args, **settings):
        with without_privileges():
            return read_records(*args, **settings)

    monkeypatch.setattr("dataset.read_records", read)
    assert len(lora_of(train(data=data))) == 16
    (data / "videos/04.mp4").chmod(0)
    ended(3, train, data=data)
    assert "videos.txt:2: videos/04.mp4: permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts.txt", "videos.txt", "."])
def test_a_list_or_a_data_folder_that_may_not_be_read_is_named(clips, open_folder, name):
    data = shutil.copytree(clips, open_folder / "clips")
    data.chmod(0o755)
    with without_privileges():
        assert read_records(data)[1] == []
    (data / name).chmod(0)
    with without_privileges():
        _, problems, _ = read_records(data)
    assert any("ermission denied" in problem and str((data / name).name) in problem for problem in problems)


def strange_captions(clips):
    """Captions that are too long, or hold a NUL, signs that move a cursor, and a separator of lines that is none here."""
    captions = (clips / "prompts.txt").read_text().splitlines()
    captions[0] = "\x1b[31mred\x1b[2J \x07 bell"
    captions[1] = "a nul \0 inside"
    captions[2] = "very long " * 1000
    captions[3] = "one\u2028line"
    (clips / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return captions


def test_strange_captions_are_trained_on_and_escaped_in_the_log(clips, train, capsys):
    captions = strange_captions(clips)
    assert [record.caption for record in read_records(clips)[0]] == [caption.strip() for caption in captions]
    folder = train(data=clips)
    told = capsys.readouterr().err
    assert r"'\x1b[31mred\x1b[2J \x07 bell'" in told
    assert not set("\x1b\x07\0") & set(told)
    assert not set("\x1b\x07\0") & set((folder / "dataset_report.txt").read_text())
    assert "1 captions are longer than 226 tokens and will be truncated: videos/05.mp4" in told
    assert all(torch.isfinite(tensor).all() for tensor in lora_of(folder).values())
    captions[1] = "another"
    (clips / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    assert not same(lora_of(folder), lora_of(train(data=clips, max_train_steps=6)))


def test_a_file_name_with_signs_that_move_a_cursor_is_escaped_in_the_log(clips, train, capsys):
    for old, new in (("videos/02.mp4", "videos/\x1b[31mred.mp4"), ("videos/04.mp4", "videos/\x1b[32mgreen.mp4")):
        (clips / "videos.txt").write_text((clips / "videos.txt").read_text().replace(old, new))
    (clips / "videos/02.mp4").rename(clips / "videos/\x1b[31mred.mp4")
    ended(3, train, data=clips)
    told = capsys.readouterr().err
    assert "green.mp4: no such file" in told
    assert "\x1b[3" not in told


@pytest.mark.slow
def test_strange_validation_prompts_make_files_inside_the_folder(train):
    prompt = "../../up:::/etc/passwd:::" + "long " * 2000 + ":::\x1b[31mred\0"
    folder = train(validation_prompt=prompt, max_train_steps=1)
    videos = [path for path in folder.parent.rglob("*.mp4") if "encoded" not in path.parts]
    assert len(videos) == 2 * 4
    assert {path.parent for path in videos} == {folder / "validation/step-000000", folder / "validation/step-000001"}
    assert all(path.name.isprintable() and len(path.name) < 100 for path in videos)


@pytest.mark.slow
def test_an_entry_of_another_shape_is_encoded_again(train, tmp_path):
    cache = tmp_path / "cache"
    right = train(cache=cache)
    before = content(cache / "clips")
    for name in before:
        moments = encodings.read_entry(cache / "clips" / name)
        (cache / "clips" / name).write_bytes(save({"encoding": moments[..., :2].contiguous()}))
    again = train(cache=cache)
    assert content(cache / "clips") == before
    assert same(lora_of(right), lora_of(again))


@pytest.mark.slow
def test_numbers_in_the_cache_that_are_not_finite_are_named_and_train_nothing(train, tmp_path, capsys):
    cache = tmp_path / "cache"
    clean = train(cache=cache, max_train_steps=6)
    assert "was skipped" not in capsys.readouterr().err
    entry = sorted((cache / "clips").rglob("*.safetensors"))[0]
    entry.write_bytes(save({"encoding": encodings.read_entry(entry) * float("nan")}))
    folder = train(cache=cache, max_train_steps=6)
    told = capsys.readouterr().err
    assert told.count("was skipped") == 1  # six clips, six steps
    assert re.search(r"step \d was skipped for a non-finite gradient: videos/0\d\.mp4 at timestep", told)
    assert all(torch.isfinite(tensor).all() for tensor in lora_of(folder).values())
    assert not same(lora_of(clean), lora_of(folder))


def fill_after_first_entry(monkeypatch, folder):
    """Fill a file system up as soon as the first encoding is on it."""

    write = encodings.write_entry

    def last(*args):
        write(*args)
        if not (folder / "ballast").exists():
            fill(folder)

    monkeypatch.setattr(encodings, "write_entry", last)


def test_a_full_disk_while_encoding_is_told_in_a_sentence(train, small_disk, capsys, monkeypatch):
    fill_after_first_entry(monkeypatch, small_disk)
    ended(4, train, cache=small_disk / "cache")
    assert "--encoding_cache_dir" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_while_encoding_leaves_whole_entries_that_the_next_run_uses(train, plain_run, small_disk, monkeypatch):
    straight = plain_run()
    fill_after_first_entry(monkeypatch, small_disk)
    with pytest.raises((SystemExit, OSError)):
        train(cache=small_disk / "cache")
    entries = {path: path.stat().st_mtime_ns for path in small_disk.rglob("*/??/*.safetensors")}
    assert entries
    assert all(encodings.is_complete(path, encodings.read_entry(path).shape) for path in entries)
    assert not list(small_disk.rglob("*.partial"))
    os.truncate(small_disk / "ballast", 0)  # it stays there, so nothing fills the disk again
    assert same(lora_of(train(cache=small_disk / "cache")), lora_of(straight))
    assert {path: path.stat().st_mtime_ns for path in entries} == entries


# -----------------------------------------------------------------------------
# Flags and environment


def test_half_precision_on_a_machine_without_a_gpu_is_refused(train, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended(2, train, mixed_precision="fp16")
    assert "--mixed_precision fp16: this run has no GPU" in capsys.readouterr().err
    assert folder_of.choose_precision("bf16", None, None) == ("bf16", None)


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_told_in_a_sentence_within_a_minute(tmp_path):
    code = (
        "import sys; sys.path.insert(0, '.'); from cogvideox.folder import find_model\n"
        f"try: find_model('someone/nothing', cache_dir={str(tmp_path)!r})\n"
        "except ValueError as error: print(error)\n"
    )
    nobody_listens = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment() | nobody_listens, capture_output=True, text=True, timeout=90
    )
    assert time.monotonic() - began < 60
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no such folder, and the download from the hub failed" in done.stdout


def payload(marker):
    """A pickle that would leave a mark if it were loaded."""

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    return pickle.dumps(Payload())


def test_a_model_of_pickles_is_refused_and_not_run(train, tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = model / "transformer/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(payload(tmp_path / "ran"))
    ended(2, train, model=model)
    assert "pickled weights are unsupported" in capsys.readouterr().err
    weights.write_bytes(payload(tmp_path / "ran"))  # under the right name
    ended(2, train, model=model)
    assert "not a safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload(tmp_path / "ran"))
    assert (tmp_path / "ran").exists()  # it would have been seen


def test_a_first_lora_that_is_no_safetensors_file_is_refused_and_not_run(train, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(payload(tmp_path / "ran"))
    ended(2, train, init_lora=str(path))
    assert "--init_lora" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_an_output_folder_that_this_user_may_not_write_is_told_at_once(train, open_folder, capsys, monkeypatch):
    prepare = script.claim_output_dir

    def bound(*args):
        with without_privileges():
            return prepare(*args)

    monkeypatch.setattr(script, "claim_output_dir", bound)
    (open_folder / "cache").mkdir()
    (open_folder / "cache").chmod(0o777)
    open_folder.chmod(0o555)
    flags = {"output": open_folder / "out", "cache": open_folder / "cache"}
    ended(4, train, **flags)
    assert f"--output_dir {open_folder / 'out'}: cannot be written to (Permission denied)" in capsys.readouterr().err
    open_folder.chmod(0o777)
    assert len(lora_of(train(**flags))) == 16


def test_a_read_only_file_system_is_told_at_once(train, read_only_disk, capsys):
    ended(4, train, output=read_only_disk / "out")
    assert "cannot be written to (Read-only file system)" in capsys.readouterr().err
    assert list(read_only_disk.iterdir()) == []


@pytest.mark.parametrize("place", ["a file", "a read-only disk"])
def test_a_cache_that_cannot_be_written_is_told_in_a_sentence(train, request, tmp_path, capsys, place):
    if place == "a file":
        (tmp_path / "cache").write_text("")
        cache = tmp_path / "cache"
    else:
        cache = request.getfixturevalue("read_only_disk") / "cache"
    ended(4, train, cache=cache)
    assert "--encoding_cache_dir" in capsys.readouterr().err


def test_a_disk_with_no_room_for_a_checkpoint_is_told_before_the_first_step(train, request, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
        ended(4, train)
    assert "a checkpoint needs" in capsys.readouterr().err
    small_disk = request.getfixturevalue("small_disk")  # from here on with a real one, where that is allowed
    with open(small_disk / "ballast", "wb") as file:
        file.write(bytes((3 << 20) - (400 << 10)))
    ended(4, train, output=small_disk / "out", rank=64)
    told = capsys.readouterr().err
    assert "a checkpoint needs" in told
    assert not (small_disk / "out/metrics.jsonl").exists()
    (small_disk / "ballast").unlink()
    assert len(lora_of(train(output=small_disk / "out", rank=64))) == 16


def test_overwriting_waits_until_the_new_run_can_start(train, plain_run, clips, tmp_path):
    folder = shutil.copytree(plain_run(), tmp_path / "run")
    before = content(folder)
    (clips / "videos/04.mp4").unlink()
    ended(3, train, output=folder, data=clips, overwrite_output_dir=True)
    assert (folder / "pytorch_lora_weights.safetensors").exists()
    after = content(folder)
    kept = before.keys() - {"dataset.json", "dataset_report.txt"}
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}


def test_overwriting_follows_no_link_and_takes_nothing_that_no_run_wrote(train, plain_run, tmp_path):
    folder = shutil.copytree(plain_run(), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/precious").write_text("mine")
    (folder / "validation").symlink_to(tmp_path / "elsewhere")
    (folder / "checkpoint-notes").mkdir()
    (folder / "notes.txt").write_text("mine")
    train(output=folder, overwrite_output_dir=True, max_train_steps=1)
    assert not (folder / "checkpoint-2").exists()
    assert same(lora_of(folder), lora_of(plain_run(max_train_steps=1)))
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(json.loads((folder / "dataset.json").read_text())["clips"]) == 6  # of the new run
    assert (tmp_path / "elsewhere/precious").read_text() == "mine"
    assert (folder / "checkpoint-notes").is_dir()


def test_overwriting_and_resuming_together_are_refused(train, plain_run, capsys):
    folder = plain_run(max_train_steps=1)
    before = content(folder)
    ended(2, train, output=folder, overwrite_output_dir=True, resume_from_checkpoint="latest")
    assert "give only one" in capsys.readouterr().err
    assert content(folder) == before


# -----------------------------------------------------------------------------
# Checkpoints and resume


@pytest.mark.numeric
@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_training(forked, train, plain_run, tiny_model, six_clips, encodings, tmp_path):
    flags = {"max_train_steps": 6, "checkpointing_steps": 3, "lr_scheduler": "cosine"} | STEADY_ADAM
    straight = plain_run(train_batch_size=2, **flags)

    def two(folder, **more):
        codes, output = forked.run(words(tiny_model, six_clips, folder, encodings, **flags, **more), processes=2)
        assert codes == [0, 0], output[-2000:]
        return output

    def halfway(source, target):
        shutil.copytree(source, target)
        shutil.rmtree(target / "checkpoint-6")
        (target / "pytorch_lora_weights.safetensors").unlink()
        return target

    both = tmp_path / "both"
    two(both)
    fewer = train(output=halfway(both, tmp_path / "fewer"), train_batch_size=2, resume_from_checkpoint="latest", **flags)
    more = halfway(straight, tmp_path / "more")
    assert "checkpoint-3, step 3" in two(more, resume_from_checkpoint="latest")
    losses = [[json.loads(x)["loss"] for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (straight, both, fewer, more)]
    assert all(each == pytest.approx(losses[0], rel=1e-5) for each in losses)
    for folder in (fewer, more):
        assert worst_difference(lora_of(folder), lora_of(straight)) < STEADY_BOUND
    assert worst_difference(lora_of(straight), lora_of(straight / "checkpoint-3")) > 1e-3
    assert worst_difference(lora_of(straight), lora_of(plain_run(train_batch_size=2, seed=1, **flags))) > 1e-3


def test_a_real_full_disk_costs_no_checkpoint_and_ends_with_exit_code_4(train, small_disk, capsys, monkeypatch):
    at_step(monkeypatch, 2, lambda: fill(small_disk))
    ended(4, train, output=small_disk / "out", max_train_steps=3, checkpointing_steps=1)
    assert "kept: checkpoint-1" in capsys.readouterr().err
    assert [path.name for path in (small_disk / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert checkpoint.read_manifest(small_disk / "out/checkpoint-1")["step"] == 1


@pytest.mark.slow
def test_a_disk_that_has_room_again_gets_the_next_checkpoint(train, plain_run, small_disk, capsys, monkeypatch):
    straight = plain_run(max_train_steps=4)
    write, refused = checkpoint.write_checkpoint, threading.Event()

    def noted(*args):
        try:
            return write(*args)
        except OSError:
            refused.set()
            raise

    monkeypatch.setattr(checkpoint, "write_checkpoint", noted)  # in a thread
    at_step(monkeypatch, 2, lambda: fill(small_disk))
    at_step(monkeypatch, 3, lambda: (refused.wait(60), (small_disk / "ballast").unlink()))
    folder = train(output=small_disk / "out", max_train_steps=4, checkpointing_steps=1)
    assert "a checkpoint was not written" in capsys.readouterr().err
    assert (folder / "checkpoint-4/manifest.json").exists()
    assert same(lora_of(folder), lora_of(straight))


def test_the_numbers_of_a_long_run_on_a_full_disk_do_not_end_it(train, small_disk, monkeypatch):
    at_step(monkeypatch, 2, lambda: fill(small_disk))
    at_step(monkeypatch, 60, lambda: (small_disk / "ballast").unlink())
    folder = train(output=small_disk / "out", max_train_steps=61, checkpointing_steps=1000)
    assert (folder / "checkpoint-61/manifest.json").exists()


def test_an_output_folder_that_vanishes_is_made_again(train, plain_run, tmp_path, monkeypatch):
    straight = plain_run(max_train_steps=4)
    folder = tmp_path / "out"
    at_step(monkeypatch, 3, lambda: shutil.rmtree(folder))
    train(output=folder, max_train_steps=4, checkpointing_steps=2)
    assert same(lora_of(folder), lora_of(straight))


@pytest.mark.slow
def test_a_stale_handle_costs_one_checkpoint_and_no_older_one(train, plain_run, capsys, monkeypatch):
    replace, failed = os.replace, []

    def stale(source, target):
        if str(target).endswith("checkpoint-2") and not failed:
            failed.append(target)
            raise OSError(errno.ESTALE, "Stale file handle")
        return replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", stale)
    folder = train(max_train_steps=3, checkpointing_steps=1)
    assert failed
    told = capsys.readouterr().err
    assert "Stale file handle" in told
    assert "kept: checkpoint-1" in told
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    monkeypatch.undo()
    assert same(lora_of(folder), lora_of(plain_run(max_train_steps=3)))


def crafted(folder, name, blob):
    """Replace a file of a checkpoint and make the manifest agree."""
    (folder / name).write_bytes(blob)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter.safetensors", "state.json"])
def test_a_forged_checkpoint_with_a_pickle_is_refused_and_not_run(train, plain_run, tmp_path, name):
    folder = shutil.copytree(plain_run(), tmp_path / "run")
    crafted(folder / "checkpoint-2", name, payload(tmp_path / "ran"))
    ended(4, train, output=folder, resume_from_checkpoint="latest", max_train_steps=3)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", [{"files": []}, {"step": None}, {"flags": None}, {"clips": None}], ids=lambda change: next(iter(change)))
def test_a_manifest_that_lacks_a_part_is_skipped(train, plain_run, tmp_path, change):
    folder = shutil.copytree(plain_run(checkpointing_steps=1), tmp_path / "run")
    path = folder / "checkpoint-2/manifest.json"
    manifest = {name: change.get(name, value) for name, value in json.loads(path.read_text()).items()}
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=3)
    assert (folder / "checkpoint-3").is_dir()


def test_a_file_of_a_checkpoint_that_is_a_link_is_refused(plain_run, tmp_path):
    folder = shutil.copytree(plain_run(checkpointing_steps=1), tmp_path / "run")
    file = folder / "checkpoint-2/optimizer.safetensors"
    assert checkpoint.choose_checkpoint("latest", folder)[0].name == "checkpoint-2"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    path, _, remarks = checkpoint.choose_checkpoint("latest", folder)
    assert path.name == "checkpoint-1"
    assert "not a plain file in it" in remarks[0]


def test_a_checkpoint_folder_that_is_a_link_is_resumed_and_its_target_is_never_removed(train, tmp_path):
    straight = train(max_train_steps=4, checkpointing_steps=2)
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "checkpoint-2").symlink_to(straight / "checkpoint-2")
    before = content(straight / "checkpoint-2")
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=4, checkpointing_steps=2, checkpoints_total_limit=1)
    assert content(straight / "checkpoint-2") == before
    assert same(lora_of(folder), lora_of(straight))
    assert not same(lora_of(folder), lora_of(straight / "checkpoint-2"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_in_the_place_of_a_checkpoint_does_not_cost_the_result(train, plain_run, tmp_path, kind):
    folder = shutil.copytree(plain_run(max_train_steps=1), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        (folder / "checkpoint-2").write_text("a note")
    else:
        (folder / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=2)
    assert (folder / "checkpoint-2/manifest.json").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert same(lora_of(folder), lora_of(plain_run(max_train_steps=2)))


def test_what_is_no_checkpoint_is_never_removed(train, plain_run, tmp_path):
    folder = shutil.copytree(plain_run(max_train_steps=1), tmp_path / "run")
    (folder / "checkpoint-backup").mkdir()
    (folder / "checkpoint-9").write_text("a file")
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8/note").write_text("mine")
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1)
    left = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert left == ["checkpoint-3", "checkpoint-8.abandoned", "checkpoint-9", "checkpoint-backup"]
    assert (folder / "checkpoint-8.abandoned/note").read_text() == "mine"  # of a later step than the one resumed from


def test_the_modes_of_all_files_follow_the_umask(train, plain_run):
    before = os.umask(0o027)
    try:
        folder = train()
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert stat.S_IMODE((plain_run() / "pytorch_lora_weights.safetensors").stat().st_mode) == 0o666 & ~before


# -----------------------------------------------------------------------------
# Signals and processes


def test_a_signal_while_a_checkpoint_is_written_lets_it_be_finished(train, monkeypatch, tmp_path):
    write = checkpoint.write_checkpoint

    def struck(output_dir, step, *rest):
        if step == 2:
            monkeypatch.setitem(stopping.received, "signal", signal.SIGTERM)
            time.sleep(0.3)
        return write(output_dir, step, *rest)

    monkeypatch.setattr(checkpoint, "write_checkpoint", struck)
    ended(143, train, output=tmp_path / "out", max_train_steps=500, checkpointing_steps=2)
    path = json.loads((tmp_path / "out/status.json").read_text())["checkpoint"]
    assert checkpoint.read_manifest(tmp_path / "out/checkpoint-2")["step"] == 2
    assert checkpoint.read_manifest(path)["step"] >= 2
    assert not list((tmp_path / "out").glob("*.partial"))


IN_STEP_5 = """
import os, time
import dataset
item = dataset.TrainingClips.__getitem__
def changed(self, position):
    if position == 9 and os.environ['RANK'] == '1':  # the second process's clip of step 5
        {action}
    return item(self, position)
dataset.TrainingClips.__getitem__ = changed
"""
PROGRAM = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, '.')
{change}
runpy.run_path('train_cogvideox_lora.py', run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fails", "freezes"])
def test_a_process_that_fails_or_freezes_ends_both_and_the_checkpoint_stays(forked, tiny_model, six_clips, encodings, tmp_path, what):
    flags = {"max_train_steps": 50, "checkpointing_steps": 2, "process_timeout_minutes": 0.1}
    line = words(tiny_model, six_clips, tmp_path / "out", encodings, **flags)
    if what == "fails":
        codes, output = forked.run(line, processes=2, before=IN_STEP_5.format(action="raise RuntimeError('only here')"))
        assert all(codes)
        assert "only here" in output, output[-3000:]
    else:  # the launcher ends the frozen one
        program = PROGRAM.format(change=IN_STEP_5.format(action="time.sleep(300)"))
        run = start([*TWO[:-1], "--no-python", sys.executable, "-c", program, "train_cogvideox_lora.py"], line)
        output = run.communicate(timeout=150)[0]  # 6 seconds, and 30 that the launcher gives a process to end
        assert run.returncode != 0
        assert "imed out" in output, output[-3000:]
    assert max(steps_of(tmp_path / "out")) == 4
    assert checkpoint.choose_checkpoint("latest", tmp_path / "out")[1]["step"] == 4


@pytest.mark.numeric
@pytest.mark.slow
def test_more_processes_than_clips_train_each_clip_with_noise_of_its_own(forked, tiny_model, six_clips, train, tmp_path):
    data = tmp_path / "one clip"
    (data / "videos").mkdir(parents=True)
    for name in ("prompts.txt", "videos.txt"):
        (data / name).write_text((six_clips / name).read_text().splitlines()[0] + "\n")
    listed = (data / "videos.txt").read_text().strip()
    shutil.copy(six_clips / listed, data / listed)
    line = words(tiny_model, data, tmp_path / "two", tmp_path / "cache", max_train_steps=3, eval_clips=2, **STEADY_ADAM)
    codes, output = forked.run(line, processes=2)
    assert codes == [0, 0], output[-2000:]
    assert "1 clips; 1 per batch x 2 processes" in output
    flags = {"data": data, "cache": tmp_path / "cache", "max_train_steps": 3} | STEADY_ADAM
    assert worst_difference(lora_of(tmp_path / "two"), lora_of(train(train_batch_size=2, **flags))) < STEADY_BOUND
    assert worst_difference(lora_of(tmp_path / "two"), lora_of(train(**flags))) > 1e-4  # the same noise on both would be this


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs name spaces of mounts")
def test_two_machines_that_do_not_share_the_output_folder_are_refused(forked, tiny_model, six_clips, encodings, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", output], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    blind = f"""
import cogvideox.files as files
files.SECONDS_UNTIL_VISIBLE = 2
if rank == 1:
    import ctypes, subprocess
    assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS: its mounts are its own from here on
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", {str(output)!r}], check=True)
"""
    runs = forked.start(words(tiny_model, six_clips, output, encodings), 2, blind, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    told = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [4, 4], told
    assert f"--output_dir {output}: must be on a file system that all machines share; process 1 on" in told[0]
    assert "--encoding_cache_dir" not in told[0]
    assert not (output / "metrics.jsonl").exists()
    assert list(output.glob(".shared-*")) == []


@pytest.mark.slow
def test_a_failing_validation_changes_no_bit_of_training(train, plain_run, monkeypatch, capsys):
    plain, other = plain_run(max_train_steps=3, lora_dropout=0.2), plain_run(max_train_steps=3, lora_dropout=0.2, seed=1)

    failures = itertools.cycle((torch.OutOfMemoryError, RuntimeError))

    def broken(*args, **kwargs):
        torch.rand(7)
        raise next(failures)("no memory for this video")

    monkeypatch.setattr(validation, "sample_latents", broken)
    folder = train(max_train_steps=3, lora_dropout=0.2, validation_prompt="a prompt of this test alone", validation_steps=1)
    assert capsys.readouterr().err.count("no memory for this video") == 4  # three steps and the base model
    assert same(lora_of(plain), lora_of(folder))
    assert not same(lora_of(plain), lora_of(other))


# -----------------------------------------------------------------------------
# Security and hub


@pytest.mark.slow
def test_a_token_in_the_environment_reaches_no_file_and_no_line(forked, tiny_model, six_clips, encodings, tmp_path):
    token = "hf_" + "q" * 34
    flags = {"report_to": "tensorboard", "validation_prompt": "a rabbit", "push_to_hub": True}
    codes, output = forked.run(words(tiny_model, six_clips, tmp_path / "out", encodings, **flags), HF_TOKEN=token)
    assert codes == [1], output[-2000:]  # there is no hub here
    assert "--push_to_hub: the upload failed" in output
    assert token not in output
    files = content(tmp_path / "out")
    assert any("tfevents" in name for name in files)
    assert "checkpoint-2/manifest.json" in files
    assert [name for name, blob in files.items() if token.encode() in blob] == []
    assert [path for path in encodings.rglob("*") if path.is_file() and token.encode() in path.read_bytes()] == []


def test_a_token_in_the_hubs_own_message_is_not_shown(train, monkeypatch, capsys, tmp_path):
    token = "hf_" + "q" * 34

    def refused(*args):
        raise OSError(f"401 Unauthorized for Bearer {token}")

    monkeypatch.setattr(hub, "push", refused)
    ended(1, train, output=tmp_path / "out", push_to_hub=True, hub_token=token)
    told = capsys.readouterr().err
    assert "401 Unauthorized" in told
    assert token not in told


def test_a_failed_push_is_in_the_status_file(train, monkeypatch, tmp_path):
    def refused(*args):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(hub, "push", refused)
    ended(1, train, output=tmp_path / "out", push_to_hub=True)
    assert json.loads((tmp_path / "out/status.json").read_text())["code"] == 1


def test_a_failing_upload_on_an_existing_repository_keeps_every_local_file(train, plain_run, monkeypatch, tmp_path, capsys):
    right, other = plain_run(), plain_run(seed=1)

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, name, exist_ok, private):
            assert exist_ok
            assert private
            return type("Repository", (), {"repo_id": name})()

        def upload_folder(self, **settings):
            raise ConnectionError("the line went dead")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    ended(1, train, output=tmp_path / "out", push_to_hub=True)
    assert "the line went dead" in capsys.readouterr().err
    assert same(lora_of(tmp_path / "out"), lora_of(right))
    assert checkpoint.read_manifest(tmp_path / "out/checkpoint-2")["step"] == 2
    assert not same(lora_of(tmp_path / "out"), lora_of(other))
