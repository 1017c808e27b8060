"""Write a tiny random CogVideoX folder in the real layout: `python -m demo.make_model demo/tiny_model --family 2b`.

The real tokenizer, a T5 encoder, the causal video VAE with the real 4 x 8 x 8 compression, a transformer and a scheduler with the
settings of the family, all seeded. It cannot generate video, but it runs the same code as the real weights, on a CPU.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from cogvideox.memory import PRESETS
from cogvideox.model import pipeline_class

TOKENIZER = Path(__file__).resolve().parent / "tokenizer"
# The published configs without what makes them large.
OF_SIZE = ("num_attention_heads", "num_layers", "sample_height", "sample_width", "sample_frames")
TRANSFORMERS = {
    family: {name: value for name, value in parts["transformer"].items() if name not in OF_SIZE} for family, parts in PRESETS.items()
}
TRANSFORMERS["1.5-5b-i2v"]["ofs_embed_dim"] = 64  # as time_embed_dim here
VAES = {family: parts["vae"] for family, parts in PRESETS.items()}
SMALL_CLIP = {"sample_frames": 9, "sample_height": 4, "sample_width": 6}  # 9 frames of 32 x 48 pixels, for settings of `make_model`


def make_model(
    folder, seed=0, dtype=torch.float32, text_width=32, vae_channels=16, layers=2, heads=2, head_width=32, family="2b", **transformer
):  # fmt: skip
    """Create and save the folder; returns its path. family: of TRANSFORMERS. `transformer` overrides the transformer's config."""
    folder = Path(folder)
    torch.manual_seed(seed)
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=text_width,
            d_kv=16,
            d_ff=2 * text_width,
            num_heads=2,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    vae = AutoencoderKLCogVideoX(block_out_channels=(vae_channels,) * 4, layers_per_block=1, norm_num_groups=4, **VAES[family])
    imitate_trained_moments(vae)
    settings = {"sample_width": 12, "sample_height": 8, "sample_frames": 17} | TRANSFORMERS[family] | transformer
    model = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        time_embed_dim=64,
        text_embed_dim=text_width,
        num_layers=layers,
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if model.config.use_learned_positional_embeddings:  # the table of a new model holds sincos values, which a test takes for computed ones
        model.patch_embed.pos_embedding.normal_(0, 0.5)
    scheduler = make_scheduler(snr_shift_scale=3.0 if family == "2b" else 1.0)
    pipeline = pipeline_class(model.config)(tokenizer, text_encoder, vae, model, scheduler).to(dtype=dtype)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def make_scheduler(snr_shift_scale=3.0):
    """The scheduler of the family, by default the 2B's."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift_scale,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def imitate_trained_moments(vae):
    """Give a random VAE the moments of a trained one: latents of unit variance after scaling, and a small posterior variance.

    With the random log-variances near 0, every latent would be pure noise, which no transformer can predict.
    """
    channels = vae.config.latent_channels
    vae.encoder.conv_out.conv.bias[channels:] = -8.0
    coarse = torch.rand(1, 3, 3, 8, 12) * 2 - 1
    video = torch.nn.functional.interpolate(coarse, (9, 64, 96), mode="trilinear")
    means = vae.encode(video).latent_dist.mean
    scale = 1 / (vae.config.scaling_factor * means.std(dim=(0, 2, 3, 4)))
    vae.encoder.conv_out.conv.weight[:channels] *= scale[:, None, None, None, None]
    vae.encoder.conv_out.conv.bias[:channels] = (vae.encoder.conv_out.conv.bias[:channels] - means.mean(dim=(0, 2, 3, 4))) * scale


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="demo/tiny_model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=list(TRANSFORMERS), default="2b")
    options = parser.parse_args()
    print(f"wrote {make_model(options.folder, options.seed, family=options.family)}")
