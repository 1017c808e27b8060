"""Validation, trackers, checkpoints, the model card and the hub: what a run leaves behind."""

import gc
import json
import re
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_cogvideox_lora as script
from cogvideox import checkpoint, hub, lora, validation
from cogvideox.files import FILE_LIST, read_json
from cogvideox.video import read_video
from tests.conftest import lora_of, same, words
from tests.stand_ins import TrackerPackage


def videos(folder, step=0):
    """name -> frames of a validation."""
    return {p.name: read_video(p) for p in sorted((folder / f"validation/step-{step:06d}").glob("*.mp4"))}


@pytest.mark.slow
def test_validation_flags_change_the_videos(train):
    base = {"validation_prompt": "a rabbit", "max_train_steps": 1, "learning_rate": 0}
    plain = videos(train(**base))
    assert len(plain) == 1
    ((name, frames),) = plain.items()
    assert frames.shape == (9, 32, 48, 3)
    for change in (
        {"guidance_scale": 1},
        {"use_dynamic_cfg": True},
        {"num_inference_steps": 3},
        {"negative_prompt": "a bird in the rain"},
        {"seed": 0},
    ):
        ((_, other),) = videos(train(**base, **change)).items()
        assert (other.astype(int) - frames).any(), change
    ((_, high),) = videos(train(**base, validation_height=48, validation_width=32, validation_frames=5)).items()
    assert high.shape == (5, 48, 32, 3)
    many = videos(train(**base | {"validation_prompt": "a rabbit|a bird"}, validation_prompt_separator="|", num_validation_videos=2))
    assert len(many) == 4
    assert (many[name] == frames).all()  # another prompt beside it changes nothing


def test_validation_comes_when_it_is_due():
    def due(clips_per_step, num_clips, **flags):
        args = SimpleNamespace(**({"validation_steps": 0, "validation_epochs": 0} | flags))
        return [step for step in range(1, 13) if validation.is_due(step, clips_per_step, num_clips, args)]

    assert due(1, 4) == []
    assert due(1, 4, validation_epochs=1) == [4, 8, 12]
    assert due(1, 4, validation_epochs=2) == [8]
    assert due(3, 4, validation_epochs=1) == [2, 3, 4, 6, 7, 8, 10, 11, 12]
    assert due(1, 4, validation_steps=5, validation_epochs=1) == [5, 10]


def test_prompts_that_begin_alike_or_are_signs_get_names_of_their_own():
    prompts = ["a" * 60 + "1", "a" * 60 + "2", "../../etc/passwd", "兔子", "鸟"]
    names = [job["name"] for job in validation.video_jobs(prompts, 2, 0)]
    assert len(set(names)) == 10
    assert all("/" not in name and ".." not in name for name in names)


def test_tensorboard_gets_the_numbers_and_the_videos_but_no_token(train, capfd):
    token = "hf_" + "s" * 30
    flags = {"report_to": "tensorboard", "logging_dir": "tb", "tracker_name": "mine", "hub_token": token}
    folder = train(validation_prompt="a rabbit", max_train_steps=2, eval_clips=1, **flags)
    events = EventAccumulator(str(folder / "tb/mine"), size_guidance={"images": 0})
    events.Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
    assert len(events.Scalars("eval_train_loss")) == 2
    pictures = events.Images(next(tag for tag in events.Tags()["images"] if tag.startswith("validation/")))
    assert [p.step for p in pictures] == [0, 2]
    assert pictures[0].encoded_image_string.startswith(b"GIF")
    written = [p for p in folder.rglob("*") if p.is_file() and token.encode() in p.read_bytes()]
    assert written == []
    assert token not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fails"),
    [("wandb", []), ("wandb", ["init"]), ("comet_ml", ["init"]), ("wandb", ["log", "finish"]), ("comet_ml", ["log", "finish"])],
)
def test_a_tracker_that_fails_is_a_warning_and_the_run_goes_on(train, plain_run, monkeypatch, capsys, name, fails):
    clean = lora_of(plain_run())
    package = TrackerPackage(monkeypatch, name, fails)
    folder = train(report_to=name)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning") and name in line]
    assert same(lora_of(folder), clean)
    assert json.loads((folder / "status.json").read_text())["code"] == 0
    steps = [call["step"] for call in package.of("log")]
    assert (steps, len(package.of("finish"))) == (([], 0) if "init" in fails else ([1, 2], 1))
    reasons = [re.search(r"\(ConnectionError: (\w+): no network\)", line)[1] for line in told]
    assert reasons == fails  # two lines failed, of which one warning tells
    assert all("metrics.jsonl" in line for line in told)


@pytest.mark.slow
def test_one_tracker_of_all_that_cannot_be_opened_costs_the_others_nothing(train, monkeypatch, capsys):
    package = TrackerPackage(monkeypatch, "wandb", fails=["init"])
    folder = train(report_to="all")
    events = EventAccumulator(str(folder / "logs/cogvideox-lora"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert package.of("log") == []
    assert capsys.readouterr().err.count("could not be opened") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "comet_ml"])
def test_a_tracker_is_opened_in_the_output_folder_before_any_encoding_and_not_by_a_rehearsal(train, monkeypatch, name):
    package = TrackerPackage(monkeypatch, name)
    train(report_to=name, dry_run=True)
    assert package.calls == []

    def encode(*args, **kwargs):
        raise RuntimeError("encoding")

    monkeypatch.setattr("cogvideox.encodings.plan_jobs", encode)
    with pytest.raises(RuntimeError, match="encoding"):
        train(report_to=name, tracker_name="mine")
    [opened] = package.of("init")
    assert (opened["project"] if name == "wandb" else opened["project_name"]) == "mine"
    if name == "wandb":  # comet_ml writes no files here
        assert Path(opened["dir"]).name == "logs"
        assert Path(opened["dir"]).is_dir()


@pytest.mark.slow
def test_a_tracker_is_not_opened_before_the_folder_is_claimed_and_cleared(train, plain_run, monkeypatch, tmp_path, capsys):
    folder, package = shutil.copytree(plain_run(), tmp_path / "run"), TrackerPackage(monkeypatch, "wandb")
    with pytest.raises(SystemExit) as stop:
        train(output=folder, report_to="wandb")
    assert (stop.value.code, package.calls) == (4, [])
    del stop
    gc.collect()  # the traceback held the run's lock of its folder
    (folder / "logs").mkdir()
    (folder / "logs/old").write_text("of the earlier run")
    with (folder / FILE_LIST).open("a") as file:
        file.write('{"file": "logs/old"}\n')
    train(output=folder, report_to="tensorboard", overwrite_output_dir=True)
    assert [path.name for path in (folder / "logs").iterdir()] == ["cogvideox-lora"]
    assert list((folder / "logs").rglob("events.out.*"))


def test_a_folder_named_like_a_tracker_is_not_its_package(monkeypatch, tmp_path, capsys):
    (tmp_path / "wandb").mkdir()  # as wandb leaves it where it was started
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.parse_args(words("m", "d", "o", "c", report_to="wandb"))
    assert stop.value.code == 2
    assert "--report_to wandb: no wandb; run pip install wandb" in capsys.readouterr().err


@pytest.mark.slow
def test_logging_steps_average_what_lies_between(plain_run):
    def losses(**flags):
        folder = plain_run(max_train_steps=4, **flags)
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    each, pairs = losses(), losses(logging_steps=2)
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rel=1e-6)


@pytest.mark.slow
def test_an_earlier_run_is_not_written_over_unasked(train, plain_run, tmp_path, capsys):
    folder = shutil.copytree(plain_run(), tmp_path / "run")
    before = lora_of(folder)
    with pytest.raises(SystemExit) as stop:
        train(output=folder, seed=9)
    assert stop.value.code == 4
    del stop
    gc.collect()  # the traceback held the run's lock of its folder
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert same(before, lora_of(folder))
    train(output=folder, seed=9, overwrite_output_dir=True, max_train_steps=1)
    assert not same(before, lora_of(folder))
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-1"]


def test_an_output_folder_that_cannot_be_is_told_at_once(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        train(output=tmp_path / "file")
    assert stop.value.code == 4
    assert "cannot be written to" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Checkpoints


@pytest.mark.slow
def test_old_checkpoints_go_only_after_a_new_one_is_safe(train, monkeypatch, capsys):
    folder = train(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    (folder / "checkpoint-notes").mkdir()
    (folder / "checkpoint-9").write_text("a file")
    (folder / "checkpoint-8").mkdir()  # somebody's own, without a manifest
    assert [step for step, _ in checkpoint.list_checkpoints(folder)] == [3, 4, 8]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(SystemExit) as stop:
        train(output=folder, max_train_steps=6, checkpointing_steps=1, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    assert stop.value.code == 4
    assert "kept: checkpoint-3, checkpoint-4" in capsys.readouterr().err
    assert len(list(folder.glob("checkpoint-*/manifest.json"))) == 2
    assert not list(folder.glob("*.partial"))


def spoiled(folder, how):
    """Break the newest checkpoint in one way."""
    path = folder / "checkpoint-2"
    file = path / "optimizer.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "a flipped bit":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif how == "a missing file":
        file.unlink()
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    elif how == "half a manifest":
        (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:200])
    elif how == "an empty folder":
        shutil.rmtree(path)
        path.mkdir()
    elif how == "a name that leaves the folder":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
        (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def finished(plain_run):
    """A run of two steps with a checkpoint after each."""
    return plain_run(checkpointing_steps=1)


HOW = ["cut", "a flipped bit", "a missing file", "no manifest", "half a manifest", "an empty folder", "a name that leaves the folder"]


@pytest.mark.parametrize("how", HOW)
def test_latest_takes_the_newest_whole_checkpoint_and_says_what_it_skipped(finished, tmp_path, how):
    folder = shutil.copytree(finished, tmp_path / "run")
    path, manifest, remarks = checkpoint.choose_checkpoint("latest", folder)
    assert (path.name, manifest["step"], remarks) == ("checkpoint-2", 2, [])
    spoiled(folder, how)
    path, manifest, remarks = checkpoint.choose_checkpoint("latest", folder)
    assert (path.name, manifest["step"]) == ("checkpoint-1", 1)
    assert len(remarks) == 1
    assert "checkpoint-2" in remarks[0]
    with pytest.raises(checkpoint.BadCheckpoint, match="checkpoint-2"):
        checkpoint.choose_checkpoint("checkpoint-2", folder)


def test_latest_with_nothing_there_starts_at_step_0_and_says_so(train, plain_run, capsys):
    folder = train(resume_from_checkpoint="latest")
    assert "starting at step 0" in capsys.readouterr().err
    assert same(lora_of(folder), lora_of(plain_run()))


def test_a_named_checkpoint_has_to_be_there_and_is_found_by_its_full_path(finished, train, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert stop.value.code == 4
    told = capsys.readouterr().err
    assert "checkpoint-7: no such folder" in told
    assert "line files of" not in told  # no clip was decoded for it
    folder = train(resume_from_checkpoint=str(finished / "checkpoint-1") + "/", output=tmp_path / "elsewhere", max_train_steps=2)
    assert "line files of" in capsys.readouterr().err
    assert same(lora_of(folder), lora_of(finished))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rank": 8}, "--rank was 4 and is 8"),
        ({"lora_alpha": 2}, "--lora_alpha was 4.0 and is 2.0"),
        ({"learning_rate": 1e-3}, "--learning_rate was 0.01 and is 0.001"),
        ({"seed": 1}, "--seed was 42 and is 1"),
        ({"height": 48}, "the clips, captions or their encoding changed (--height was 32 and is 48)"),
        ({"id_token": "T"}, "the clips, captions or their encoding changed (--id_token was None and is 'T')"),
        ({"train_batch_size": 2}, "clips per step (batch x processes x accumulation) changed (were 1, are 2)"),
    ],
)
def test_resuming_with_flags_that_would_train_something_else_is_refused_with_the_difference(
    finished, train, tmp_path, capsys, monkeypatch, change, sentence
):
    folder, opened = shutil.copytree(finished, tmp_path / "run"), []
    monkeypatch.setattr(script.metrics, "open_trackers", lambda *arguments: opened.append(arguments))
    with pytest.raises(SystemExit) as stop:
        train(output=folder, resume_from_checkpoint="latest", max_train_steps=4, **change)
    assert stop.value.code == 4
    told = capsys.readouterr().err
    assert sentence in told
    assert "rehearsal: " not in told  # nothing was encoded or loaded for it
    assert "encoding clips" not in told
    assert "encoding captions" not in told
    assert opened == []  # a tracker would show an empty run
    del stop
    gc.collect()  # the traceback held the run's lock of its folder
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=2)
    assert len(opened) == 1


@pytest.mark.slow
def test_resuming_on_another_base_model_is_refused(finished, train, tmp_path, tiny_model, capsys):
    from demo.make_model import make_model

    folder = shutil.copytree(finished, tmp_path / "run")
    other = make_model(tmp_path / "other", seed=1, vae_channels=8, heads=2, head_width=16)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(other / part)
        shutil.copytree(tiny_model / part, other / part)
    with pytest.raises(SystemExit):
        train(model=other, output=folder, resume_from_checkpoint="latest", max_train_steps=4)
    assert "the base model's transformer changed" in capsys.readouterr().err


def test_resuming_with_flags_that_only_watch_or_move_things_is_allowed(finished, train, plain_run, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=3, checkpointing_steps=7, eval_clips=1, logging_steps=3)
    assert same(lora_of(folder), lora_of(plain_run(max_train_steps=3)))


def test_a_checkpoint_holds_no_pickle_and_its_files_follow_the_umask(finished):
    names = {p.suffix for p in finished.rglob("checkpoint-*/*")}
    assert names == {".safetensors", ".json"}
    assert stat.S_IMODE((finished / "pytorch_lora_weights.safetensors").stat().st_mode) == 0o644
    assert all(t.dtype == torch.float32 for t in load_file(finished / "checkpoint-2/adapter.safetensors").values())


def test_weights_that_are_not_finite_are_never_written(tiny_model, tmp_path):
    from cogvideox.model import load_transformer

    transformer = load_transformer(tiny_model, torch.float32)
    parameters = lora.add_lora(transformer, 4, 4.0, 0.0, ["to_q"], seed=0)
    with torch.no_grad():
        parameters[1][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        lora.write(tmp_path, lora.export(transformer, lora.live_state(transformer)), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_of_an_earlier_release_whose_files_name_no_base_is_resumed_to_the_same_bits(train, plain_run, tiny_model, monkeypatch):
    straight = plain_run(max_train_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(lora, "facts", lambda args, transformer: {"rank": str(args.rank)})
        folder = train(max_train_steps=2)
    earlier = folder / "checkpoint-2/pytorch_lora_weights.safetensors"
    assert lora.trained_on(earlier) == {}
    train(output=folder, resume_from_checkpoint="latest", max_train_steps=3)
    assert same(lora_of(folder), lora_of(straight))
    assert lora.trained_on(folder / "pytorch_lora_weights.safetensors") == lora.base_facts(
        read_json(tiny_model / "transformer/config.json")
    )
    started = train(max_train_steps=1, init_lora=earlier)
    assert not same(lora_of(started), lora_of(plain_run(max_train_steps=1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"optimizer": "prodigy", "learning_rate": 1.0}, {"use_8bit_adam": True, "rank": 128}, {"optimizer": "adam"}]
)
def test_every_optimizer_resumes_with_the_same_bits(train, settings):
    straight = train(max_train_steps=4, checkpointing_steps=2, **settings)
    again = shutil.copytree(straight, straight.parent / "again")
    shutil.rmtree(again / "checkpoint-4")
    train(max_train_steps=4, checkpointing_steps=2, output=again, resume_from_checkpoint="latest", **settings)
    assert same(lora_of(straight), lora_of(again))
    assert not same(lora_of(straight), load_file(straight / "checkpoint-2/pytorch_lora_weights.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation", "batch"), [(1, 1), (2, 1), (1, 2)])
def test_the_learning_rate_at_a_step_does_not_depend_on_accumulation_or_batch(train, accumulation, batch):
    flags = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_train_steps": 6, "learning_rate": 1.0e-2}
    folder = train(gradient_accumulation_steps=accumulation, train_batch_size=batch, **flags)
    rates = [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    half_cosine = [0.5e-2 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) for k in range(4)]
    assert rates == pytest.approx([0, 0.5e-2, *half_cosine], abs=1e-9)


def test_the_logged_rate_includes_prodigys_estimate_of_the_step_size(train, monkeypatch):
    import prodigyopt

    used, step = [], prodigyopt.Prodigy.step

    def watched(self, closure=None):
        used.append(self.param_groups[0]["d"])
        step(self, closure)
        self.param_groups[0]["d"] *= 2  # it grows slowly

    monkeypatch.setattr(prodigyopt.Prodigy, "step", watched)
    folder = train(optimizer="prodigy", learning_rate=0.5, max_train_steps=6)
    rates = [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.5 * d for d in used[-6:]])  # before them the rehearsal's
    assert rates[0] == pytest.approx(0.5e-6)
    assert rates[-1] > 1.5 * rates[0]


def test_a_run_of_epochs_takes_the_steps_that_hold_them(train):
    folder = train(max_train_steps=None, num_train_epochs=2, gradient_accumulation_steps=4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]  # 12 clips, 4 a step
    assert lines[-1]["epoch"] == 2.0


# -----------------------------------------------------------------------------
# Card and hub


def test_the_model_card_is_right_and_its_prompts_are_escaped(train, tiny_model):
    folder = train(validation_prompt="a [rabbit](x) *runs*", id_token="TOK", lora_alpha=2)
    card = (folder / "README.md").read_text()
    header = ModelCard(card).data
    assert header.instance_prompt == "TOK"
    assert header.base_model is None  # a local folder is no hub id
    assert str(tiny_model.parent) not in card
    assert "| 4 | 2 | to_q, to_k, to_v, to_out.0 |" in card
    assert r"a \[rabbit\](x) \*runs\*" in card
    links = [part.split(")")[0] for part in card.split("](")[1:] if part.startswith("validation/")]
    assert len(links) == 1
    assert (folder / links[0]).exists()
    assert "num_frames=9, height=32, width=48" in card


@pytest.mark.parametrize("own", [True, False])
def test_a_push_beside_a_readme_of_ones_own_uploads_the_card_and_not_that(tmp_path, monkeypatch, own):
    from cogvideox import hub

    sent = {}

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, allow_patterns, **options):
            sent["README.md in the folder"] = "README.md" in allow_patterns

        def upload_file(self, path_or_fileobj, path_in_repo, **options):
            sent[path_in_repo] = script.Path(path_or_fileobj).read_text()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model_card.md").write_text("the card")
    if own:
        (tmp_path / ".files_of_runs.jsonl").write_text('{"file": "README.md"}')
    hub.push(tmp_path, SimpleNamespace(hub_model_id="me/x", output_dir=str(tmp_path)), None)
    assert sent == ({"README.md in the folder": True} if own else {"README.md in the folder": False, "README.md": "the card"})


def test_a_push_uploads_the_result_and_nothing_else(train, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, name, exist_ok, private):
            seen.update(name=name, private=private)
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            from huggingface_hub.utils import filter_repo_objects

            files = [str(p.relative_to(folder_path)) for p in script.Path(folder_path).rglob("*") if p.is_file()]
            seen["card"] = (script.Path(folder_path) / "README.md").read_text()
            seen["files"] = set(filter_repo_objects(files, allow_patterns=allow_patterns))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder = train(
        push_to_hub=True, hub_token="hf_" + "x" * 30, hub_model_id="bunny", validation_prompt="a rabbit", report_to="tensorboard"
    )
    assert (seen["token"], seen["name"], seen["private"]) == ("hf_" + "x" * 30, "bunny", True)
    kinds = {name.split("/")[-1].split(".")[-1] for name in seen["files"]}
    assert "pytorch_lora_weights.safetensors" in seen["files"]
    assert kinds == {"safetensors", "md", "jsonl", "png", "mp4"}
    assert not [name for name in seen["files"] if name.startswith(("checkpoint", "logs"))]
    assert "hf_x" not in (folder / "checkpoint-2/manifest.json").read_text()


def test_a_push_that_fails_keeps_the_result_and_exits_1(train, monkeypatch, capsys, tmp_path):
    def refused(*args):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(hub, "push", refused)
    with pytest.raises(SystemExit) as stop:
        train(push_to_hub=True, output=tmp_path / "out")
    assert stop.value.code == 1
    assert "401 Unauthorized" in capsys.readouterr().err
    assert len(lora_of(tmp_path / "out")) == 16


def test_hub_flags_reach_the_hub_client(monkeypatch, tiny_model, tmp_path):
    from cogvideox.folder import find_model

    asked = {}

    def download(name, revision, cache_dir, token, allow_patterns, tqdm_class):
        asked.update(name=name, revision=revision, token=token, patterns=allow_patterns)
        return str(tiny_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("someone/model", "abc", "fp16", tmp_path, "hf_t") == tiny_model
    assert (asked["name"], asked["revision"], asked["token"]) == ("someone/model", "abc", "hf_t")
    assert "transformer/*.fp16*.safetensors" in asked["patterns"]
    assert not [p for p in asked["patterns"] if "bin" in p or p.endswith(".pt")]


@pytest.mark.slow
def test_a_variant_loads_the_files_of_that_name(tiny_model, tmp_path, train, plain_run):
    folder = shutil.copytree(tiny_model, tmp_path / "variant")
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    assert same(lora_of(train(model=folder, variant="fp16")), lora_of(plain_run()))
    with pytest.raises(SystemExit):
        train(model=folder)


@pytest.mark.slow
def test_tf32_is_as_asked(train):
    for asked in (True, None):
        train(allow_tf32=asked, max_train_steps=1)
        assert torch.backends.cuda.matmul.allow_tf32 is bool(asked)


def test_slicing_and_tiling_reach_the_vae(tiny_model):
    from cogvideox.model import load_vae

    for slicing, tiling in ((True, False), (False, True)):
        vae = load_vae(tiny_model, torch.device("cpu"), slicing=slicing, tiling=tiling)
        assert (vae.use_slicing, vae.use_tiling) == (slicing, tiling)
