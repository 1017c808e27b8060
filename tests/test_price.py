"""The predicted share of a run's time beside training, and the flag that halves the largest part of it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from cogvideox import price, rehearsal
from cogvideox.folder import COGVIDEOX_2B
from cogvideox.rehearsal import Measured

MEASURED = Measured(seconds_per_step=10.0, peak_gib=1.0, checkpoint_mib=100.0, forward_seconds=2.0, save_seconds=5.0)


def parts_of(
    steps, looks=(), saves=(), scores=(), prompts=1, processes=1, base_videos=0, base=True, captions=2, facts=COGVIDEOX_2B, **flags
):
    """The predicted parts of a run: videos of 30 s after the steps `looks`, scores of two clips, checkpoints."""
    args = {"train_batch_size": 1, "validation_steps": 0, "validation_epochs": 2, "num_inference_steps": 50, "eval_steps": 0}
    args = SimpleNamespace(**args | {"eval_clips": 2, "checkpointing_steps": 500, "validation_scheduler": "stored"} | flags)
    jobs = [{"prompt": number} for number in range(prompts)]
    validator = SimpleNamespace(is_due=lambda step, last: step in looks, jobs=jobs, jobs_of=lambda step: jobs)
    sets = {"train": [0, 1], "held_out": []}
    texts = [f"caption {number % captions}" for number in range(9)]
    scorer = SimpleNamespace(is_due=lambda step, last: step in scores, sets=sets, captions=texts, base=base, facts=facts)
    checkpointer = SimpleNamespace(is_due=lambda step, last: step in saves)
    plan = SimpleNamespace(total_steps=steps)
    parts = price.predict(args, plan, 0, MEASURED, 30.0, base_videos, processes, (checkpointer, scorer, validator))
    return {part.name: part for part in parts}


def test_each_part_is_counted_as_often_as_it_is_due():
    parts = parts_of(10, looks=(5, 10), saves=(10,), scores=(5, 10), prompts=3, processes=2)
    assert parts["videos"].seconds == 2 * 2 * 30  # three prompts on two processes are two rounds
    assert parts["scores"].seconds == 2 * (2 * price.BANDS) * 2.0 / 2  # two clips of one set, in four bands, on two processes
    assert parts["checkpoints"].seconds == 5
    assert parts_of(10, looks=(5, 10), prompts=3, processes=2, base_videos=3)["videos"].seconds == 3 * 2 * 30  # and the base model's
    assert parts_of(10, scores=(10,), base=None)["scores"].seconds == 2 * parts_of(10, scores=(10,))["scores"].seconds
    assert parts_of(10) == {}


def test_the_base_of_an_image_to_video_model_is_scored_with_each_scaling_of_the_image():
    image_15 = replace(COGVIDEOX_2B, image_channels=16, scaling_factor=0.7, image_scaling_factor=1 / 0.7)
    once = parts_of(10, scores=(10,))["scores"].seconds
    assert parts_of(10, scores=(10,), facts=image_15)["scores"].seconds == once
    assert parts_of(10, scores=(10,), base=None, facts=image_15)["scores"].seconds == once + 3 * once  # 1 / 0.7, 0.7 and 1


@pytest.mark.parametrize(
    ("looks", "flags", "remedy"),
    [
        ((2, 4, 6, 8, 10), {}, "--validation_epochs 4"),
        ((2, 4, 6, 8, 10), {"validation_steps": 2}, "--validation_steps 4"),
        ((10,), {}, "--num_inference_steps 25 (with --validation_scheduler dpm)"),  # a longer interval would not save the last one
        ((10,), {"validation_scheduler": "dpm"}, "--num_inference_steps 25 halves"),  # that sampler is on already
    ],
)
def test_the_remedy_for_videos_halves_what_there_is_most_of(looks, flags, remedy):
    assert parts_of(10, looks=looks, **flags)["videos"].remedy.startswith(remedy)


@pytest.mark.parametrize(("seconds", "share", "warned"), [(400.0, "20 %", False), (420.0, "21 %", True)])
def test_more_than_a_fifth_of_the_time_is_a_warning(seconds, share, warned, capsys):
    price.say_price(
        [price.Part("videos", 4, seconds / 4, "--validation_epochs 4 halves the time of videos"), price.Part("scores", 1, 0.0, "")], 1600.0
    )
    told = capsys.readouterr().err
    assert f"{share} of this run's time" in told
    assert "--validation_epochs 4 halves the time of videos" in told
    assert ("warning" in told) is warned


def test_forward_flops_are_those_of_the_model():
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(num_layers=2, sample_height=16, sample_width=24, sample_frames=9)
        inputs = torch.empty(1, 3, 16, 16, 24), torch.empty(1, 226, 4096), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(hidden_states=inputs[0], encoder_hidden_states=inputs[1], timestep=inputs[2])
    predicted = price.forward_flops(model.config, (3, 16, 16, 24))
    text_projection = 2 * 226 * 4096 * 1920
    assert predicted == pytest.approx(counter.get_total_flops() - text_projection, rel=0.02)


def test_decoding_flops_are_those_of_the_vae():
    small = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(**small)
        sample = torch.empty(1, 16, 4, 6, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(sample)
    assert price.decoding_flops(vae.config, (4, 16, 6, 8)) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert price.decoding_flops(vae.config, (8, 16, 6, 8)) == pytest.approx(2 * counter.get_total_flops(), rel=0.01)


def test_a_video_costs_its_passes_and_its_decoding(tiny_model):
    config = SimpleNamespace(
        patch_size=2, patch_size_t=None, num_attention_heads=2, attention_head_dim=8, max_text_seq_length=10, num_layers=1
    )
    facts = SimpleNamespace(latent_compression=8, frames_per_latent=4, latent_channels=16)
    settings = {"num_frames": 9, "height": 64, "width": 96, "num_inference_steps": 10, "guidance_scale": 6.0}
    vae = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}
    shape = (3, 16, 8, 12)
    decoding = price.decoding_flops(vae, shape) / price.forward_flops(config, shape)
    assert price.video_seconds(config, vae, facts, settings, 2.0, shape) == pytest.approx(2.0 * (20 + decoding))
    unguided = settings | {"guidance_scale": 1.0}
    assert price.video_seconds(config, vae, facts, unguided, 2.0, shape) == pytest.approx(2.0 * (10 + decoding))


@pytest.mark.slow
def test_a_run_and_a_dry_run_print_the_price_before_the_first_step(train, capsys, monkeypatch):
    measure = rehearsal.try_results  # on a busy disk a checkpoint may take longer than all videos: here none takes any time
    monkeypatch.setattr(rehearsal, "try_results", lambda *args: (measure(*args)[0], 0.0))
    flags = {"validation_prompt": "a rabbit", "validation_steps": 1, "max_train_steps": 4, "num_inference_steps": 2}
    train(**flags)
    told = capsys.readouterr().err
    assert told.index("of this run's time goes into videos") < told.index("training:")
    assert "--validation_steps 2 halves" in told
    train(dry_run=True, **flags)
    assert "of this run's time goes into videos" in capsys.readouterr().err
