"""Loading the models of a CogVideoX folder, encoding captions and clips, decoding latents, gradient checkpointing."""

import contextlib
import functools
import importlib

import torch
import torch.utils.checkpoint
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import T5EncoderModel

from cogvideox.console import say, warn
from cogvideox.files import read_json
from cogvideox.folder import stored_dtype, weight_files


def usable_dtype(stored, device):
    """The dtype to run stored weights in: the stored one, or fp32 for fp16 weights on a CPU, which has no fast fp16."""
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def load_text_encoder(folder, device, variant=None):
    """The T5 encoder in its stored dtype, frozen, loaded onto the device. transformers keeps T5's `wo` in fp32 when it loads fp16.

    If it does not fit on the GPU, accelerate keeps the excess in host memory and copies each layer when it is used.
    """
    dtype = usable_dtype(stored_dtype(folder, "text_encoder", variant), device)
    weights = sum(file.stat().st_size for file in weight_files(folder / "text_encoder", variant)[0])
    if dtype == torch.float16:
        weights = weights * 5 / 4  # `wo` takes a fifth of them, and twice its size
    placed = {"device_map": {"": device}}
    if device.type == "cuda":
        placed = placement(weights, torch.cuda.mem_get_info(device)[0], device)
    model = T5EncoderModel.from_pretrained(
        folder / "text_encoder", dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True, **placed
    )
    return model.requires_grad_(False).eval()


def placement(weights, free, gpu):
    """Arguments to load `weights` bytes with `free` bytes on a GPU: all there, or split between GPU and host.

    Encoding a caption needs less than a hundredth of T5's weights more (cogvideox.memory).
    """
    if weights * 1.01 < 0.95 * free:
        return {"device_map": {"": gpu}}
    say("T5 does not fit in the GPU's free memory: part of it stays in host memory, which is slower")
    return {"device_map": "auto", "max_memory": {gpu.index or 0: int(0.9 * free), "cpu": 2**50}}


def load_vae(folder, device, variant=None, slicing=False, tiling=False):
    """The video VAE in its stored dtype, frozen, loaded onto the device."""
    dtype = usable_dtype(stored_dtype(folder, "vae", variant), device)
    vae = AutoencoderKLCogVideoX.from_pretrained(
        folder / "vae", torch_dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True, device_map={"": device}
    )
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    # The image-to-video pipeline gives it an image in the transformer's dtype.
    vae.encoder.register_forward_pre_hook(lambda encoder, inputs: (inputs[0].to(next(encoder.parameters()).dtype), *inputs[1:]))
    return vae.requires_grad_(False).eval()


def load_transformer(folder, dtype, variant=None, device="cpu"):
    """The transformer in `dtype`, frozen, loaded onto the device; on "meta" its shapes alone, in fp32, which reads no weights."""
    device = torch.device(device)
    if device.type == "meta":
        with device:
            model = CogVideoXTransformer3DModel.from_config(CogVideoXTransformer3DModel.load_config(folder / "transformer"))
    else:
        model = CogVideoXTransformer3DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True, device_map={"": device}
        )
    keep_position_tables(model.patch_embed)
    return model.requires_grad_(False)


def keep_position_tables(patch_embed, shapes=8):
    """Cache the sincos table per size: diffusers recomputes it in every forward pass, in float64, except for the default size.

    At 49 x 480 x 640 that takes more than half a second of a CPU core. A no-op if diffusers renames its private function. For
    another number of frames, diffusers replaces a learned table by sincos values that the model has never seen; here a shorter clip
    gets the first rows of the table, as in the authors' training.
    """
    if make := getattr(patch_embed, "_get_positional_embeddings", None):
        dtype = patch_embed.proj.weight.dtype  # the table is cast to it when it is added
        if hasattr(patch_embed, "pos_embedding"):  # the default size's: 273 MB in float64
            patch_embed.pos_embedding = patch_embed.pos_embedding.to(dtype)
        if patch_embed.use_learned_positional_embeddings:
            patch_embed._get_positional_embeddings = functools.partial(first_positions, patch_embed)
        elif patch_embed.use_positional_embeddings:
            patch_embed._get_positional_embeddings = functools.lru_cache(shapes)(lambda *args, **kwargs: make(*args, **kwargs).to(dtype))


def first_positions(patch_embed, height, width, frames, device=None):
    """The learned positions [1, T + patches, D] of a clip of fewer frames than the table's. height, width: latents."""
    latent_frames = (frames - 1) // patch_embed.temporal_compression_ratio + 1
    patches = latent_frames * (height // patch_embed.patch_size) * (width // patch_embed.patch_size)
    return patch_embed.pos_embedding[:, : patch_embed.max_text_seq_length + patches]


def load_scheduler(folder):
    """The scheduler class named in the folder. Another one would silently drop `snr_shift_scale` and change the noise schedule."""
    config = read_json(folder / "scheduler/scheduler_config.json")
    kind = CogVideoXDPMScheduler if config.get("_class_name") == "CogVideoXDPMScheduler" else CogVideoXDDIMScheduler
    return kind.from_pretrained(folder / "scheduler", local_files_only=True)


# -----------------------------------------------------------------------------
# Encoding


@torch.no_grad()
def encode_captions(tokenizer, text_encoder, captions, max_text_seq_length):
    """T5 embeddings [B, max_text_seq_length, D], padded and without a mask, like CogVideoXPipeline.encode_prompt."""
    ids = tokenizer(
        list(captions), padding="max_length", max_length=max_text_seq_length, truncation=True, add_special_tokens=True, return_tensors="pt"
    ).input_ids
    first = text_encoder.get_input_embeddings().weight.device  # meta if accelerate keeps that layer in host memory, and then moves ids
    return text_encoder(ids if first.type == "meta" else ids.to(first))[0]


@torch.no_grad()
def encode_frames(vae, frames):
    """The posterior of one clip: moments [2C, F', H', W'] (mean, then log-variance), from uint8 frames [F, H, W, 3]."""
    video = torch.from_numpy(frames.copy()).to(vae.device).permute(3, 0, 1, 2)
    # In the VAE's dtype at once: nothing holds the fp32 pixels, 0.2 GiB at 49 x 480 x 720, while it encodes.
    return encode_pixels(vae, (video.to(torch.float32) / 127.5 - 1).to(vae.dtype))


@torch.no_grad()
def encode_pixels(vae, video):
    """Moments [2C, F', H', W'] of a video [3, F, H, W], from -1 to 1."""
    moments = vae.encode(video[None].to(vae.dtype)).latent_dist.parameters[0]
    compression = 2 ** (len(vae.config.block_out_channels) - 1)
    if moments.shape[2:] != (video.shape[2] // compression, video.shape[3] // compression):
        # diffusers' tiles overlap by a fraction of their size, a whole number of latents only for multiples of 48 pixels.
        raise ValueError("the VAE's tiles do not fit this size: use --no-enable_tiling")
    return moments


@contextlib.contextmanager
def whole_frames(vae):
    """Inside, the VAE encodes whole frames, not tiles: as the stock pipeline and training encode an image. A no-op without a VAE."""
    tiling = vae is not None and vae.use_tiling
    if tiling:
        vae.use_tiling = False
    try:
        yield
    finally:
        if tiling:
            vae.use_tiling = True


def sample_latents(moments, scaling_factor, generator):
    """One sample of a posterior, scaled, in fp32: [F', C, H', W'] from moments [2C, F', H', W'].

    Like DiagonalGaussianDistribution.sample, times the VAE's scaling_factor, in the transformer's layout.
    """
    mean, log_variance = moments.float().chunk(2)
    noise = torch.randn(mean.shape, generator=generator)
    latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
    return latents.transpose(0, 1) * scaling_factor


@torch.no_grad()
def decode_latents(vae, latents):
    """uint8 frames [F, H, W, 3] of scaled latents [F', C, H', W'], like CogVideoXPipeline.decode_latents."""
    latents = latents.transpose(0, 1)[None].to(vae.device, vae.dtype) / vae.config.scaling_factor
    video = vae.decode(latents).sample[0].float()  # [3, F, H, W]
    # diffusers' VAE decodes an even number of latents to 4 frames each, although the first encodes one: drop the surplus.
    video = video[:, -((latents.shape[2] - 1) * vae.config.temporal_compression_ratio + 1) :]
    return ((video / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


# -----------------------------------------------------------------------------
# What the stock pipeline gives the transformer beside noisy latents, text and timestep

OFS = 2.0  # the only value that CogVideoXImageToVideoPipeline gives to models with an `ofs` embedding


def pad_latents(latents, latents_per_patch):
    """Repeat the first latent of [F', C, H', W'] until the frames are a multiple of the temporal patch.

    CogVideoX 1.5 was trained so, and its pipeline throws these frames away after sampling.
    """
    return torch.cat([latents[:1]] * (-len(latents) % latents_per_patch) + [latents])


def drop_padding(latents, num_frames, frames_per_latent):
    """The latents [F', C, H', W'] of a video of `num_frames` frames, without those that the pipeline put in front of them.

    With output_type="latent" it leaves them there. They must go before decoding: the VAE is causal, and a video begins with its first.
    """
    return latents[-((num_frames - 1) // frames_per_latent + 1) :]


def pipeline_class(config):
    """The stock pipeline of a transformer with this config."""
    return CogVideoXImageToVideoPipeline if config["in_channels"] != config["out_channels"] else CogVideoXPipeline


def bare_pipeline(transformer, **parts):
    """The stock pipeline of a transformer, with no other part than those given."""
    absent = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": None}
    return pipeline_class(transformer.config)(transformer=transformer, **(absent | parts))


def constant_inputs(transformer, device):
    """A function from a batch to the inputs of the transformer that its shape decides: {"image_rotary_emb": ..., "ofs": ...}.

    The (cos, sin) tables are computed by the pipeline and cached by shape; None for a sincos model (the 2B), which adds its positions
    inside the transformer. ofs: [1], or None for a model without it.
    """
    ofs = torch.full((1,), OFS, device=device) if transformer.config.ofs_embed_dim else None
    if not transformer.config.use_rotary_positional_embeddings:
        return lambda batch: {"image_rotary_emb": None, "ofs": ofs}
    pipeline = bare_pipeline(transformer)

    @functools.lru_cache(maxsize=8)
    def tables(latent_frames, latent_height, latent_width):
        pixels = pipeline.vae_scale_factor_spatial
        return pipeline._prepare_rotary_positional_embeddings(latent_height * pixels, latent_width * pixels, latent_frames, device)

    return lambda batch: {"image_rotary_emb": tables(batch["latents"].shape[1], *batch["latents"].shape[3:]), "ofs": ofs}


# -----------------------------------------------------------------------------
# Gradient checkpointing and compilation


def blocks_to_recompute(setting, blocks):
    """(number of blocks, whether their attention outputs are kept) of a --gradient_checkpointing value; auto starts as all."""
    if setting.isdecimal():
        return min(int(setting), blocks), True
    return {"auto": (blocks, False), "all": (blocks, False), "attention": (blocks, True), "none": (0, True)}[setting]


def checkpoint_blocks(transformer, recomputed, keep_attention):
    """Recompute the activations of the first `recomputed` blocks in the backward pass instead of keeping them.

    keep_attention: keep their attention outputs, a fortieth of a block's activations. Attention is quadratic in the tokens: at
    49 x 480 x 720 it takes six tenths of the forward pass.
    """
    if recomputed == 0:
        transformer.disable_gradient_checkpointing()
        return
    chosen = set(map(id, transformer.transformer_blocks[:recomputed]))
    settings = {}
    if keep_attention:
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy_fn_or_list=keep_attention_outputs)

    def run(block, *inputs):
        if id(block) not in chosen:
            return block(*inputs)
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, **settings)

    transformer.enable_gradient_checkpointing(gradient_checkpointing_func=run)


def keep_attention_outputs(context, operation, *args, **kwargs):
    """The policy of selective checkpointing: save the output of scaled dot product attention (any backend), recompute all else."""
    is_attention = "_scaled_dot_product" in str(operation)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(transformer, device):
    """Compile the repeated blocks in place (regional compilation: one graph for all blocks), if a compiler is installed.

    Only training steps run compiled: validation and the checks have other shapes and adapters, and would recompile. A block's hooks
    stay outside of its graph: those of --offload copy weights.
    """
    try:
        if device.type == "cuda":
            importlib.import_module("triton")
        else:
            importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except Exception as error:  # torch's errors of a missing compiler
        warn(f"--compile: no compiler found ({str(error).splitlines()[0][:100]}); training without it")
        return
    for block in transformer.transformer_blocks:
        block.forward = torch.compile(block.forward)
