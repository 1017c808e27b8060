"""A baseline to measure against: how the original CogVideoX LoRA trainer works, in one small program of our own.

    python -m tools.benchmark.reference --pretrained_model_name_or_path MODEL --instance_data_root CLIPS --output_dir OUT [flags]

Written from a description of that trainer, not from its text. What it imitates, because time and memory depend on it:
- everything is imported at once; T5, the VAE and the transformer are loaded at once and stay to the end
- every clip is decoded to fp32 before the first is encoded; every start encodes all clips anew and keeps the posteriors
- T5 runs on the caption in each step; the noise is added in the model's dtype; the loss is the weighted x0 error
- the LoRA has the model's dtype (bf16 in bf16), and peft casts activations to it; DDP searches for unused parameters
- AdamW is not fused; each micro-batch waits for its loss, and writes a line of metrics.jsonl
- the linear layers and the blocks are diffusers' own, with all blocks checkpointed or none
- at the end the state is saved, and a second whole pipeline is loaded for a last video, though the first is still there

Where it is kinder than the original: it computes in bf16 or fp32 whatever the model is called; T5 and the VAE are loaded in
the compute dtype, not in fp32 first, and a VAE that is stored in fp32 stays so, as in our trainer (CPUs have no fast bf16 for
the few channels of a generated one); the last video has the trained number of frames, not always 49; there are no videos on
the way; clips with too few frames or lists that do not match end it with a sentence; the data is not encoded by every
process of several. It trains models with sincos positions (the 2B) on a folder with prompts.txt and videos.txt.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.utils import export_to_video
from peft import LoraConfig, get_peft_model_state_dict
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer, T5EncoderModel

from cogvideox.console import fail
from cogvideox.flags import refuse
from cogvideox.folder import PRECISIONS, stored_dtype

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


# -----------------------------------------------------------------------------
# Data


def read_lists(root):
    """The (file, caption) pairs of prompts.txt and videos.txt. ValueError where they do not match."""
    captions, files = ((Path(root) / name).read_text(encoding="utf-8").split("\n") for name in ("prompts.txt", "videos.txt"))
    captions, files = [line.strip() for line in captions if line.strip()], [line.strip() for line in files if line.strip()]
    if len(captions) != len(files) or not files:
        raise ValueError(f"{root}: prompts.txt has {len(captions)} lines and videos.txt {len(files)}")
    return [(Path(root) / name, caption) for name, caption in zip(files, captions, strict=True)]


def decode_clip(path, height, width, max_num_frames):
    """One file as fp32 pixels in [-1, 1], [F, 3, H, W]: stretched by the decoder, frames at an even stride, 4k + 1 of them."""
    import decord  # a step does without it

    video = decord.VideoReader(str(path), width=width, height=height)
    indices = list(range(0, len(video), max(1, len(video) // max_num_frames)))[:max_num_frames]
    indices = indices[: (len(indices) - 1) // 4 * 4 + 1]
    frames = torch.from_numpy(video.get_batch(indices).asnumpy()).float()
    return torch.stack([frame / 255 * 2 - 1 for frame in frames]).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def encode_clip(vae, video):
    """The posterior of one clip [F, 3, H, W], a distribution over latents [1, C, F', H', W']."""
    return vae.encode(video[None].to(vae.device, vae.dtype).permute(0, 2, 1, 3, 4)).latent_dist


def batches_of(posteriors, captions, scaling_factor, batch_size=1):
    """A shuffled loader of (latents [B, F', C, H', W'], captions); each time a fresh sample of the posterior."""

    def collate(items):
        latents = torch.cat([posterior.sample() * scaling_factor for posterior, _ in items])
        return latents.permute(0, 2, 1, 3, 4).contiguous(), [caption for _, caption in items]

    pairs = list(zip(posteriors, captions, strict=True))
    return DataLoader(pairs, batch_size=batch_size, shuffle=True, collate_fn=collate)


# -----------------------------------------------------------------------------
# The step


def add_lora(transformer, rank):
    """Inject a LoRA of the transformer's own dtype (alpha = rank) and return its parameters."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=TARGETS))
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def start_accelerator(precision):
    """The Accelerator of a run: autocast in bf16, and DDP that walks the graph for unused parameters in each step."""
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


@torch.no_grad()
def embed_captions(tokenizer, text_encoder, captions, length):
    """T5's embeddings [B, length, D] of captions, padded, without a mask."""
    words = tokenizer(captions, padding="max_length", max_length=length, truncation=True, add_special_tokens=True, return_tensors="pt")
    return text_encoder(words.input_ids.to(text_encoder.device))[0]


def weighted_x0_loss(model, scheduler, latents, noise, timestep, prompt):
    """mean of |x0_hat - x0|^2 / (1 - abar), a scalar; latents and noise [B, F', C, H', W'] in the model's dtype, timestep [B].

    The scheduler's `get_velocity`, given the noisy latents and the predicted velocity, returns the predicted latents.
    """
    noisy = scheduler.add_noise(latents, noise, timestep)
    output = model(hidden_states=noisy, encoder_hidden_states=prompt, timestep=timestep, image_rotary_emb=None, return_dict=False)[0]
    predicted = scheduler.get_velocity(output, noisy, timestep)
    weight = 1 / (1 - scheduler.alphas_cumprod.to(latents.device)[timestep])
    error = weight[:, None, None, None, None] * (predicted - latents) ** 2
    return error.flatten(1).mean(dim=1).mean()


def train_step(accelerator, model, scheduler, optimizer, schedule, parameters, tokenizer, text_encoder, batch, length):
    """One micro-batch, T5 and all, and the optimizer step after it. batch: what `batches_of` yields. Returns the loss, a number."""
    latents, captions = batch
    latents = latents.to(accelerator.device, text_encoder.dtype)
    with accelerator.accumulate(model):
        prompt = embed_captions(tokenizer, text_encoder, captions, length).to(latents.dtype)
        noise = torch.randn_like(latents)
        timestep = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        loss = weighted_x0_loss(model, scheduler, latents, noise, timestep, prompt)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.detach().item()


def prepare(accelerator, transformer, parameters, learning_rate=1e-4):
    """(model, optimizer, schedule) as accelerate wraps them."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    return accelerator.prepare(transformer.train(), optimizer, get_scheduler("constant", optimizer))


# -----------------------------------------------------------------------------
# The run


def save_adapter_only(accelerator):
    """Have `save_state` write the LoRA in place of the whole model."""

    def hook(models, weights, folder):
        for model in models:
            state = get_peft_model_state_dict(accelerator.unwrap_model(model))
            CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=state)
            weights.pop()

    accelerator.register_save_state_pre_hook(hook)


def last_video(options, folder, dtype, vae_dtype, device):
    """Load a second pipeline with the LoRA, and make a video of the prompt if there is one."""
    dtypes = {"vae": vae_dtype, "default": dtype}
    pipeline = CogVideoXPipeline.from_pretrained(folder, torch_dtype=dtypes, local_files_only=True)
    pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(str(options.output_dir), weight_name="pytorch_lora_weights.safetensors", local_files_only=True)
    pipeline = pipeline.to(device)
    if options.validation_prompt:
        latents = pipeline(
            prompt=options.validation_prompt,
            height=options.height,
            width=options.width,
            num_frames=options.max_num_frames,
            num_inference_steps=options.num_inference_steps,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="latent",
        ).frames
        with torch.no_grad():
            video = pipeline.decode_latents(latents.to(vae_dtype))
        export_to_video(
            list(pipeline.video_processor.postprocess_video(video, output_type="np")[0]), str(Path(options.output_dir) / "last.mp4"), fps=8
        )


def main(options):
    """One run, as described above."""
    folder, dtype, output_dir = Path(options.pretrained_model_name_or_path), PRECISIONS[options.mixed_precision], Path(options.output_dir)
    pairs = read_lists(options.instance_data_root)
    random.seed(options.seed)
    set_seed(options.seed)
    accelerator = start_accelerator(options.mixed_precision)
    device = accelerator.device
    output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True)
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype, local_files_only=True)
    vae_dtype = torch.float32 if stored_dtype(folder, "vae") == torch.float32 else dtype
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=vae_dtype, local_files_only=True)
    scheduler = CogVideoXDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    if transformer.config.use_rotary_positional_embeddings:
        raise ValueError(f"{folder}: has rotary positions; this program imitates training of sincos models only")
    for model in (text_encoder, vae, transformer):
        model.requires_grad_(False).to(device)
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    parameters = add_lora(transformer, options.rank)
    save_adapter_only(accelerator)

    shape = options.height, options.width, options.max_num_frames
    videos = [decode_clip(path, *shape) for path, _ in tqdm(pairs, "decoding", unit="clip")]
    posteriors = [encode_clip(vae, video) for video in tqdm(videos, "encoding", unit="clip")]
    del videos
    loader = batches_of(posteriors, [caption for _, caption in pairs], vae.config.scaling_factor)
    model, optimizer, schedule = prepare(accelerator, transformer, parameters, options.learning_rate)

    step, length = 0, transformer.config.max_text_seq_length
    with tqdm(total=options.max_train_steps, desc="training", unit="step") as bar, (output_dir / "metrics.jsonl").open("w") as log:
        while step < options.max_train_steps:
            for batch in loader:
                texts = tokenizer, text_encoder
                loss = train_step(accelerator, model, scheduler, optimizer, schedule, parameters, *texts, batch, length)
                step += 1
                log.write(json.dumps({"step": step, "loss": loss, "learning_rate": schedule.get_last_lr()[0]}) + "\n")
                log.flush()
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}")
                if step == options.max_train_steps:
                    break

    accelerator.save_state(str(output_dir / f"checkpoint-{step}"))
    transformer = accelerator.unwrap_model(model).to(dtype)
    CogVideoXPipeline.save_lora_weights(output_dir, transformer_lora_layers=get_peft_model_state_dict(transformer))
    last_video(options, folder, dtype, vae_dtype, device)
    accelerator.end_training()


def parse_args(words=None):
    """The flags: the trainer's names, the few that measurements need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--pretrained_model_name_or_path", required=True, help="folder of a diffusers CogVideoX model")
    flag("--instance_data_root", required=True, help="data folder with prompts.txt and videos.txt")
    flag("--output_dir", required=True, help="where everything is written")
    flag("--height", type=int, default=480, help="pixels")
    flag("--width", type=int, default=720, help="pixels")
    flag("--max_num_frames", type=int, default=49, help="frames a clip at most")
    flag("--rank", type=int, default=128, help="rank of the LoRA matrices")
    flag("--max_train_steps", type=int, default=10, help="optimizer steps")
    flag("--learning_rate", type=float, default=1e-4, help="learning rate, constant")
    flag("--mixed_precision", choices=("bf16", "no"), default="bf16", help="dtype of all models and of the LoRA")
    flag("--gradient_checkpointing", action="store_true", help="recompute the activations of all blocks")
    flag("--validation_prompt", help="make a last video of this prompt (default: none, but the pipeline is loaded all the same)")
    flag("--num_inference_steps", type=int, default=50, help="denoising steps of the last video")
    flag("--seed", type=int, default=42, help="seed of everything random")
    options = parser.parse_args(words)
    names = "pretrained_model_name_or_path", "instance_data_root"
    if missing := [name for name in names if not Path(getattr(options, name)).is_dir()]:
        refuse(parser, [f"--{name} {getattr(options, name)}: no such folder" for name in missing])
    return options


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        fail(1, str(error))
