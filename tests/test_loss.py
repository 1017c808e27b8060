"""The formula: velocity loss against the weighted x0 loss of the trainers before, in float64."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import CogVideoXDDIMScheduler

import train_cogvideox_lora as script
from tests.conftest import ROOT
from tests.cpu_kinds import needs_bf16_attention

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def scheduler(shift=3.0):
    return CogVideoXDDIMScheduler(**SCHEDULE, snr_shift_scale=shift)


def batch(timesteps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (len(timesteps), 3, 16, 4, 6)
    return {
        "latents": torch.randn(shape, generator=generator, dtype=dtype),
        "noise": torch.randn(shape, generator=generator, dtype=dtype),
        "timestep": torch.tensor(timesteps),
        "prompt": torch.zeros(len(timesteps), 2, 2, dtype=dtype),
        "image": torch.zeros(len(timesteps), 3, 0, 4, 6, dtype=dtype),
    }


class Answers:
    """Stands for the transformer: answers with a given velocity and keeps what it was asked."""

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, hidden_states, **rest):
        self.asked = hidden_states
        return (self.velocity,)


def double_velocity_loss(answer, schedule, values):
    """velocity_loss without its rounding of the prediction to fp32."""
    target = schedule.get_velocity(values["latents"], values["noise"], values["timestep"])
    return (answer - target).pow(2).mean(dim=(1, 2, 3, 4))


@pytest.mark.numeric
def test_the_velocity_loss_is_the_weighted_x0_loss_of_the_trainers_before():
    schedule, values = scheduler(), batch([0, 1, 100, 500, 998])
    schedule.alphas_cumprod = schedule.alphas_cumprod.double()
    answer = torch.randn(values["latents"].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noisy = schedule.add_noise(values["latents"], values["noise"], values["timestep"])
    x0_error = (schedule.get_velocity(answer, noisy, values["timestep"]) - values["latents"]).pow(2).mean(dim=(1, 2, 3, 4))
    weighted = x0_error / (1 - schedule.alphas_cumprod[values["timestep"]])
    ours = double_velocity_loss(answer, schedule, values)
    torch.testing.assert_close(ours, weighted, rtol=1e-9, atol=0)
    torch.testing.assert_close(script.velocity_loss(Answers(answer), schedule, values, {}, torch.float64), ours, rtol=1e-5, atol=0)
    other = scheduler(shift=1.0)  # the 5B's noise: a different loss, so the comparison can fail
    other.alphas_cumprod = other.alphas_cumprod.double()
    assert not torch.allclose(double_velocity_loss(answer, other, values), weighted, rtol=1e-3)


def test_a_perfect_prediction_has_no_loss_at_any_timestep_even_in_bf16():
    schedule, values = scheduler(), batch([0, 1, 2, 500, 999], torch.float32)
    target = schedule.get_velocity(values["latents"], values["noise"], values["timestep"])
    model = Answers(target)
    assert script.velocity_loss(model, schedule, values, {}, torch.bfloat16).max() < 1e-10
    assert model.asked.dtype == torch.bfloat16
    assert script.velocity_loss(Answers(target + 0.1), schedule, values, {}, torch.bfloat16).min() > 0.009


def test_noise_is_added_in_fp32_whatever_the_model_computes_in():
    schedule, values = scheduler(), batch([0, 3, 999], torch.float32)
    model = Answers(torch.zeros_like(values["latents"]))
    script.velocity_loss(model, schedule, values, {}, torch.bfloat16)
    exact = schedule.add_noise(values["latents"].double(), values["noise"].double(), values["timestep"])
    half = schedule.add_noise(values["latents"].bfloat16(), values["noise"].bfloat16(), values["timestep"])
    assert (
        torch.equal(model.asked, exact.float().bfloat16())
        or (model.asked.double() - exact).abs().mean() < (half.double() - exact).abs().mean()
    )


def test_the_scheduler_of_the_folder_keeps_its_shift(tiny_model):
    from cogvideox.model import load_scheduler

    loaded = load_scheduler(tiny_model)
    assert loaded.config.snr_shift_scale == 3.0
    assert abs(loaded.alphas_cumprod[0].item() - 0.99745) < 1e-5  # the 2B's published schedule
    assert loaded.alphas_cumprod[999].item() == 0


def test_gradients_reach_the_lora_alone(tiny_model):
    from cogvideox.lora import add_lora
    from cogvideox.model import load_transformer

    transformer = load_transformer(tiny_model, torch.float32)
    parameters = add_lora(transformer, 4, 4.0, 0.0, ["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    values = batch([500], torch.float32) | {"prompt": torch.randn(1, 226, 32)}
    script.velocity_loss(transformer.train(), scheduler(), values, {}, torch.float32).sum().backward()
    with_gradient = {name for name, p in transformer.named_parameters() if p.grad is not None}
    assert len(with_gradient) == len(parameters) == 16
    assert all(".lora_" in name for name in with_gradient)
    assert all(p.grad.abs().max() > 0 for name, p in transformer.named_parameters() if ".lora_B." in name)


@pytest.mark.numeric
@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 draws other random weights for the tiny model's T5"
)
def test_ten_steps_give_the_losses_on_record(train):
    """A refactoring must leave these as they are; a change of the maths says so by changing them."""
    lines = [json.loads(line) for line in (train(max_train_steps=10) / "metrics.jsonl").read_text().splitlines()]
    losses, path = [line["loss"] for line in lines], Path(__file__).with_name("golden_losses.json")
    if os.environ.get("REGENERATE_GOLDEN_LOSSES"):  # CONTRIBUTING.md
        path.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
    golden = json.loads(path.read_text())
    torch.testing.assert_close(losses, golden, rtol=2e-4, atol=0)
    assert max(golden) - min(golden) > 0.05


@pytest.mark.numeric
def test_min_snr_weights_of_the_velocity_error():
    schedule = scheduler()
    weights = script.loss_weights(schedule, 5.0, torch.device("cpu"))
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    expected = snr.clamp(max=5.0) / (snr + 1)
    assert torch.allclose(weights.double(), expected, atol=1e-6)
    assert weights[999] == 0
    assert not torch.allclose(script.loss_weights(schedule, 1.0, torch.device("cpu")).double(), expected, atol=1e-2)


@pytest.mark.numeric
@needs_bf16_attention
def test_a_base_stored_in_fp16_keeps_its_loss_in_fp16_and_less_so_in_bf16():
    """At fixed noise, on the demo's base. Prints the largest relative difference of a clip's loss from that in fp32."""
    from cogvideox.folder import stored_precision
    from cogvideox.model import load_scheduler, load_transformer

    folder, generator = ROOT / "demo/model", torch.Generator().manual_seed(0)
    assert stored_precision(folder, "transformer") == "fp16"
    config = load_transformer(folder, torch.float32).config
    shape = (8, 5, config.in_channels, 8, 12)
    values = {
        "latents": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "prompt": torch.randn(8, config.max_text_seq_length, config.text_embed_dim, generator=generator) / 10,
        "timestep": torch.arange(62, 1000, 125),
        "image": torch.zeros(8, 5, 0, 8, 12),
    }
    losses = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with torch.no_grad():
            losses[dtype] = script.velocity_loss(load_transformer(folder, dtype), load_scheduler(folder), values, {}, dtype)
    exact = losses.pop(torch.float32)
    off = {dtype: ((loss - exact) / exact).abs().max().item() for dtype, loss in losses.items()}
    for dtype, value in off.items():
        print(f"{dtype}: {value:.2%}")
    assert 0 < 4 * off[torch.float16] < off[torch.bfloat16] < 0.01
