"""What a CogVideoX folder holds, what it can be trained on, and how text and video become what the transformer sees."""

import functools
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.checkpoint
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from transformers import AutoTokenizer, T5EncoderModel

from dataset import longest_legal_length

COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ModelFacts:
    """What training needs to know of a model, read from its configs (never from its name)."""

    spatial_multiple: int  # height and width: the VAE's compression times the patch, in pixels
    frames_per_latent: int  # the VAE's temporal compression: 4k + 1 frames
    latents_per_patch: int  # patch_size_t, 1 for CogVideoX 1.0
    max_text_seq_length: int  # tokens; T5 pads to it and the transformer attends to the padding
    latent_channels: int
    latent_compression: int  # pixels a latent, in height and in width
    scaling_factor: float  # what makes latents unit variance: 1.15258426 for the 2B, 0.7 for the 5B


COGVIDEOX_2B = ModelFacts(16, 4, 1, 226, 16, 8, 1.15258426)  # what data is checked against while no model is found


# -----------------------------------------------------------------------------
# The folder


def find_model(name_or_path, revision=None, variant=None, cache_dir=None, token=None):
    """Return the local folder of a model: the path itself, or the snapshot of a hub id (downloaded where needed).

    Raises ValueError with a sentence for the user.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"--pretrained_model_name_or_path {name_or_path}: a file; give the model's folder")
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise ValueError(f"--pretrained_model_name_or_path {name_or_path}: no such folder, and not a hub id (OWNER/NAME) either")
    from huggingface_hub import snapshot_download

    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    patterns = [f"{part}/{kind}" for part in COMPONENTS for kind in ("*.json", "*.model", "*.txt", weights)]
    try:
        return Path(
            snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=["*.json", *patterns])
        )
    except Exception as error:  # the hub client raises many kinds; the user needs one sentence of any of them
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--pretrained_model_name_or_path {name_or_path}: no such folder here, and the hub did not give it{offline}: {reason}"
        ) from None


def check_model_folder(folder, variant=None, may_lack=()):
    """Problems of a model folder, each a sentence: missing parts, missing or cut weight files, families not trained here.

    may_lack: components whose weights may be missing, because what they would encode may be in the cache.
    """
    problems = []
    for part in COMPONENTS:
        wanted = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")
        if not (folder / part / wanted).is_file():
            problems.append(f"{folder}: no {part}/{wanted}; a CogVideoX folder has {', '.join(COMPONENTS)}")
    if problems:
        return problems
    for part in ("text_encoder", "vae", "transformer"):
        files, problem = weight_files(folder / part, variant)
        problems += [problem] if problem and part not in may_lack else []
        problems += [f"{file}: {reason}" for file in files if (reason := broken_safetensors(file))]
    return problems + unsupported_family(
        read_json(folder / "transformer/config.json"), read_json(folder / "scheduler/scheduler_config.json")
    )


def read_json(path):
    """A JSON file's content."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def weight_files(folder, variant=None):
    """The safetensors files of one component. Returns (files, problem)."""
    suffix = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        if (single := folder / f"{stem}{suffix}.safetensors").is_file():
            return [single], None
        index = folder / f"{stem}.safetensors.index{suffix}.json"
        if index.is_file():
            files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
            missing = [file.name for file in files if not file.is_file()]
            return ([], f"{folder}: lacks {', '.join(missing)}, which {index.name} names") if missing else (files, None)
    other = " (pickled weights are not read: convert them to safetensors)" if list(folder.glob("*.bin")) else ""
    return [], f"{folder}: no {suffix.lstrip('.') + ' ' if suffix else ''}safetensors weights{other}"


def safetensors_header(path):
    """The header of a safetensors file: name -> {dtype, shape, data_offsets}. Reads no weights. ValueError if broken."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < 100_000_000:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if path.stat().st_size != 8 + length + end:
        raise ValueError(f"truncated: {path.stat().st_size} bytes of {8 + length + end}")
    return header


def broken_safetensors(path):
    """Why a safetensors file cannot be read, or None."""
    try:
        safetensors_header(path)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def stored_dtype(folder, part, variant=None):
    """The dtype in which most of a component's bytes are stored."""
    sizes = Counter()
    for file in weight_files(folder / part, variant)[0]:
        for entry in safetensors_header(file).values():
            sizes[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return TORCH_DTYPES.get(sizes.most_common(1)[0][0], torch.float32)


def unsupported_family(transformer, scheduler):
    """Why this script cannot train a model of this config, as a list of sentences."""
    problems = []
    if transformer.get("_class_name", "CogVideoXTransformer3DModel") != "CogVideoXTransformer3DModel":
        problems.append(f"its transformer is a {transformer['_class_name']}; this script trains CogVideoXTransformer3DModel")
    elif transformer.get("in_channels", 16) != transformer.get("out_channels", 16) or transformer.get("ofs_embed_dim"):
        problems.append("this is an image-to-video model (it takes more channels than it gives); this script trains text-to-video only")
    elif transformer.get("use_learned_positional_embeddings"):
        problems.append("this model has learned positions, which fix its size; this script trains sincos and rotary models only")
    if scheduler.get("prediction_type") != "v_prediction":
        problems.append(f"its scheduler predicts {scheduler.get('prediction_type')!r}; the loss here is for v_prediction")
    return problems


def read_facts(folder):
    """ModelFacts from the configs. Defaults are those of the diffusers classes."""
    transformer, vae = read_json(folder / "transformer/config.json"), read_json(folder / "vae/config.json")
    compression = 2 ** (len(vae.get("block_out_channels", (128, 256, 256, 512))) - 1)
    return ModelFacts(
        spatial_multiple=compression * transformer.get("patch_size", 2),
        frames_per_latent=int(vae.get("temporal_compression_ratio", 4)),
        latents_per_patch=transformer.get("patch_size_t") or 1,
        max_text_seq_length=transformer.get("max_text_seq_length", 226),
        latent_channels=vae.get("latent_channels", 16),
        latent_compression=compression,
        scaling_factor=vae.get("scaling_factor", 1.15258426),
    )


def check_geometry(facts, height, width, num_frames, names=("--height", "--width", "--max_num_frames")):
    """Problems of a clip size for this model, with the nearest sizes that are legal."""
    problems = []
    for name, value in ((names[0], height), (names[1], width)):
        step = facts.spatial_multiple
        if value % step:
            lower, upper = value - value % step, value - value % step + step
            offer = f"{lower} or {upper}" if lower else str(upper)
            problems.append(f"{name} {value}: this model takes multiples of {step}; the nearest are {offer}")
    legal = longest_legal_length(num_frames, facts.frames_per_latent, facts.latents_per_patch)
    if legal != num_frames:
        step = facts.frames_per_latent * facts.latents_per_patch
        offer = f"{legal} or {legal + step}" if legal else str(facts.frames_per_latent * (facts.latents_per_patch - 1) + 1)
        rule = f"{facts.frames_per_latent}k + 1 frames" + (
            f", k + 1 a multiple of {facts.latents_per_patch}" if facts.latents_per_patch > 1 else ""
        )
        problems.append(f"{names[2]} {num_frames}: this model takes {rule}; the nearest are {offer}")
    return problems


# -----------------------------------------------------------------------------
# Loading


def usable_dtype(stored, device):
    """The dtype to run stored weights in: the stored one, but fp32 for fp16 on a CPU, which has no fast fp16."""
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def load_tokenizer(folder):
    """The T5 tokenizer. Raises ValueError with the package to install where one is missing."""
    try:
        return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # transformers names tiktoken where it means protobuf
        raise ValueError(
            f"{folder / 'tokenizer'}: cannot be loaded ({str(error).splitlines()[0]}); it needs: pip install sentencepiece protobuf"
        ) from None


def load_text_encoder(folder, device, variant=None):
    """The T5 encoder in its stored dtype, frozen. transformers keeps T5's `wo` in fp32 when it loads fp16."""
    dtype = usable_dtype(stored_dtype(folder, "text_encoder", variant), device)
    model = T5EncoderModel.from_pretrained(
        folder / "text_encoder", dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True
    )
    return model.requires_grad_(False).eval().to(device)


def load_vae(folder, device, variant=None, slicing=False, tiling=False):
    """The video VAE in its stored dtype, frozen."""
    dtype = usable_dtype(stored_dtype(folder, "vae", variant), device)
    vae = AutoencoderKLCogVideoX.from_pretrained(
        folder / "vae", torch_dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True
    )
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    return vae.requires_grad_(False).eval().to(device)


def load_transformer(folder, dtype, variant=None):
    """The transformer in `dtype`, frozen, on the CPU."""
    model = CogVideoXTransformer3DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True
    )
    return model.requires_grad_(False)


def load_scheduler(folder):
    """The scheduler that the folder names. Others would drop `snr_shift_scale` without a word and train another noise."""
    config = read_json(folder / "scheduler/scheduler_config.json")
    kind = CogVideoXDPMScheduler if config.get("_class_name") == "CogVideoXDPMScheduler" else CogVideoXDDIMScheduler
    return kind.from_pretrained(folder / "scheduler", local_files_only=True)


# -----------------------------------------------------------------------------
# Encoding


def count_tokens(tokenizer, captions):
    """Tokens of each caption, the end token included, nothing cut."""
    return [len(ids) for ids in tokenizer(list(captions), add_special_tokens=True, verbose=False).input_ids]


@torch.no_grad()
def encode_captions(tokenizer, text_encoder, captions, max_text_seq_length):
    """T5 embeddings [B, max_text_seq_length, D], padded and without a mask, as CogVideoXPipeline.encode_prompt makes them."""
    ids = tokenizer(
        list(captions), padding="max_length", max_length=max_text_seq_length, truncation=True, add_special_tokens=True, return_tensors="pt"
    ).input_ids
    return text_encoder(ids.to(text_encoder.device))[0]


@torch.no_grad()
def encode_frames(vae, frames):
    """The posterior of one clip: moments [2C, F', H', W'] (mean, then log-variance), from uint8 frames [F, H, W, 3]."""
    video = torch.from_numpy(frames.copy()).to(vae.device).permute(3, 0, 1, 2)[None]  # [1, 3, F, H, W]
    moments = vae.encode((video.to(torch.float32) / 127.5 - 1).to(vae.dtype)).latent_dist.parameters[0]
    compression = 2 ** (len(vae.config.block_out_channels) - 1)
    if moments.shape[2:] != (frames.shape[1] // compression, frames.shape[2] // compression):
        # diffusers' tiles overlap by a share of their size, which is whole latents only for tiles of a multiple of 48 pixels.
        raise ValueError("the VAE's tiles do not fit this size: use --no-enable_tiling")
    return moments


def sample_latents(moments, scaling_factor, generator):
    """One sample of a posterior, scaled, in fp32: [F', C, H', W'] from moments [2C, F', H', W'].

    As DiagonalGaussianDistribution.sample times the VAE's scaling_factor; the layout is the transformer's.
    """
    mean, log_variance = moments.float().chunk(2)
    noise = torch.randn(mean.shape, generator=generator)
    latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
    return latents.transpose(0, 1) * scaling_factor


@torch.no_grad()
def decode_latents(vae, latents):
    """uint8 frames [F, H, W, 3] of scaled latents [F', C, H', W'], as CogVideoXPipeline.decode_latents makes them."""
    latents = latents.transpose(0, 1)[None].to(vae.device, vae.dtype) / vae.config.scaling_factor
    video = vae.decode(latents).sample[0].float()  # [3, F, H, W]
    # diffusers' VAE decodes an even number of latents to 4 frames each, where the first stands for one: drop the surplus.
    video = video[:, -((latents.shape[2] - 1) * vae.config.temporal_compression_ratio + 1) :]
    return ((video / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def rotary_tables(transformer, device):
    """A function from a batch to the (cos, sin) tables of a rotary model, made by the pipeline's own function.

    It returns None for a sincos model (the 2B), whose positions are added inside the transformer. Tables are kept by shape.
    """
    if not transformer.config.use_rotary_positional_embeddings:
        return lambda batch: None
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)

    @functools.lru_cache(maxsize=8)
    def tables(latent_frames, latent_height, latent_width):
        pixels = pipeline.vae_scale_factor_spatial
        return pipeline._prepare_rotary_positional_embeddings(latent_height * pixels, latent_width * pixels, latent_frames, device)

    return lambda batch: tables(batch["latents"].shape[1], *batch["latents"].shape[3:])


def checkpoint_blocks(transformer, wanted):
    """Recompute the first blocks in the backward pass instead of keeping their activations: "all", "none" or how many."""
    blocks = len(transformer.transformer_blocks)
    count = {"all": blocks, "none": 0}.get(wanted) if not wanted.isdecimal() else min(int(wanted), blocks)
    if count == 0:
        return
    recomputed = set(map(id, transformer.transformer_blocks[:count]))

    def run(block, *inputs):
        if id(block) not in recomputed:
            return block(*inputs)
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)

    transformer.enable_gradient_checkpointing(gradient_checkpointing_func=run)
