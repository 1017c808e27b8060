"""Train the demo's base model on Big Buck Bunny: `python -m demo.train_base bbb.mp4 --work_dir base`.

Three seeded stages, a few CPU hours in total: resize the film's frames, train a causal video VAE, and train a text-to-video
transformer with its T5 encoder. Both learn the shots of `demo/film_shots.txt`; the transformer also learns the demo's clips, in colour and
without a trigger, so that a LoRA of the demo has to learn its style only. Curves, reconstructions and samples are written beside the
weights. Completed stages are skipped.

`demo/model` was trained in three rounds, with `--start_from` the one before: 3200 steps of 8 clips and 3200 of 16, both without the demo's
clips, then `--transformer_steps 1000 --seed 3`. demo/base/curves.png is of the first round.

The film is resources/bbb.mp4 in moviepy_10_minutes.zip in the sdist of moviepy 2.2.1 on PyPI:
`pip download --no-deps --no-binary moviepy moviepy==2.2.1`.
"""

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch.nn.functional import avg_pool3d, l1_loss
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from cogvideox.console import progress
from cogvideox.model import decode_latents
from cogvideox.video import contact_sheet, write_video
from demo.make_model import TOKENIZER, make_scheduler
from demo.shots import read_demo_clips, read_shots

TEXT_TOKENS = 64  # enough for the longest caption and a trigger; the 2B's 226 make a step twice as long
SIZES = ((64, 96), (160, 240))  # (height, width) of the frames, 3:2, cut from the middle of 16:9
DEMO_PROMPTS = (
    "a big white rabbit smiles under a blue sky",
    "a purple bird sings on a branch",
    "a flying squirrel glides through a blue sky with white clouds",
    "the big rabbit stands in a green meadow and a pink butterfly flies past",
)


# -----------------------------------------------------------------------------
# The film


def film_frames(film, work_dir, height, width):
    """All frames of the film as one memory-mapped uint8 array [N, height, width, 3]."""
    path = work_dir / f"film-{height}x{width}.raw"
    if not path.exists():
        partial = path.with_suffix(".partial")
        filters = f"crop=ih*3/2:ih,scale={width}:{height}:flags=area"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(film), "-vf", filters]
        subprocess.run([*command, "-an", "-f", "rawvideo", "-pix_fmt", "rgb24", str(partial)], check=True)
        partial.rename(path)
    return np.memmap(path, np.uint8, "r").reshape(-1, height, width, 3)


def random_of(*key):
    """A generator that depends only on the seed and the step."""
    return np.random.default_rng(list(key))


def stack(clips):
    """[B, 3, F, H, W] in -1..1 from uint8 clips [F, H, W, 3]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


# -----------------------------------------------------------------------------
# The VAE


def make_vae():
    """A narrow AutoencoderKLCogVideoX with the real 4 x 8 x 8 compression and 16 latent channels."""
    vae = AutoencoderKLCogVideoX(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
    vae.encoder.conv_out.conv.bias.data[vae.config.latent_channels :] = -6.0  # log-variances: unit noise would drown the signal
    return vae


def vae_batch(films, shots, seed, step, clips, frames, height, width):
    """[clips, 3, frames, height, width]: crops of both film sizes, at a third, a half or all of its frame rate, randomly mirrored."""
    rng = random_of(seed, 1, step)
    chosen = []
    weights = np.array([end - first for first, end, _ in shots], float)
    while len(chosen) < clips:
        first, end, _ = shots[rng.choice(len(shots), p=weights / weights.sum())]
        stride = rng.choice([s for s in (1, 2, 3) if (frames - 1) * s < end - first])
        start = rng.integers(first, end - (frames - 1) * stride)
        film = films[int(rng.random() < 0.3)]
        top, left = rng.integers(0, film.shape[1] - height + 1), rng.integers(0, film.shape[2] - width + 1)
        clip = film[start : start + frames * stride : stride, top : top + height, left : left + width]
        chosen.append(clip[:, :, ::-1] if rng.random() < 0.5 else clip)
    return stack(chosen)


def reconstruction_loss(vae, video, generator):
    """L1 on pixels, on spatial gradients and on downsampled copies, plus a small KL term. Returns (loss, pixel L1)."""
    posterior = vae.encode(video).latent_dist
    reconstructed = vae.decode(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)).sample
    reconstructed = reconstructed[:, :, -video.shape[2] :]  # an even number of latents decodes to three extra frames, at the front
    pixels = l1_loss(reconstructed, video)
    edges = sum(l1_loss(reconstructed.diff(dim=dim), video.diff(dim=dim)) for dim in (3, 4))
    coarse = sum(l1_loss(avg_pool3d(reconstructed, (1, size, size)), avg_pool3d(video, (1, size, size))) for size in (4, 8))
    return pixels + edges + 0.5 * coarse + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel(), pixels.item()


class Muon:
    """Momentum with orthogonalized matrix updates (Jordan et al. 2024, "Muon"; five Newton-Schulz steps).

    torch's Muon takes only matrices, not convolution kernels. Here it needs a third of Adam's steps.
    """

    def __init__(self, parameters, momentum=0.95):
        self.parameters, self.momentum = list(parameters), momentum
        self.averages = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, learning_rate):
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            average.lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(average, self.momentum).flatten(1)
            rows, columns = update.shape
            update = update.T if rows > columns else update
            update = (update / (update.norm() + 1e-7)).bfloat16()
            for _ in range(5):
                product = update @ update.T
                update = 3.4445 * update + (2.0315 * product @ product - 4.775 * product) @ update
            update = update.T if rows > columns else update
            parameter.add_(update.reshape(parameter.shape).float(), alpha=-learning_rate * max(1, rows / columns) ** 0.5)


def train_vae(films, shots, work_dir, steps, seed, learning_rate=2e-3, muon_learning_rate=0.02):
    """Train the VAE: three quarters of the steps on crops of single frames, which are the most diverse, the rest on clips.

    Returns it with its scaling factor, 1 / standard deviation of the latents. Writes the curve and reconstructions to work_dir.
    """
    torch.manual_seed(seed)
    vae, curve, first_clips = make_vae(), [], steps * 3 // 4
    matrices = [parameter for parameter in vae.parameters() if parameter.ndim > 1 and len(parameter) > 3]
    others = [parameter for parameter in vae.parameters() if not (parameter.ndim > 1 and len(parameter) > 3)]
    optimizer, muon = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0), Muon(matrices)
    bar = progress(range(steps), "VAE", unit="step")
    for step in bar:
        # The VAE encodes 17 frames in two chunks.
        shape = (16, 1, 48, 48) if step < first_clips else (2, 17 if step % 8 == 7 else 9, 64, 96)
        video = vae_batch(films, shots, seed, step, *shape)
        loss, pixels = reconstruction_loss(vae, video, torch.Generator().manual_seed(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        scale = min((step + 1) / 30, 0.02 + 0.98 * (1 - step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * scale
        optimizer.step()
        muon.step(muon_learning_rate * scale)
        vae.zero_grad()
        curve.append(pixels)
        bar.set_postfix({"L1": f"{np.mean(curve[-50:]):.4f}"}, refresh=False)
        if (step + 1) % 300 == 0:
            show_reconstructions(vae, films, shots, work_dir / "vae_reconstructions.png", f"VAE after {step + 1} steps")
    latents = torch.cat([encode(vae, stack([films[0][first : first + 9]])).flatten() for first, _, _ in shots])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    np.savetxt(work_dir / "vae_curve.txt", curve, fmt="%.5f")
    return vae


@torch.no_grad()
def encode(vae, video):
    """Mean latents [B, 16, F', H', W'], unscaled."""
    return vae.encode(video).latent_dist.mean


@torch.no_grad()
def show_reconstructions(vae, films, shots, path, title):
    """Write a contact sheet: shots of the film above their VAE reconstructions, at both sizes."""
    rows = []
    for film, picked in ((films[0], shots[5::28]), (films[1], shots[12::60])):
        for first, _, caption in picked:
            clip = film[first : first + 17]
            reconstructed = vae.decode(encode(vae, stack([clip]))).sample[0].clamp(-1, 1).permute(1, 2, 3, 0)
            rows += [(caption, np.asarray(clip)), ("", ((reconstructed + 1) * 127.5).round().byte().numpy())]
    contact_sheet(path, rows, title)


# -----------------------------------------------------------------------------
# The transformer and its T5


def make_text_encoder():
    """A small T5 encoder with the real tokenizer's vocabulary, trained together with the transformer on the captions only."""
    config = T5Config(vocab_size=32128, d_model=48, d_kv=16, d_ff=128, num_heads=3, num_layers=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config)


def make_transformer():
    """A small transformer like the 2B's: sincos positions, patches of 2 x 2 latents."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        time_embed_dim=64,
        text_embed_dim=48,
        num_layers=8,
        sample_width=12,
        sample_height=8,
        sample_frames=17,
    )


def see_text(transformer, tokens=TEXT_TOKENS):
    """Set the transformer's number of text tokens. Text has no positions: only the zero rows of the table change."""
    embed = transformer.patch_embed
    embed.max_text_seq_length = tokens
    embed.pos_embedding = embed._get_positional_embeddings(embed.sample_height, embed.sample_width, embed.sample_frames)
    transformer.register_to_config(max_text_seq_length=tokens)


def windows(shots, frames, strides, every):
    """(shot, first frame, stride) of clips that cover the shots, one every `every` film frames, each at the largest stride that fits."""
    chosen = []
    for number, (first, end, _) in enumerate(shots):
        fitting = [stride for stride in strides if (frames - 1) * stride < end - first]
        if fitting:
            stride = fitting[0]
            chosen += [(number, start, stride) for start in range(first, end - (frames - 1) * stride, every)]
    return chosen


@torch.no_grad()
def encode_windows(vae, film, chosen, frames, path):
    """Latents [N, 2, F', 16, H', W'] (mean and standard deviation, scaled) of each window, stored on disk in fp16."""
    if not path.exists():
        encoded = []
        for start in progress(range(0, len(chosen), 4), f"encoding {path.stem}", unit="batch"):
            clips = [film[first : first + (frames - 1) * stride + 1 : stride] for _, first, stride in chosen[start : start + 4]]
            posterior = vae.encode(stack(clips)).latent_dist
            moments = torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor
            encoded.append(moments.transpose(2, 3).half())
        torch.save(torch.cat(encoded), path)
    return torch.load(path, mmap=True)


def train_transformer(models, sets, captions, token_ids, work_dir, steps, seed, make_samples, learning_rates=(2e-3, 0.02), batch=16):
    """Train (transformer, text encoder) together on the velocity loss, and average them.

    learning_rates: AdamW's and Muon's.

    sets: (latents, shot of each clip, share of the steps) for each size.
    """
    torch.manual_seed(seed)
    scheduler, (transformer, text_encoder) = make_scheduler(), models
    see_text(transformer)
    parameters = [*transformer.parameters(), *text_encoder.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    blocks = {id(parameter) for part in (transformer.transformer_blocks, text_encoder.encoder.block) for parameter in part.parameters()}
    matrices = [parameter for parameter in parameters if id(parameter) in blocks and parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in chosen]
    optimizer, muon = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0), Muon(matrices)
    curve, shares = [], np.array([share for _, _, share in sets])
    bar = progress(range(steps), "transformer", unit="step")
    for step in bar:
        rng, generator = random_of(seed, 2, step), torch.Generator().manual_seed(seed * 1_000_003 + step)
        latents, shot_of, _ = sets[rng.choice(len(sets), p=shares / shares.sum())]
        count = max(1, round(batch * 120 / (latents.shape[2] * latents.shape[4] * latents.shape[5] / 4)))
        picked = rng.integers(0, len(latents), count)
        moments = latents[picked].float()
        clean = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 0].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.from_numpy((((np.arange(count) + rng.random(count)) / count) * 1000).astype(np.int64))
        ids = token_ids[[len(captions) if rng.random() < 0.1 else shot_of[i] for i in picked]]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = transformer(
                hidden_states=scheduler.add_noise(clean, noise, timestep),
                encoder_hidden_states=text_encoder(ids)[0],
                timestep=timestep,
                return_dict=False,
            )[0]
        loss = (predicted.float() - scheduler.get_velocity(clean, noise, timestep)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scale = min((step + 1) / 50, 0.02 + 0.98 * (1 - step / steps))
        optimizer.param_groups[0]["lr"] = learning_rates[0] * scale
        optimizer.step()
        muon.step(learning_rates[1] * scale)
        for parameter in parameters:
            parameter.grad = None
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], max(0.005, 9 / (step + 10)))
        curve.append(loss.item())
        bar.set_postfix({"loss": f"{np.mean(curve[-100:]):.4f}"}, refresh=False)
        if (step + 1) % 1500 == 0 or step + 1 == steps:
            np.savetxt(work_dir / "transformer_curve.txt", curve, fmt="%.5f")
            live = [parameter.detach().clone() for parameter in parameters]
            torch._foreach_copy_([parameter.data for parameter in parameters], averages)
            make_samples(transformer, text_encoder, step + 1)
            if step + 1 < steps:
                torch._foreach_copy_([parameter.data for parameter in parameters], live)


def sample(folder_parts, prompts, seed=0, steps=20, guidance=4.0):
    """One 17 x 64 x 96 video [F, H, W, 3] per prompt, from the stock pipeline."""
    pipeline = CogVideoXPipeline(**folder_parts)
    pipeline.set_progress_bar_config(disable=True)
    videos = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed)
        latents = pipeline(
            prompt,
            height=64,
            width=96,
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
            generator=generator,
            output_type="latent",
        ).frames[0]
        videos.append(decode_latents(pipeline.vae, latents))
    return videos


def write_folder(parts, folder):
    """Write the pipeline folder in fp16, with the real tokenizer's four files."""
    CogVideoXPipeline(**parts).to(torch.float16).save_pretrained(folder)
    for config in folder.glob("*/config.json"):  # diffusers writes where a part was loaded from
        kept = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(TOKENIZER, folder / "tokenizer")


def plot(curves, path):
    """Plot running means of the losses, one plot per model. curves: name -> values per step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.5), squeeze=False)
    for axis, (name, values) in zip(axes[0], curves.items(), strict=True):
        axis.plot(np.convolve(values, np.ones(50) / 50, "valid"))
        axis.set(title=name, xlabel="step (mean of 50)", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


# -----------------------------------------------------------------------------
# All stages


def main(options):
    torch.manual_seed(options.seed)
    work_dir, started = options.work_dir, time.time()
    work_dir.mkdir(parents=True, exist_ok=True)
    of_film = read_shots()
    shots = of_film + read_demo_clips()
    films = [film_frames(options.film, work_dir, *size) for size in SIZES]
    if options.start_from:
        shutil.copytree(options.start_from / "vae", work_dir / "vae", dirs_exist_ok=True)
    elif not (work_dir / "vae").exists():
        train_vae(films, of_film, work_dir, options.vae_steps, options.seed).save_pretrained(work_dir / "vae")
        print(f"VAE: {(time.time() - started) / 60:.0f} minutes")
    vae = AutoencoderKLCogVideoX.from_pretrained(work_dir / "vae", torch_dtype=torch.float32).eval()
    show_reconstructions(vae, films, shots, work_dir / "vae_reconstructions.png", "film above, VAE below")

    sets = []
    for film, frames, strides, every, share in ((0, 17, (3, 2, 1), 8, 0.92), (0, 49, (1,), 24, 0.05), (1, 17, (3, 2), 48, 0.03)):
        chosen = windows(shots, frames, strides, every)
        path = work_dir / f"latents-{frames}x{films[film].shape[1]}x{films[film].shape[2]}.pt"
        sets.append((encode_windows(vae, films[film], chosen, frames, path), np.array([number for number, _, _ in chosen]), share))
        print(f"{len(chosen)} clips of {path.stem}")
    tokenizer, captions = AutoTokenizer.from_pretrained(TOKENIZER), [caption for _, _, caption in shots]
    ids = tokenizer([*captions, ""], padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt").input_ids
    prompts = [*captions[4 : len(of_film) : 19], *DEMO_PROMPTS]

    def parts_of(transformer, text_encoder):
        models = {"transformer": transformer.eval(), "text_encoder": text_encoder.eval(), "vae": vae}
        return models | {"tokenizer": tokenizer, "scheduler": make_scheduler()}

    def make_samples(transformer, text_encoder, step):
        videos = sample(parts_of(transformer, text_encoder), prompts)
        contact_sheet(work_dir / "samples.png", list(zip(prompts, videos, strict=True)), f"after {step} steps")
        for number, video in enumerate(videos):
            write_video(work_dir / f"samples/{number:02d}.mp4", video, 8)
        transformer.train()
        text_encoder.train()

    started = time.time()
    models = make_transformer(), make_text_encoder()
    if options.start_from:
        models = (
            CogVideoXTransformer3DModel.from_pretrained(options.start_from, subfolder="transformer", torch_dtype=torch.float32),
            T5EncoderModel.from_pretrained(options.start_from, subfolder="text_encoder", dtype=torch.float32),
        )
    train_transformer(models, sets, captions, ids, work_dir, options.transformer_steps, options.seed, make_samples)
    print(f"transformer: {(time.time() - started) / 60:.0f} minutes")
    write_folder(parts_of(*models), work_dir / "model")
    curves = [path for path in (work_dir / "vae_curve.txt", work_dir / "transformer_curve.txt") if path.exists()]
    plot({path.stem: np.loadtxt(path) for path in curves}, work_dir / "curves.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", type=Path, help="bbb.mp4")
    parser.add_argument("--work_dir", type=Path, default=Path("base"))
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--transformer_steps", type=int, default=3200)
    parser.add_argument("--start_from", type=Path, help="a model folder: its VAE is kept, and its transformer trained further")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
