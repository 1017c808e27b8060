"""The whole script, in this process: what it writes, what it changes, and what it must not."""

import contextlib
import itertools
import json
import math
import shutil

import pytest
import torch
from diffusers import CogVideoXPipeline
from diffusers.loaders import lora_base
from safetensors import safe_open

import train_cogvideox_lora as script
from cogvideox.video import read_video
from tests.conftest import lora_of, same
from tests.stand_ins import OneProcess, flags_of, make_trained


def test_a_run_writes_exactly_these_files(train):
    folder = train(validation_prompt="a rabbit:::a bird", max_train_steps=4, checkpointing_steps=2, eval_clips=2, validation_steps=2)
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    videos = {"a rabbit", "a bird", "contact sheet", "videos.json"}
    states = {"adapter.safetensors", "manifest.json", "optimizer.safetensors", "pytorch_lora_weights.safetensors", "state.json"}
    preview = {f"encoded/{name}" for name in ("00.mp4", "01.mp4", "02.mp4", "contact_sheet.png")}
    assert {name for name in names if name.startswith("encoded/")} == preview
    names -= preview
    shown = {name.split("/")[-1].rsplit("-", 2)[0] for name in names if name.endswith(".mp4")}
    expected = {".lock", "README.md", "status.json", "dataset_report.txt", "loss.png", "metrics.jsonl", "pytorch_lora_weights.safetensors"}
    expected |= {"report.html", "run.json", "dataset.json", ".files_of_runs.jsonl"}
    expected |= {f"checkpoint-{step}/{name}" for step in (2, 4) for name in states}
    assert shown == {"00-a-rabbit", "01-a-bird"}
    assert {name for name in names if not name.startswith("validation")} == expected
    assert len([name for name in names if name.startswith("validation")]) == 3 * len(videos)


@pytest.mark.slow
def test_the_first_clips_are_shown_as_encoded_also_when_the_cache_has_them_all(train, tmp_path, capsys):
    def shown(**flags):
        folder = train(cache=tmp_path / "cache", max_train_steps=1, **flags) / "encoded"
        assert (folder / "contact_sheet.png").stat().st_size > 1000
        return [read_video(folder / f"{number:02d}.mp4") for number in range(3)], capsys.readouterr().err

    (first, cold), (again, warm), (later, _) = shown(), shown(), shown(skip_frames_start=9)
    assert "0 of 6 clips" in cold
    assert "6 of 6 clips and 7 of 7 captions are cached" in warm
    assert [video.shape for video in again] == [(9, 32, 2 * 48, 3)] * 3  # the clip, and beside it what the VAE makes of it
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert all((video[:, :, :48] != video[:, :, 48:]).any() for video in again)
    assert any((a != b).any() for a, b in zip(first, later, strict=True))


def test_metrics_hold_one_line_a_step_and_the_scores(train):
    folder = train(max_train_steps=3, eval_clips=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval_train_loss" in line] == [0, 3]
    wanted = {"step", "epoch", "loss", "grad_norm", "learning_rate", "seconds_per_step", "data_wait_percent", "peak_memory_gib"}
    assert all(wanted == set(line) for line in lines if "loss" in line)
    assert all(line["grad_norm"] > 0 for line in lines if "loss" in line)


def test_training_lowers_the_loss_on_fixed_noise_and_a_learning_rate_of_zero_does_not(train):
    def fixed(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line["eval_train_loss"] for line in lines if "eval_train_loss" in line]

    start, end = fixed(train(max_train_steps=30, eval_clips=4, rank=16))
    assert end < start - 0.02
    start, end = fixed(train(max_train_steps=3, eval_clips=4, rank=16, learning_rate=0))
    assert end == start


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(train, plain_run):
    first, again, other = plain_run(), train(), plain_run(seed=43)
    assert same(lora_of(first), lora_of(again))
    assert not same(lora_of(first), lora_of(other))
    assert all(tensor.abs().max() > 0 for tensor in lora_of(first).values())


def test_the_base_model_is_unchanged_and_every_lora_weight_moved(train, tiny_model, monkeypatch):
    from cogvideox import lora
    from cogvideox.linear import FrozenLinear

    kept = {}
    load = lora.load_transformer

    def remember(*args, **kwargs):
        kept["model"] = load(*args, **kwargs)
        kept["before"] = {name: p.detach().clone() for name, p in kept["model"].state_dict().items()}
        return kept["model"]

    monkeypatch.setattr(lora, "load_transformer", remember)
    train(max_train_steps=3)
    after = dict(kept["model"].state_dict())
    after |= {f"{name}.weight": module.weight for name, module in kept["model"].named_modules() if isinstance(module, FrozenLinear)}
    after = {name.replace(".base_layer", ""): p for name, p in after.items()}
    assert all(torch.equal(kept["before"][name], after[name]) for name in kept["before"])
    trained = {name: p for name, p in after.items() if ".lora_" in name}
    assert len(trained) == 2 * 4 * 2  # A and B, four targets, two blocks
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert all(p.abs().max() > 0 for name, p in trained.items() if ".lora_B." in name)  # they start at zero


@pytest.mark.parametrize(("rank", "alpha"), [(8, 1), (8, 4), (8, 8), (4, 8)])
def test_the_exported_lora_gives_the_trained_strength_in_a_stock_pipeline(train, tiny_model, monkeypatch, rank, alpha):
    from cogvideox import checkpoint

    kept = {}
    snapshot = checkpoint.take_snapshot

    def remember(trained):
        kept["live"] = trained.transformer
        return snapshot(trained)

    monkeypatch.setattr(checkpoint, "take_snapshot", remember)
    folder = train(rank=rank, lora_alpha=alpha, max_train_steps=4, learning_rate=0.03)
    pipeline = CogVideoXPipeline.from_pretrained(tiny_model)
    inputs = {
        "hidden_states": torch.randn(1, 3, 16, 4, 6, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": torch.randn(1, 226, 32, generator=torch.Generator().manual_seed(2)),
        "timestep": torch.tensor([300]),
        "return_dict": False,
    }
    with torch.no_grad():
        base = pipeline.transformer(**inputs)[0]
        monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False, raising=False)  # offline, an older diffusers asks for the file's name
        pipeline.load_lora_weights(str(folder))
        loaded = pipeline.transformer(**inputs)[0]
        live = kept["live"].eval()(**inputs)[0]
    effect = (live - base).abs().max()
    assert effect > 1e-3
    assert (loaded - live).abs().max() < 1e-5
    pipeline.transformer.set_adapters(pipeline.transformer.active_adapters(), weights=0.5)
    with torch.no_grad():
        half = pipeline.transformer(**inputs)[0]
    assert (half - live).abs().max() > 0.1 * effect  # the comparison would notice a wrong strength


def test_the_file_says_how_to_use_it_and_carries_no_alpha(train):
    folder = train(id_token="BUNNY")
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    assert metadata["trigger"] == "BUNNY"
    assert metadata["example_prompt"].startswith("BUNNY BUNNYTOON")
    assert "lora_adapter_metadata" not in metadata
    assert all(name.startswith("transformer.transformer_blocks.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits_as_an_unbroken_one(train, plain_run, tmp_path, stop):
    settings = {
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "caption_dropout": 0.5,
        "lora_dropout": 0.2,
        "random_flip": True,
    }
    straight = plain_run(max_train_steps=6, checkpointing_steps=1, **settings)
    broken = shutil.copytree(straight, tmp_path / "broken")
    (broken / "pytorch_lora_weights.safetensors").unlink()
    for step in range(stop + 1, 7):  # as if the run had ended here
        (broken / f"checkpoint-{step}" / "manifest.json").unlink()
        (broken / f"checkpoint-{step}" / "optimizer.safetensors").unlink()
    train(max_train_steps=6, checkpointing_steps=1, resume_from_checkpoint=f"checkpoint-{stop}", output=broken, **settings)
    assert same(lora_of(straight), lora_of(broken))
    for name in ("optimizer.safetensors", "state.json"):
        assert (straight / "checkpoint-6" / name).read_bytes() == (broken / "checkpoint-6" / name).read_bytes()
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (straight, broken)]
    exact = ("step", "loss", "grad_norm", "learning_rate")
    assert [[line[name] for name in exact] for line in lines[0]] == [[line[name] for name in exact] for line in lines[1]]
    assert not same(lora_of(straight), lora_of(plain_run(max_train_steps=6, seed=7, **settings)))


@pytest.mark.slow
def test_resuming_a_finished_run_trains_nothing(train, plain_run, tmp_path, capsys):
    folder = shutil.copytree(plain_run(), tmp_path / "run")
    before = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    train(output=folder, resume_from_checkpoint="latest")
    told = capsys.readouterr().err
    assert "already complete" in told
    assert "a larger --max_train_steps" in told
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == before


@pytest.mark.slow
def test_validation_changes_no_bit_of_training(train, plain_run):
    plain = plain_run(max_train_steps=4)
    watched = train(max_train_steps=4, validation_prompt="a rabbit", validation_steps=1, eval_clips=3, checkpointing_steps=1)
    assert same(lora_of(plain), lora_of(watched))


@pytest.mark.slow
def test_validation_with_the_same_seed_differs_only_by_the_lora(train):
    still = train(validation_prompt="a rabbit", learning_rate=0)
    moved = train(validation_prompt="a rabbit", learning_rate=0.1, max_train_steps=4)

    def videos(folder, step):
        return next((folder / f"validation/step-{step:06d}").glob("*.mp4")).read_bytes()

    assert videos(still, 0) == videos(still, 2) == videos(moved, 0)
    assert videos(moved, 4) != videos(moved, 0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_loader_workers_changes_nothing(train, plain_run, workers):
    assert same(lora_of(plain_run(max_train_steps=3)), lora_of(train(max_train_steps=3, dataloader_num_workers=workers)))


@pytest.mark.slow
def test_one_batch_of_two_trains_what_two_accumulated_batches_train(train, plain_run):
    batch = lora_of(plain_run(train_batch_size=2, max_train_steps=4))
    accumulated = lora_of(train(gradient_accumulation_steps=2, max_train_steps=4))
    single = lora_of(plain_run(max_train_steps=4))
    worst = max((batch[name] - accumulated[name]).abs().max() for name in batch)
    assert worst < 1e-5
    assert max((batch[name] - single[name]).abs().max() for name in batch) > 100 * worst


def test_a_step_is_logged_then_saved_then_scored_then_shown_and_a_second_run_looks_at_no_base(train, tmp_path, monkeypatch):
    from cogvideox import checkpoint, metrics, preview, report, scoring, validation

    order = []

    def kind_of(line):
        return next(kind for kind in ("loss", "motion", "eval_train_loss") if kind in line)

    def note(owner, name, word):
        plain = getattr(owner, name)

        def noted(*args, **kwargs):
            order.append(word(*args))
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(scoring, "base_score", lambda *args: "base")
    note(preview.Preview, "show", lambda *args: "preview")
    note(checkpoint.Checkpointer, "load", lambda *args: "load")
    note(metrics.Meter, "log", lambda meter, line: f"{kind_of(line)} {line['step']}")
    note(checkpoint.Saver, "save", lambda saver, step, *args: f"save {step}")
    note(validation, "validate", lambda folder, *args: f"videos {int(folder.name[-6:])}")
    note(report, "refresh", lambda folder: "report")
    flags = {"validation_prompt": "a rabbit", "max_train_steps": 3, "checkpointing_steps": 2, "validation_steps": 2, "eval_clips": 1}
    cache = tmp_path / "cache"
    train(cache=cache, **flags)
    scores = ["base", "eval_train_loss 0", "eval_train_loss 2", "report"]
    first_look = [*scores, "videos 0", "motion 0", "report", "videos 2", "motion 2", "report", "preview", "report"]
    last_look = ["eval_train_loss 3", "report", "videos 3", "motion 3", "report", "report"]
    assert order == ["load", "loss 1", "loss 2", "save 2", *first_look, "loss 3", "save 3", *last_look]
    order.clear()
    train(cache=cache, **flags)  # the second run finds encodings, base score and base videos in the cache
    second = ["eval_train_loss 2", "report", "videos 2", "motion 2", "report", "preview", "report"]
    from_cache = ["eval_train_loss 0", "report", "motion 0", "report"]
    assert order == ["load", *from_cache, "loss 1", "loss 2", "save 2", *second, "loss 3", "save 3", *last_look]
    order.clear()
    train(cache=cache, **flags | {"validation_prompt": "a bird", "eval_clips": 2})  # another prompt and other clips
    assert order[1:4] == ["loss 1", "loss 2", "save 2"]
    assert {"base", "videos 0"} < set(order)


@pytest.mark.parametrize(("norm", "moved"), [(1.0, True), (math.inf, False)])
def test_a_step_that_fp16_skips_does_not_move_the_average(norm, moved, tmp_path):
    class Scaled(OneProcess):
        scaler, sync_gradients, gradient_accumulation_steps = object(), True, 1

        def accumulate(self, model):
            return contextlib.nullcontext()

        def backward(self, loss):
            loss.backward()

        def clip_grad_norm_(self, parameters, most):
            return torch.tensor(norm)

    trained = make_trained(Scaled(), ema_decay=0.5)
    args = flags_of(tmp_path, max_grad_norm=1.0)
    batch = {"position": torch.zeros(1), "timestep": torch.zeros(1)}
    outcome = script.train_step(args, trained, itertools.repeat(batch), lambda model, batch: model.trained.sum(), 1)
    assert outcome.finite == moved
    assert (trained.average.optimization_step == 1) == moved
