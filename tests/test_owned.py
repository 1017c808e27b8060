"""What no run wrote is neither replaced nor removed."""

import json
import shutil
import subprocess

import pytest

from cogvideox import checkpoint, owned
from cogvideox.files import FILE_LIST, LORA_FILE
from tests.conftest import lora_of, same

MINE = b"mine, and of no run"
BUSY = {"validation_prompt": "a rabbit", "validation_steps": 1, "eval_clips": 1, "eval_share": 0.2, "report_to": "tensorboard"}
NOTES = ["notes.txt", "validation/notes.txt", "validation/step-000000/mine.mp4", "best/mine.safetensors", "logs/notes.txt"]
NOTES += ["checkpoint-2/notes.txt", "encoded/mine.mp4", "transformer/notes.txt"]


def put(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(MINE)


def untouched(folder, names):
    return {name: (folder / name).read_bytes() for name in names} == dict.fromkeys(names, MINE)


def files_of(folder):
    """The files of a folder but those of checkpoints and hidden ones."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(("checkpoint-", "."))}


@pytest.fixture
def busy_run(plain_run, tmp_path):
    """A copy of a run that wrote a file of each kind."""
    return shutil.copytree(plain_run(**BUSY), tmp_path / "busy")


def refused(train, capsys, **flags):
    with pytest.raises(SystemExit) as stop:
        train(**flags)
    assert stop.value.code == 4
    return capsys.readouterr().err


@pytest.mark.slow
def test_a_run_lists_every_file_that_it_writes_outside_its_checkpoints(busy_run):
    assert files_of(busy_run) == set(owned.listed(busy_run))
    assert {"README.md", "loss.png", "best/" + LORA_FILE, "validation/step-000002/videos.json"} <= files_of(busy_run)
    assert any(name.startswith("logs/") and "tfevents" in name for name in files_of(busy_run))


@pytest.mark.slow
@pytest.mark.parametrize("with_list", [True, False], ids=["this version", "an earlier version, without a list"])
def test_overwriting_removes_what_a_run_wrote_and_keeps_what_is_beside_it(train, busy_run, with_list):
    own = files_of(busy_run)
    put(busy_run, NOTES)
    if not with_list:
        (busy_run / FILE_LIST).unlink()
    train(output=busy_run, overwrite_output_dir=True, max_train_steps=1)
    assert untouched(busy_run, NOTES)
    again = {
        "README.md",
        "loss.png",
        "report.html",
        "run.json",
        "metrics.jsonl",
        "status.json",
        LORA_FILE,
        "dataset.json",
        "dataset_report.txt",
    }
    assert files_of(busy_run) - set(NOTES) - {name for name in own if name.startswith("encoded/")} == again
    assert [path.name for path in sorted(busy_run.glob("checkpoint-*/manifest.json"))] == ["manifest.json"]
    assert (busy_run / "checkpoint-1/manifest.json").exists()
    assert again <= set(owned.listed(busy_run))  # the next run finds its files


@pytest.mark.slow
def test_a_run_without_a_checkpoint_is_followed_by_one_that_keeps_the_notes_beside_its_videos(train, busy_run):
    for name in ("checkpoint-2", LORA_FILE):
        path = busy_run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    put(busy_run, ["validation/notes.txt"])
    train(output=busy_run, max_train_steps=1)
    assert untouched(busy_run, ["validation/notes.txt"])
    assert [path.name for path in (busy_run / "validation").iterdir()] == ["notes.txt"]
    assert not (busy_run / "best").exists()


@pytest.mark.slow
def test_a_readme_of_ones_own_stays_and_the_card_goes_beside_it(train, tmp_path, capsys):
    folder = tmp_path / "checkout"
    folder.mkdir()
    put(folder, ["README.md", "videos.txt"])
    train(output=folder, max_train_steps=1)
    told = capsys.readouterr().err
    assert told.index("its README.md was not written by a run and stays") < told.index("line files of")
    assert f"how to use it: {folder / 'model_card.md'}" in told
    assert "A LoRA for" in (folder / "model_card.md").read_text()
    train(output=folder, overwrite_output_dir=True, max_train_steps=1, rank=8)
    assert "| 8 | 8 |" in (folder / "model_card.md").read_text()
    assert untouched(folder, ["README.md", "videos.txt"])


@pytest.mark.slow
def test_a_card_that_was_changed_since_stays(train, busy_run):
    card = busy_run / "README.md"
    card.write_text(card.read_text() + "my own words\n")
    changed = card.read_text()
    train(output=busy_run, resume_from_checkpoint="latest", max_train_steps=3, eval_share=0.2)
    assert card.read_text() == changed
    assert "trained for 3 optimizer steps" in (busy_run / "model_card.md").read_text()
    train(output=busy_run, overwrite_output_dir=True, max_train_steps=1)
    assert card.read_text() == changed
    assert "trained for 1 optimizer steps" in (busy_run / "model_card.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("with_list", [True, False])
def test_a_card_that_a_run_wrote_is_written_anew(train, busy_run, with_list):
    if not with_list:
        (busy_run / FILE_LIST).unlink()
    train(output=busy_run, resume_from_checkpoint="latest", max_train_steps=3, eval_share=0.2)
    assert "trained for 3 optimizer steps" in (busy_run / "README.md").read_text()
    assert not (busy_run / "model_card.md").exists()


IN_THE_WAY = ["loss.png", "dataset.json", "run.json", "metrics.jsonl", LORA_FILE, "best/" + LORA_FILE, "transformer/config.json"]
IN_THE_WAY += ["validation/step-000000/videos.json", "encoded/00.mp4", "model_card.md"]


@pytest.mark.parametrize("name", IN_THE_WAY)
@pytest.mark.parametrize(
    "flags", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}], ids=lambda flags: " ".join(flags)
)
def test_a_file_that_no_run_wrote_and_a_run_would_replace_is_refused(train, tmp_path, capsys, name, flags):
    folder = tmp_path / "folder"
    put(folder, [name, "notes.txt"])
    kind = {"training_type": "sft"} if name.startswith("transformer/") else {}
    told = refused(train, capsys, output=folder, **flags, **kind)
    assert f"holds files that no run wrote and this one would replace ({name})" in told
    assert untouched(folder, [name, "notes.txt"])
    assert files_of(folder) == {name, "notes.txt"}


@pytest.mark.parametrize("name", ["best/" + LORA_FILE, "encoded/00.mp4", "validation/step-000000/videos.json"])
def test_a_file_behind_a_linked_folder_is_not_replaced(train, tmp_path, capsys, name):
    part, _, inner = name.partition("/")
    put(tmp_path / "mine", [inner])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / part).symlink_to(tmp_path / "mine")
    assert f"this one would replace ({name})" in refused(train, capsys, output=tmp_path / "run", overwrite_output_dir=True)
    assert untouched(tmp_path / "mine", [inner])


@pytest.mark.slow
def test_a_linked_folder_of_ones_own_choice_serves_every_run(train, tmp_path):
    put(tmp_path / "scratch", ["notes.txt"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best").symlink_to(tmp_path / "scratch")
    for seed in (1, 2):
        train(output=tmp_path / "run", max_train_steps=1, overwrite_output_dir=True, eval_share=0.2, eval_clips=1, seed=seed)
        assert (tmp_path / "scratch" / LORA_FILE).is_file()
    assert untouched(tmp_path / "scratch", ["notes.txt"])


@pytest.mark.slow
def test_two_runs_one_after_the_other_through_a_link_and_beside_ones_own_transformer(train, tmp_path):
    put(tmp_path / "real", ["transformer/config.json"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    train(output=tmp_path / "link", max_train_steps=1)
    with (tmp_path / "real" / FILE_LIST).open("a") as file:
        file.write('{"file": "half of a li')  # as a kill leaves it
    first = lora_of(tmp_path / "real")
    train(output=tmp_path / "link", max_train_steps=1, dry_run=True, overwrite_output_dir=True)
    assert same(first, lora_of(tmp_path / "real"))  # a rehearsal removes nothing
    train(output=tmp_path / "link", max_train_steps=1, overwrite_output_dir=True, seed=1)
    train(output=tmp_path / "real", max_train_steps=1, overwrite_output_dir=True, seed=1)
    assert not same(first, lora_of(tmp_path / "real"))
    assert untouched(tmp_path / "real", ["transformer/config.json"])


@pytest.mark.slow
def test_the_working_folder_of_a_checkout_and_the_data_folder_may_be_the_output(train, clips, monkeypatch):
    subprocess.run(["git", "init", "-q", clips], check=True)
    before = {path: path.read_bytes() for path in clips.rglob("*") if path.is_file()}
    monkeypatch.chdir(clips)
    train(data=clips, output=".", max_train_steps=1)
    first = lora_of(clips)
    train(data=clips, output=".", max_train_steps=1, overwrite_output_dir=True, seed=1)
    assert {path: path.read_bytes() for path in before} == before
    assert not same(first, lora_of(clips))


def test_notes_in_checkpoints_outlive_them(tmp_path):
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        put(folder, [*checkpoint.RESULTS["lora"].FILES, "adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
    put(tmp_path, ["checkpoint-1/notes.txt", "checkpoint-x.partial/notes.txt"])
    checkpoint.prune_checkpoints(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoint-1").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "checkpoint-2").exists()
    assert (tmp_path / "checkpoint-3/manifest.json").exists()
    checkpoint.Saver(tmp_path, None, enabled=True)
    assert untouched(tmp_path, ["checkpoint-1/notes.txt", "checkpoint-x.partial/notes.txt"])


def test_notes_in_a_checkpoint_move_into_the_one_that_replaces_it(train, tmp_path):
    put(tmp_path / "run", ["checkpoint-1/notes.txt", "checkpoint-1/transformer/notes.txt", "checkpoint-1/state.json"])
    train(output=tmp_path / "run", max_train_steps=1)
    assert untouched(tmp_path / "run", ["checkpoint-1/notes.txt", "checkpoint-1/transformer/notes.txt"])
    assert checkpoint.read_manifest(tmp_path / "run/checkpoint-1")["step"] == 1


@pytest.mark.slow
def test_a_name_whose_file_is_gone_is_free_for_others(train, busy_run, capsys):
    (busy_run / "loss.png").unlink()
    owned.forget_missing_files(busy_run)
    put(busy_run, ["loss.png"])
    assert "(loss.png)" in refused(train, capsys, output=busy_run, overwrite_output_dir=True)
    assert untouched(busy_run, ["loss.png"])


def test_a_list_that_names_files_elsewhere_removes_none(tmp_path):
    put(tmp_path, ["elsewhere.txt", "run/own.txt", "run/kept.txt"])
    (tmp_path / "run/linked").symlink_to(tmp_path)
    names = ["../elsewhere.txt", str(tmp_path / "elsewhere.txt"), "linked/elsewhere.txt", "own.txt"]
    lines = [json.dumps({"file": name}) for name in names] + ['{"file": 3}', "[]", "broken"]
    (tmp_path / "run" / FILE_LIST).write_text("\n".join(lines))
    owned.remove_files_of_runs(tmp_path / "run")
    assert untouched(tmp_path, ["elsewhere.txt", "run/kept.txt"])
    assert not (tmp_path / "run/own.txt").exists()
