"""What depends on the base model alone is computed once, after the first step where it can be, and found again by the next run."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from cogvideox import base_model, encodings, launch, lora, scoring, stopping, validation
from cogvideox.files import entry_path
from cogvideox.model import load_transformer
from cogvideox.video import write_video
from tests.stand_ins import UNSCALED, Noise, clips_of, flags_of, make_trained, plan_of

SCHEDULER = CogVideoXDDIMScheduler()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(launch, "free_memory", lambda: None)  # a collection takes a third of a second in a process of tests


def score_of(folder, identity="model", **flags):
    """(the base model's score of a new run, how many forward passes it took). The cache is in `folder`."""
    calls = []

    def losses(model, batch):
        calls.append(1)
        return model.trained.mean().expand(1)

    args = flags_of(folder, **{"eval_clips": 2} | flags)
    scorer = scoring.Scorer(args, make_trained(), losses, Noise(), clips_of(4, 2), UNSCALED, 1000, (), identity)
    scorer.score_what_training_changes()
    return scorer.base, len(calls)


def test_a_second_run_takes_the_score_from_the_cache_unless_anything_that_it_depends_on_differs(tmp_path):
    base, passes = score_of(tmp_path)
    assert passes == 4 * scoring.BANDS  # two clips of each set
    assert score_of(tmp_path) == (base, 0)
    for changes in ({"identity": "another model"}, {"seed": 1}, {"eval_clips": 1}):
        assert score_of(tmp_path, **changes)[1] > 0, changes


def test_the_same_clips_under_other_numbers_have_other_noise_and_another_score(tmp_path):
    class Shifted(Noise):
        clip_keys, prompt_keys = ["new", *Noise.clip_keys], ["new", *Noise.prompt_keys]

    def key(encodings, clips):
        data = clips_of(9)
        data.own = clips
        args = flags_of(tmp_path, eval_clips=2)
        return scoring.Scorer(args, make_trained(), None, encodings, data, UNSCALED, 1000).base_key

    assert key(Noise(), [0, 1]) == key(Noise(), [0, 1])
    assert key(Noise(), [0, 1]) != key(Shifted(), [1, 2])


@pytest.mark.parametrize("content", [b"", b"[]", b'{"train": [NaN], "held_out": null, "gap": null}'])
def test_a_damaged_score_is_computed_again(tmp_path, content):
    base, _ = score_of(tmp_path)
    (entry,) = (tmp_path / "cache/scores").glob("??/*.json")
    entry.write_bytes(content)
    again, passes = score_of(tmp_path)
    assert passes > 0
    assert again == base == base_model.read_score(tmp_path / "cache", entry.stem)


def test_the_identity_of_the_untrained_model_follows_every_setting_that_changes_its_outputs(tmp_path):
    def identity(transformer="weights", scheduler=SCHEDULER, device="cpu", **flags):
        return base_model.identity_of(flags_of(tmp_path, **flags), transformer, scheduler, torch.device(device))

    same = [identity(), identity(fps=9, checkpointing_steps=3)]
    others = [
        identity("other weights"),
        identity(scheduler=CogVideoXDDIMScheduler(snr_shift_scale=1.0)),
        identity(device="cuda"),
        identity(base_precision="int8"),
        identity(mixed_precision="bf16"),
        identity(training_type="sft"),
    ]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 1 + len(others)


@pytest.fixture
def videos(monkeypatch):
    """Videos of one brightness each, as many as `validate` is asked for. Returns [(step, names, was a LoRA on)]."""
    asked = []

    def validate(folder, jobs, rank, world_size, model, *rest):
        asked.append((int(folder.name[-6:]), [job["name"] for job in jobs], not getattr(model, "disabled", False)))
        for job in jobs:
            write_video(folder / job["name"], np.full((5, 32, 48, 3), 10 * len(asked), np.uint8), 8)
        return []

    monkeypatch.setattr(validation, "validate", validate)
    return asked


def test_a_clean_start_and_other_settings_do_not_take_videos_that_lie_in_the_output_folder(tmp_path, videos):
    watcher(tmp_path / "out", tmp_path / "cache").offer(0)
    watcher(tmp_path / "out", tmp_path / "another cache").offer(0)  # its own, with their keys on record
    assert len(videos) == 1
    watcher(tmp_path / "out", tmp_path / "cache", num_inference_steps=7).offer(0)
    assert len(videos) == 2
    (tmp_path / "out/validation/step-000000/videos.json").unlink()
    watcher(tmp_path / "out", tmp_path / "another cache", num_inference_steps=7).offer(0)
    assert len(videos) == 3


def test_videos_of_step_0_depend_on_an_initial_lora(tmp_path, videos):
    for name in ("first", "second"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
        watcher(tmp_path / name, tmp_path / "cache", init_lora=str(tmp_path / f"{name}.safetensors")).offer(0)
    watcher(tmp_path / "none", tmp_path / "cache").offer(0)
    assert len(videos) == 3
    watcher(tmp_path / "again", tmp_path / "cache", init_lora=str(tmp_path / "first.safetensors")).offer(0)
    assert len(videos) == 3


def watcher(output_dir, cache, prompts=("a rabbit",), **flags):
    args = flags_of(output_dir, prompts=list(prompts), encoding_cache_dir=str(cache), validation_steps=1, **flags)
    return validation.Validator(args, make_trained(), SCHEDULER, Noise(), None, (5, 32, 48), plan_of(), "model")


def test_a_second_run_copies_the_videos_of_the_base_unless_anything_that_they_depend_on_differs(tmp_path, videos):
    watcher(tmp_path / "first", tmp_path / "cache").offer(0)
    watcher(tmp_path / "second", tmp_path / "cache").offer(0)
    assert len(videos) == 1
    first, second = (next((tmp_path / run / "validation/step-000000").glob("*.mp4")) for run in ("first", "second"))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert (second.parent / "contact_sheet.png").exists()
    for number, changes in enumerate(({"seed": 1}, {"guidance_scale": 1.0}, {"validation_scheduler": "dpm"}, {"prompts": ["a bird"]})):
        watcher(tmp_path / f"other {number}", tmp_path / "cache", **changes).offer(0)
        assert len(videos) == 2 + number, changes


def test_only_missing_and_damaged_videos_of_the_base_are_made(tmp_path, videos):
    prompts = ["a rabbit", "a bird", "a fox"]
    first = watcher(tmp_path / "first", tmp_path / "cache", prompts[:2])
    first.offer(0)
    entry = entry_path(tmp_path / "cache", "videos", first.base_key(first.jobs[0]), "mp4")
    entry.write_bytes(entry.read_bytes()[:300])
    watcher(tmp_path / "second", tmp_path / "cache", prompts).offer(0)
    names = [name for _, made, _ in videos for name in made]
    assert len(videos[0][1]) == 2
    assert [name.split("-seed")[0][:8] for name in videos[1][1]] == ["00-a-rab", "02-a-fox"]
    assert len(names) == 4


def test_where_a_lora_can_be_switched_off_the_base_is_shown_with_the_first_videos(tmp_path, videos, monkeypatch):
    switched = []
    monkeypatch.setattr(base_model, "stays_available", lambda args, transformer: True)
    monkeypatch.setattr(base_model, "without_lora", lambda model: switched.append(1) or torch.no_grad())
    validator = watcher(tmp_path / "out", tmp_path / "cache")
    validator.offer(0)
    assert videos == []
    validator.offer(1)
    assert [step for step, _, _ in videos] == [0, 1]
    assert switched == [1]
    validator.offer(2)
    assert [step for step, _, _ in videos] == [0, 1, 2]


def test_without_its_lora_a_trained_model_is_the_base_model(tiny_model):
    args = SimpleNamespace(init_lora=None)
    base, trained = (load_transformer(tiny_model, torch.float32) for _ in range(2))
    parameters = lora.add_lora(trained, 4, 4.0, 0.0, ["to_q", "to_v"], seed=0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    channels, length, width = (trained.config[name] for name in ("in_channels", "max_text_seq_length", "text_embed_dim"))
    inputs = {
        "hidden_states": torch.randn(1, 1, channels, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(1, length, width, generator=generator),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    with torch.no_grad():
        expected, moved = base(**inputs)[0], trained(**inputs)[0]
        with base_model.without_lora(trained):
            switched_off = trained(**inputs)[0]
        assert torch.equal(switched_off, expected)
        assert torch.equal(trained(**inputs)[0], moved)
    assert not torch.equal(moved, expected)
    assert all(parameter.requires_grad for parameter in parameters)
    assert base_model.stays_available(args, trained)
    assert not base_model.stays_available(args, base)  # full fine-tuning changes the base itself
    assert not base_model.stays_available(SimpleNamespace(init_lora="earlier"), trained)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"ema_decay": 0.5}])
def test_a_base_that_is_scored_and_shown_after_a_step_is_the_one_before_it(train, tmp_path, flags):
    """Scored and shown late (a LoRA), and early: the same base as the start of another run whose LoRA is new."""
    common = {
        "validation_prompt": "a rabbit",
        "eval_clips": 2,
        "eval_share": 0.3,
        "num_inference_steps": 2,
        "rank": 4,
        "max_train_steps": 2,
    }
    late = train(cache=tmp_path / "late", learning_rate=1e-2, **common, **flags)
    still = train(cache=tmp_path / "still", learning_rate=0.0, **common, **flags)

    def line_of(folder, step):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return next(line for line in lines if line["step"] == step and "eval_train_loss" in line)

    base, last = line_of(late, 0), line_of(late, 2)
    assert base["eval_bands"] == line_of(still, 2)["eval_bands"]  # a new LoRA that never moved
    assert last["eval_train_loss"] != base["eval_train_loss"]
    videos = [
        next((folder / f"validation/step-{step:06d}").glob("*.mp4")).read_bytes() for folder, step in ((late, 0), (still, 2), (late, 2))
    ]
    assert videos[0] == videos[1] != videos[2]


# -----------------------------------------------------------------------------
# Captions on demand


@pytest.mark.parametrize(
    ("size", "device", "processes", "workers", "waits"),
    [
        (2**28, "cpu", 1, 0, True),
        (2**20, "cpu", 1, 0, False),  # a small one takes no time
        (2**50, "cpu", 1, 0, False),  # it would not fit beside the transformer
        (2**28, "cuda", 1, 0, False),
        (2**28, "cpu", 2, 0, False),
        (2**28, "cpu", 1, 1, False),  # each worker process would load it
    ],
)
def test_captions_wait_only_for_a_large_t5_on_a_cpu_that_has_room_for_it(size, device, processes, workers, waits):
    assert encodings.may_wait(size, torch.device(device), processes, workers) is waits


@pytest.mark.slow
def test_captions_encoded_on_demand_train_the_same_and_fill_the_cache(train, tmp_path, monkeypatch, plain_run):
    loads, load = [], encodings.load_text_encoder
    monkeypatch.setattr(encodings, "load_text_encoder", lambda *args: loads.append(1) or load(*args))

    def entries(cache):
        return {path.name: path.read_bytes() for path in Path(cache).glob("captions/??/*")}

    at_once = train(cache=tmp_path / "at once", max_train_steps=6)
    assert len(loads) == 1
    monkeypatch.setattr(encodings, "may_wait", lambda *args: True)
    with monkeypatch.context() as stopped:  # as if a signal came before the first checkpoint
        stopped.setattr(encodings.Encodings, "finish", lambda self, due: None)
        first_steps = train(cache=tmp_path / "later", max_train_steps=2)
    assert 0 < len(entries(tmp_path / "later")) < len(entries(tmp_path / "at once"))
    later = train(cache=tmp_path / "later", max_train_steps=6)
    assert len(loads) == 3
    weights = [(folder / "pytorch_lora_weights.safetensors").read_bytes() for folder in (at_once, later, first_steps)]
    tensors = [folder / "checkpoint-6/adapter.safetensors" for folder in (at_once, later)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
    assert weights[0] != weights[2]
    assert entries(tmp_path / "later") == entries(tmp_path / "at once")


def test_t5_is_freed_when_the_last_caption_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(encodings, "encode_captions", lambda tokenizer, encoder, captions, length: torch.full((1, 2, 3), 7.0))
    waiting = encodings.CaptionsOnDemand(tmp_path, {"k1": "one", "k2": "two"}, ("tokenizer", "T5"), 226)
    waiting.store("k1")
    waiting.store("k1")
    assert waiting.models == ("tokenizer", "T5")
    waiting.store("k2")
    assert waiting.models is None
    assert encodings.read_entry(encodings.entry_path(tmp_path, "captions", "k2")).tolist() == [[7.0] * 3] * 2


@pytest.mark.parametrize(("value", "code"), [(float("nan"), 3), (1.0, 4)])
def test_a_caption_that_cannot_be_encoded_or_stored_on_demand_ends_the_run_in_a_sentence(value, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encodings, "encode_captions", lambda *args: torch.full((1, 2, 3), value))
    if code == 4:
        monkeypatch.setattr(encodings, "write_bytes", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    waiting = encodings.CaptionsOnDemand(tmp_path, {"k1": "one"}, (None, None), 226)
    with pytest.raises(SystemExit) as ended:
        waiting.store("k1")
    assert ended.value.code == code
    assert ("'one'" if code == 3 else "No space left") in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Stopping


def signal_after(monkeypatch, passes):
    """A signal arrives after so many forward passes. Returns the list that counts them."""
    counted = []
    monkeypatch.setitem(stopping.received, "signal", 0)

    def losses(model, batch):
        counted.append(1)
        if len(counted) == passes:
            stopping.received["signal"] = 15
        return model.trained.mean().expand(1)

    return counted, losses


def test_a_signal_ends_a_score_after_the_forward_pass_that_it_met(tmp_path, monkeypatch):
    counted, losses = signal_after(monkeypatch, 3)
    args, logged = flags_of(tmp_path, eval_clips=2), []
    scorer = scoring.Scorer(args, make_trained(), losses, Noise(), clips_of(4), UNSCALED, 1000)
    scorer.base = {"train": [1.0] * 4, "held_out": None, "gap": None}
    scorer.follow(SimpleNamespace(is_due=lambda step, last: True), None)
    scorer.begin(SimpleNamespace(log=logged.append))
    scorer.offer(1)
    assert len(counted) == 3
    assert logged == []  # half a score is no score
    stopping.received["signal"] = 0
    scorer.make_missing(1)  # what the next start of a complete run does
    assert len(counted) == 3 + 2 * scoring.BANDS
    assert [line["step"] for line in logged] == [0, 1]
    scorer.make_missing(1)
    assert len(logged) == 2


def test_a_resumed_run_that_finds_its_base_in_the_cache_logs_it(tmp_path):
    base, _ = score_of(tmp_path)
    args, logged = flags_of(tmp_path, eval_clips=2, resume_from_checkpoint="latest"), []
    trained = make_trained()
    torch.nn.init.constant_(trained.transformer.trained, 2.0)
    scorer = scoring.Scorer(
        args, trained, lambda model, batch: model.trained.mean().expand(1), Noise(), clips_of(4, 2), UNSCALED, 1000, (), "model"
    )
    scorer.follow(SimpleNamespace(is_due=lambda step, last: True, save_best=lambda step: None), None)
    scorer.begin(SimpleNamespace(log=logged.append))
    scorer.offer(7)
    assert [(line["step"], line["eval_train_loss"]) for line in logged] == [(0, 4.0), (7, 2.0)]
    assert base["train"] == [4.0] * scoring.BANDS


def test_a_signal_before_training_ends_the_base_score_and_the_run(tmp_path, monkeypatch):
    counted, losses = signal_after(monkeypatch, 1)
    scorer = scoring.Scorer(flags_of(tmp_path, eval_clips=2), make_trained(), losses, Noise(), clips_of(4), UNSCALED, 1000)
    with pytest.raises(SystemExit) as ended:
        scorer.score_what_training_changes()
    assert ended.value.code == 128 + 15
    assert len(counted) == 1
    assert not (tmp_path / "cache/scores").exists()


def test_a_signal_ends_decoding_between_two_passes_of_the_decoder(monkeypatch):
    decoder, passes = torch.nn.Identity(), []
    decoder.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setitem(stopping.received, "signal", 0)
    with stopping.interruptible(decoder):
        decoder(1)
        decoder(1)
        stopping.received["signal"] = 15
        with pytest.raises(InterruptedError):
            decoder(1)
    decoder(1)  # the hook is gone
    assert len(passes) == 3


def test_a_signal_to_one_rank_is_noticed_by_the_others_without_a_collective(monkeypatch):
    monkeypatch.setitem(stopping.received, "signal", 0)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        shared = torch.distributed.distributed_c10d._get_default_store()
        assert stopping.stop_noticed() == 0
        shared.set("stop", "15")  # what another rank leaves
        assert stopping.stop_noticed() == 15
        with pytest.raises(InterruptedError, match="SIGTERM"):
            stopping.raise_if_noticed()
        with pytest.raises(SystemExit) as ended:
            stopping.exit_if_requested()
        assert ended.value.code == 128 + 15
        shared.delete_key("stop")
        assert stopping.stop_noticed() == 0
        stopping.received["signal"] = 10
        assert stopping.stop_noticed() == 10
        assert shared.get("stop") == b"10"  # and it leaves its own
    finally:
        torch.distributed.destroy_process_group()
