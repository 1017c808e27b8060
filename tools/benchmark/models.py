"""Models with random weights, of the sizes in sizes.py, and what they are given."""

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from cogvideox import memory
from cogvideox.folder import COGVIDEOX_2B, latent_shape
from demo.make_model import SMALL_CLIP, TRANSFORMERS, imitate_trained_moments
from demo.make_model import VAES as FAMILY_VAES
from tools.benchmark.harness import ROOT
from tools.benchmark.sizes import SIZES, VAES


def random_model(build, dtype, seed=0, device="cpu"):
    """A frozen model with random weights, in `dtype`, made at the speed of copying. build: () -> model.

    Numbers are drawn once and repeated: drawing the 4.9 G of a T5-XXL one by one takes minutes. Weights are scaled by the root
    of their inputs, one-dimensional ones are 1 and biases 0, so that activations stay of the size of 1. device: where the weights
    are made; the host then holds none of them. The numbers are the same on every device.
    """
    with init_empty_weights(include_buffers=False):
        model = build()
    block = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            filled = torch.zeros(parameter.shape, dtype=dtype, device=device)
            if parameter.dim() > 1:
                flat, scale = filled.view(-1), (parameter.numel() / parameter.shape[0]) ** -0.5
                scaled = block * scale
                for start in range(0, flat.numel(), block.numel()):
                    part = flat[start : start + block.numel()]
                    part.copy_(scaled[: part.numel()])
            elif name == "weight":
                filled.fill_(1)
            setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.to(device, dtype).requires_grad_(False)


def configs_of_size(size, family="2b"):
    """(the transformer's config, the VAE's) of a size: as published at the size of the 2B, or a small model of the family."""
    if size == "2b":
        return memory.PRESETS[family]["transformer"], memory.PRESETS[family]["vae"]
    clip = SMALL_CLIP if family != "2b" else {}
    return SIZES[size]["transformer"] | TRANSFORMERS[family] | clip, FAMILY_VAES[family]


def make_transformer(size, dtype, device="cpu", family="2b"):
    """The transformer of a size."""
    config = configs_of_size(size, family)[0]
    return random_model(lambda: CogVideoXTransformer3DModel(**config), dtype, device=device)


def make_text_encoder(size, dtype, device="cpu"):
    """The T5 encoder of a size."""
    config = T5Config(**SIZES[size]["t5"], feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return random_model(lambda: T5EncoderModel(config), dtype, device=device).eval()


def make_vae(kind, dtype, device="cpu"):
    """The VAE, small or real.

    A small one is made as the demo's, and stays fp32: on CPUs the bf16 convolution of so few channels takes seconds.
    """
    if kind == "real":
        return random_model(AutoencoderKLCogVideoX, dtype, device=device).eval()
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(**VAES[kind])
    imitate_trained_moments(vae)
    return vae.requires_grad_(False).eval().to(device)


def demo_captions(count):
    """The first captions of the demo's clips."""
    return (ROOT / "demo/dataset/prompts.txt").read_text().splitlines()[:count]


def random_moments(count, shape, seed=1):
    """Random posteriors [count, 2C, F', H', W'] of clips of a shape: means, and logarithms of small variances."""
    generator = torch.Generator().manual_seed(seed)
    frames, channels, height, width = latent_shape(COGVIDEOX_2B, *shape)  # in all families: they share the VAE
    means = torch.randn(count, channels, frames, height, width, generator=generator)
    return torch.cat([means, torch.full_like(means, -8.0)], dim=1)
