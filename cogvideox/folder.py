"""Checking a CogVideoX model folder from its configs and file headers, without reading weights."""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError, safe_open

from cogvideox import versions
from cogvideox.console import Bar, say, warn
from cogvideox.decode import longest_legal_length
from cogvideox.files import at_home, key_of, read_json

UNKNOWN_NOTED, UNKNOWN_REFUSED = 0.05, 0.5  # shares of a text's characters: one odd letter is nothing, half of them is the content
COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARDING_ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # set by accelerate launch
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that training depends on, read from its configs (never from its name)."""

    spatial_multiple: int  # height and width: the VAE's compression times the patch, in pixels
    frames_per_latent: int  # the VAE's temporal compression: 4k + 1 frames
    latents_per_patch: int  # patch_size_t, 1 for CogVideoX 1.0
    max_text_seq_length: int  # tokens; T5 pads to it and the transformer attends to the padding
    latent_channels: int
    latent_compression: int  # pixels per latent, in height and width
    scaling_factor: float  # scales latents to unit variance: 1.15258426 for the 2B, 0.7 for the 5B
    head_width: int = 64  # numbers per token and attention head
    image_channels: int = 0  # channels of the condition image's latent beside the noisy ones; 0: text-to-video
    image_scaling_factor: float = 1.15258426  # scales the image's latent
    sample_size: tuple[int, int] = (480, 720)  # height and width that the model was made for, in pixels
    sample_frames: int = 49
    fps: float = 8.0
    positions: str = "sincos"  # or rotary, slice, learned: `positions_of`
    grid_size: tuple[int, int] = (480, 720)  # pixels for which the model has positions, where they are not stretched


CONFIGS_OF_FACTS = ("transformer/config.json", "vae/config.json")
COGVIDEOX_2B = ModelFacts(16, 4, 1, 226, 16, 8, 1.15258426)  # data is checked against these if the model cannot be read
# CogVideoX 1.5 in its authors' README: pixels, and the longest clip. The grid of positions in a config may be larger (300 x 300 latents).
MADE_FOR_15, LONGEST_15 = (768, 1360), 161


def find_model(name_or_path, revision=None, variant=None, cache_dir=None, token=None, configs_only=False):
    """Return the local folder of a model: the path itself, or the snapshot of a hub id (downloaded if necessary).

    configs_only: download the configs of transformer and VAE alone. cache_dir: folder of downloads; a model that lies complete in the
    hub client's own folder is not downloaded again.
    Raises ValueError with a sentence for the user.
    """
    path = Path(at_home(name_or_path))
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"--pretrained_model_name_or_path {name_or_path}: is a file; give the model's folder")
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise ValueError(f"--pretrained_model_name_or_path {name_or_path}: no such folder, and not a hub id (OWNER/NAME)")
    import huggingface_hub

    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    patterns = ["*.json", *(f"{part}/{kind}" for part in COMPONENTS for kind in ("*.json", "*.model", "*.txt", weights))]
    if configs_only:
        patterns = CONFIGS_OF_FACTS
    used = holding_cache(name_or_path, revision, variant, cache_dir)
    if used != cache_dir:
        say(f"{name_or_path} lies in {used}: it is not downloaded again to --cache_dir {cache_dir}")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name_or_path, revision=revision, cache_dir=used, token=token, allow_patterns=patterns, tqdm_class=Bar
            )
        )
    except Exception as error:  # the hub client raises many kinds of errors
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--pretrained_model_name_or_path {name_or_path}: no such folder, and the download from the hub failed{offline}: {reason}"
        ) from None


def holding_cache(name, revision, variant, cache_dir):
    """The folder of downloads that has all files of a hub model: `cache_dir`, or else the hub client's, or else `cache_dir` anyway.

    The guide gives --cache_dir ~/.cache, but the hub client keeps its downloads in ~/.cache/huggingface/hub.
    """
    import huggingface_hub

    if cache_dir is None:
        return None
    for candidate in (cache_dir, os.path.join(cache_dir, "huggingface/hub"), huggingface_hub.constants.HF_HUB_CACHE):
        try:
            snapshot = huggingface_hub.snapshot_download(name, revision=revision, cache_dir=candidate, local_files_only=True)
        except Exception:  # the hub client raises many kinds of errors
            continue
        if is_complete_model(Path(snapshot), variant):
            return candidate
    return cache_dir


def is_complete_model(folder, variant=None):
    """Whether a model folder has the configs and the weight files of all components; reads no weights."""
    configs = all((folder / part / config_name(part)).is_file() for part in COMPONENTS)
    return configs and not any(weight_files(folder / part, variant)[1] for part in ("text_encoder", "vae", "transformer"))


def config_name(part):
    """The name of a component's config file."""
    return {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")


def check_model_folder(folder, variant=None, may_lack=()):
    """Problems of a model folder as sentences: missing components, missing or truncated weights, unsupported families.

    may_lack: components whose weights may be missing, because their encodings may be cached.
    """
    problems = []
    for part in COMPONENTS:
        if not (folder / part / config_name(part)).is_file():
            problems.append(f"{folder}: no {part}/{config_name(part)}; a CogVideoX folder has {', '.join(COMPONENTS)}")
    if problems:
        return problems
    for part in ("text_encoder", "vae", "transformer"):
        files, problem = weight_files(folder / part, variant)
        problems += [problem] if problem and part not in may_lack else []
        problems += [f"{file}: {reason}" for file in files if (reason := broken_safetensors(file))]
    return problems + unsupported_family(
        read_json(folder / "transformer/config.json"), read_json(folder / "scheduler/scheduler_config.json")
    )


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
            return ([], f"{folder}: lacks {', '.join(missing)}, listed in {index.name}") if missing else (files, None)
    other = " (pickled weights are unsupported: convert them to safetensors)" if list(folder.glob("*.bin")) else ""
    return [], f"{folder}: no {suffix.lstrip('.') + ' ' if suffix else ''}safetensors weights{other}"


def safetensors_header(path):
    """The header of a safetensors file: name -> {dtype, shape, data_offsets}. Reads no weights. ValueError if broken.

    Reads the offsets, which the library does not return, and detects truncated files.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < 100_000_000:
            raise ValueError("not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise ValueError("not a safetensors file (its header cannot be read)") from None
    if path.stat().st_size != end:
        raise ValueError(f"truncated: {path.stat().st_size} bytes of {end}")
    return header


def broken_safetensors(path):
    """Why a safetensors file cannot be read, or None."""
    try:
        safetensors_header(path)
        with safe_open(path, framework="pt"):  # checks each tensor's dtype, shape and offsets
            pass
    except (ValueError, OSError, SafetensorError) as error:
        return str(error)
    return None


def stored_dtype(folder, part, variant=None):
    """The dtype of most of a component's bytes."""
    sizes = Counter()
    for file in weight_files(folder / part, variant)[0]:
        for entry in safetensors_header(file).values():
            sizes[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return TORCH_DTYPES.get(sizes.most_common(1)[0][0], torch.float32)


def stored_precision(folder, part, variant=None):
    """`stored_dtype` as a value of --mixed_precision: fp16, bf16, or no for any other dtype."""
    return {dtype: name for name, dtype in PRECISIONS.items()}.get(stored_dtype(folder, part, variant), "no")


def unsupported_family(transformer, scheduler):
    """Why this script cannot train a model of this config, as a list of sentences."""
    problems = []
    if transformer.get("_class_name", "CogVideoXTransformer3DModel") != "CogVideoXTransformer3DModel":
        problems.append(f"its transformer is a {transformer['_class_name']}; this script trains CogVideoXTransformer3DModel")
    elif (channels := (transformer.get("in_channels", 16), transformer.get("out_channels", 16))) not in ((16, 16), (32, 16)):
        problems.append(
            f"its transformer maps {channels[0]} channels to {channels[1]}; this script trains text-to-video models (16 to 16) and "
            "image-to-video models (32 to 16, the image's latent beside the noisy one)"
        )
    if scheduler.get("prediction_type") != "v_prediction":
        problems.append(f"its scheduler predicts {scheduler.get('prediction_type')!r}; this script trains v_prediction models only")
    return problems


def read_facts(folder):
    """ModelFacts of a folder."""
    return facts_of(*(read_json(folder / file) for file in CONFIGS_OF_FACTS))


def facts_for_data(args):
    """(ModelFacts, problems) for a tool that looks at data: of --pretrained_model_name_or_path, else the 2B's.

    Reads two configs, and fills in the flags' defaults.
    """
    name, facts = args.pretrained_model_name_or_path, COGVIDEOX_2B
    try:
        if name:
            folder = find_model(name, cache_dir=getattr(args, "cache_dir", None), token=os.environ.get("HF_TOKEN"), configs_only=True)
            facts = read_facts(folder)
    except (OSError, ValueError) as error:
        sentence = str(error) if "--pretrained" in str(error) else f"--pretrained_model_name_or_path {name}: cannot be read ({error})"
        return facts, [sentence]
    fill_in_defaults(args, facts)
    return facts, []


def facts_of(transformer, vae):
    """ModelFacts from two configs, with the defaults of the diffusers classes."""
    compression = 2 ** (len(vae.get("block_out_channels", (128, 256, 256, 512))) - 1)
    frames_per_latent, latents_per_patch = int(vae.get("temporal_compression_ratio", 4)), transformer.get("patch_size_t") or 1
    scaling_factor = vae.get("scaling_factor", 1.15258426)
    grid_size = tuple(transformer.get(name, latents) * compression for name, latents in (("sample_height", 60), ("sample_width", 90)))
    return ModelFacts(
        spatial_multiple=compression * transformer.get("patch_size", 2),
        frames_per_latent=frames_per_latent,
        latents_per_patch=latents_per_patch,
        max_text_seq_length=transformer.get("max_text_seq_length", 226),
        latent_channels=vae.get("latent_channels", 16),
        latent_compression=compression,
        scaling_factor=scaling_factor,
        head_width=transformer.get("attention_head_dim", 64),
        image_channels=transformer.get("in_channels", 16) - transformer.get("out_channels", 16),
        # As CogVideoXImageToVideoPipeline.prepare_latents has it. Video latents are multiplied by the factor in every model.
        image_scaling_factor=1 / scaling_factor if vae.get("invert_scale_latents") else scaling_factor,
        sample_size=tuple(map(min, grid_size, MADE_FOR_15)) if latents_per_patch > 1 else grid_size,
        sample_frames=longest_legal_length(transformer.get("sample_frames", 49), frames_per_latent, latents_per_patch),
        fps=16.0 if latents_per_patch > 1 else 8.0,  # in no config; the authors' README says it of 1.5
        positions=positions_of(transformer),
        grid_size=grid_size,
    )


def positions_of(transformer):
    """How a transformer of this config tells tokens apart: by sincos values (the 2B), rotary ones (the 5B), a slice of a rotary grid of
    fixed size (1.5), or rotary ones and a learned table (5B-I2V)."""
    if transformer.get("use_learned_positional_embeddings"):
        return "learned"
    if not transformer.get("use_rotary_positional_embeddings"):
        return "sincos"
    return "slice" if transformer.get("patch_size_t") else "rotary"


def latent_shape(facts, frames, height, width):
    """[F', C, H', W'] of a clip's latents: one latent frame for the first frame, one for each further `frames_per_latent`,
    because AutoencoderKLCogVideoX is causal in time."""
    compression = facts.latent_compression
    return (frames - 1) // facts.frames_per_latent + 1, facts.latent_channels, height // compression, width // compression


def patches_of(config, shape):
    """The video tokens of a clip with latents of `shape` [F', C, H', W']. config: the transformer's."""
    frames, _, height, width = shape
    return -(-frames // (config.patch_size_t or 1)) * (height // config.patch_size) * (width // config.patch_size)


def check_geometry(facts, height, width, num_frames, names=("--height", "--width", "--max_num_frames")):
    """Problems of a clip size for this model, with the nearest legal sizes. names: of the three flags."""
    problems, learned = [], facts.positions == "learned"  # those have one size and a longest length: no other is offered
    for name, value in ((names[0], height), (names[1], width)):
        step = facts.spatial_multiple
        if value % step and not learned:
            lower, upper = value - value % step, value - value % step + step
            offer = f"{lower} or {upper}" if lower else str(upper)
            problems.append(f"{name} {value}: this model needs multiples of {step}; the nearest are {offer}")
    legal, step = longest_legal_length(num_frames, facts.frames_per_latent, facts.latents_per_patch), clip_step(facts)
    if legal != num_frames and not (learned and num_frames > facts.sample_frames):
        offer = f"the nearest are {legal} or {legal + step}"
        problems.append(f"{names[2]} {num_frames}: this model needs {step}k + 1 frames; {offer}")
    if learned:
        return check_positions(facts, height, width, num_frames, names) + problems
    return problems or check_positions(facts, height, width, num_frames, names)


def check_positions(facts, height, width, num_frames, names):
    """A sentence about the size, and one about the length, if a clip has tokens for which this model has no positions."""
    rows, columns, frames = (*facts.grid_size, facts.sample_frames)
    size = f"{names[0]} {height}x{width}" if names[0] == names[1] else f"{names[0]} {height}, {names[1]} {width}"
    problems = []
    if facts.positions == "slice" and (height > rows or width > columns):
        problems.append(f"{size}: this model has positions for a height of {rows} and a width of {columns} at most; use a smaller size")
    if facts.positions == "learned" and (height, width) != (rows, columns):
        problems.append(f"{size}: this model has learned positions, for {rows} x {columns} only; use that size")
    if facts.positions == "learned" and num_frames > frames:
        problems.append(f"{names[2]} {num_frames}: this model has learned positions, for {frames} frames at most; use no more")
    return problems


def clip_step(facts):
    """By how many frames the legal lengths of a clip differ: 4 for CogVideoX 1.0, 8 for 1.5."""
    return facts.frames_per_latent * facts.latents_per_patch


def geometry_notes(facts, height, width, num_frames):
    """What training or sampling at a legal size that the model was not made for means, as sentences."""
    return size_notes(facts, height, width) + length_notes(facts, num_frames)


def size_notes(facts, height, width):
    """`geometry_notes` of height and width.

    Only the rotary positions of CogVideoX 1.0 are stretched to the size (get_resize_crop_region_for_grid of diffusers). Those of the 2B
    and of 1.5 are counted from the top left corner.
    """
    made_height, made_width = facts.sample_size
    if is_made_for(facts, height, width) or facts.positions == "learned":
        return []
    made, parts = f"{height} x {width}: this model was made for {made_height} x {made_width}", []
    if facts.positions == "slice" and facts.image_channels:
        made += f" and other sizes with a short side of {made_height} and a long side of {made_height} to {made_width}"
    if facts.positions == "rotary":
        return [f"{made}, and its positions are stretched to the size: expect lower quality, and the LoRA to fit this size best"]
    if height < made_height or width < made_width:
        parts.append("those that the clip leaves out, at the right or the bottom, are not trained")
    if height > made_height or width > made_width:
        parts.append("those beyond that size are new to the model")
    return [f"{made}, and its positions are counted from the top left corner: {', and '.join(parts)}"]


def length_notes(facts, num_frames):
    """`geometry_notes` of the number of frames."""
    notes, frames = [], facts.sample_frames
    longest = max(frames, LONGEST_15) if facts.positions == "slice" else frames
    if num_frames > longest:
        notes.append(f"{num_frames} frames: this model was made for {longest} at most, and later positions in time are new to it")
    if facts.positions == "slice" and (num_frames - 1) % 16:
        notes.append(f"{num_frames} frames: this model was trained on 16N + 1 frames, such as {frames}; expect lower quality")
    if facts.positions == "learned" and num_frames < frames:
        notes.append(
            f"{num_frames} frames: they get the first of this model's learned positions, as in the authors' training; a stock pipeline "
            f"computes other ones at that length, so make videos of {frames} frames with the result"
        )
    return notes


def short_clip_remarks(facts, clips):
    """A sentence about the clips that are shorter than a model's learned positions. clips: facts of usable ones."""
    short = [clip["frames"] for clip in clips if facts.positions == "learned" and clip["frames"] < facts.sample_frames]
    if short:
        yield (
            f"{len(short)} clips have fewer frames than the {facts.sample_frames} for which this model has learned positions (the shortest "
            f"{min(short)}) and get the first of them; a stock pipeline computes other ones at such a length: make videos of "
            f"{facts.sample_frames} frames with the result"
        )


def rate_notes(args, facts):
    """What sampling clips at another rate than the model's means, as sentences. args: filled in."""
    if args.fps == facts.fps:
        return []
    return [f"--fps {args.fps:g}: this model was made for {facts.fps:g} frames a second, so what the clips show will move at another speed"]


def what_it_is(facts):
    """A model in words, for the first line of a run."""
    task, (height, width) = "image to video" if facts.image_channels else "text to video", facts.sample_size
    positions = {"slice": "rotary positions cut from a grid", "learned": "rotary and learned positions"}
    known = positions.get(facts.positions, f"{facts.positions} positions")
    return f"{task}, {known}, made for {facts.sample_frames} frames of {height} x {width} at {facts.fps:g} a second"


def is_made_for(facts, height, width):
    """Whether the model was made for a size: one size, and for 1.5's image-to-video also others with the same short side, up to the
    same long side (the authors' README)."""
    short, long = sorted((height, width))
    has_range = facts.positions == "slice" and facts.image_channels
    return (height, width) == facts.sample_size or bool(has_range and short == facts.sample_size[0] and long <= facts.sample_size[1])


def fill_in_defaults(args, facts):
    """Fill in the flags whose default comes from the model: size, length, frame rate, sampler and dynamic guidance.

    The 2B is sampled by its own scheduler (DDIM) with a constant guidance, the rotary models by DPM with a dynamic one: what the
    authors' own demo (inference/cli_demo.py of CogVideo) advises for each. A model with learned positions shows videos of its one length
    however short the clips are: a stock pipeline has other positions at any other, so it would make other videos than the run showed.
    """
    rotary = facts.positions != "sincos"
    advised = {"height": facts.sample_size[0], "width": facts.sample_size[1], "max_num_frames": facts.sample_frames, "fps": facts.fps}
    advised |= {"validation_scheduler": "dpm" if rotary else "stored", "use_dynamic_cfg": rotary}
    advised |= {"num_frames": advised["max_num_frames"], "scheduler": advised["validation_scheduler"]}  # tools.generate's names
    advised |= {"validation_frames": facts.sample_frames} if facts.positions == "learned" else {}
    for name, value in advised.items():
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, value)


def load_tokenizer(folder):
    """The T5 tokenizer. Raises ValueError with the packages to install if it cannot be loaded."""
    from transformers import AutoTokenizer  # a slow import that few callers need

    try:
        return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # transformers names tiktoken if protobuf is missing
        missing = [name for name in ("sentencepiece", "protobuf") if not versions.installed(name)]
        way_out = f"it needs: pip install {' '.join(missing)}" if missing else "download this folder of the model again"
        raise ValueError(f"{folder / 'tokenizer'}: cannot be loaded ({str(error).splitlines()[0]}); {way_out}") from None


def token_ids(tokenizer, texts):
    """The token ids of each text, including the end token, without truncation."""
    return tokenizer(list(texts), add_special_tokens=True, verbose=False).input_ids


def unknown_shares(tokenizer, texts):
    """The share of each text's characters, without spaces, that the tokenizer's vocabulary lacks; 1 if a text has no token at all.

    Characters are counted, because a whole run of unknown ones is a single unknown token. T5 has no Chinese, Japanese, Korean,
    Greek, Arabic or Hebrew letters, only some Cyrillic ones, and no emoji.
    """
    shares, found = [], tokenizer(list(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    for text, ids, spans in zip(texts, found.input_ids, found.offset_mapping, strict=True):
        unknown = {at for token, span in zip(ids, spans, strict=True) if token == tokenizer.unk_token_id for at in range(*span)}
        visible = [at for at, character in enumerate(text) if not character.isspace()]
        shares.append(len(unknown.intersection(visible)) / len(visible) if visible and ids else float(bool(text)))
    return shares


def text_notes(tokenizer, named, limit):
    """Sentences about texts that the model reads in part: cut at `limit` tokens, or with unknown characters. named: [(name, text)]."""
    texts = [text for _, text in named]
    for (name, text), ids, share in zip(named, token_ids(tokenizer, texts), unknown_shares(tokenizer, texts), strict=True):
        if len(ids) > limit:
            yield f"{name} has {len(ids)} tokens, and the model reads {limit}: the last {len(ids) - limit} are cut: {text[:60]!r} ..."
        if share > UNKNOWN_NOTED:
            yield f"{name} has {100 * share:.0f} % of characters that T5 does not know: {text[:60]!r}"


# -----------------------------------------------------------------------------
# Checking it for a run


def largest_shape(args):
    """(frames, height, width) of the largest clip allowed by the flags."""
    sizes = getattr(args, "bucket_sizes", None) or [(args.height, args.width)]
    frames = max(getattr(args, "bucket_lengths", None) or [args.max_num_frames])
    return (frames, *max(sizes, key=math.prod))


def shown_shape(args):
    """(frames, height, width) of the validation videos: by default the largest clip's."""
    clip = largest_shape(args)
    return args.validation_frames or clip[0], args.validation_height or clip[1], args.validation_width or clip[2]


def open_model(args):
    """The model's folder, ModelFacts and tokenizer, and all problems found in configs and headers.

    Returns (folder, facts, tokenizer, problems), and fills in --mixed_precision.
    """
    problems, notes, folder, facts, tokenizer = [], [], None, COGVIDEOX_2B, None
    token = args.hub_token or os.environ.get("HF_TOKEN")
    try:
        folder = find_model(args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, token)
        problems += check_model_folder(folder, args.variant, may_lack=known_components(folder, args.encoding_cache_dir, args.variant))
        if not problems:
            facts, tokenizer = read_facts(folder), load_tokenizer(folder)
            problems += check_targets(folder, args.target_modules) if args.training_type == "lora" else []
            more, notes = unread_images(args, facts)
            problems += more
    except ValueError as error:
        problems.append(str(error))
    args.mixed_precision, problem = choose_precision(args.mixed_precision, None if problems else folder, args.variant)
    problems += [problem] if problem else []
    fill_in_defaults(args, facts)
    found, more_notes = check_sizes(args, facts)
    problems += found
    more_notes += rate_notes(args, facts)
    if folder and not problems:
        say(f"{args.pretrained_model_name_or_path}: {what_it_is(facts)}")
    for note in [] if problems else notes + more_notes:
        warn(note)
    return folder, facts, tokenizer, problems


def check_sizes(args, facts):
    """(problems, notes) of all clip sizes that the flags allow and, of the trainer's flags, of the size of validation videos. args: filled
    in."""
    names = ("--bucket", "--bucket") if args.bucket_sizes else ("--height", "--width")
    names += ("--bucket" if args.bucket_lengths else "--max_num_frames",)
    sizes, lengths = args.bucket_sizes or [(args.height, args.width)], args.bucket_lengths or [args.max_num_frames]
    shapes = [(*size, frames, names) for size in sizes for frames in lengths]
    frames, height, width = shown_shape(args) if hasattr(args, "validation_frames") else largest_shape(args)
    if (height, width, frames) not in [shape[:3] for shape in shapes]:
        own = (args.validation_height, args.validation_width, args.validation_frames)
        flags = [f"--validation_{of}" if value else name for of, value, name in zip(("height", "width", "frames"), own, names, strict=True)]
        shapes.append((height, width, frames, tuple(flags)))
    problems = [problem for shape in shapes for problem in check_geometry(facts, *shape)]
    notes = [note for shape in shapes for note in geometry_notes(facts, *shape[:3])]
    return list(dict.fromkeys(problems)), list(dict.fromkeys(notes))


def unread_images(args, facts):
    """(problems, notes): a sentence for each flag about images that was given for a model that reads none. Images are refused."""
    if facts.image_channels:
        return [], []
    reason, dropout = "this model is text-to-video and reads no image", args.noised_image_dropout
    given = [(name, value) for name in ("image_column", "validation_images") if (value := getattr(args, name))]
    idle = dropout != args.declared["noised_image_dropout"].default
    notes = [f"flags that do nothing here: --noised_image_dropout {dropout} ({reason})"] if idle else []
    return [f"--{name} {value}: would do nothing, because {reason}; leave it out" for name, value in given], notes


def meta_transformer(folder):
    """The transformer in `folder` on the meta device: its layers and shapes without weights. Reads only its config."""
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(CogVideoXTransformer3DModel.load_config(folder / "transformer"))


def linear_layers(folder):
    """Name -> (inputs, outputs) of every linear layer of the transformer in `folder`. Reads only its config."""
    modules = meta_transformer(folder).named_modules()
    return {name: (m.in_features, m.out_features) for name, m in modules if isinstance(m, torch.nn.Linear)}


def is_target(name, target):
    """Whether peft takes a module for a target of a list: by its whole name, or by its last parts (check_target_module_exists)."""
    return name == target or name.endswith(f".{target}")


def check_targets(folder, target_modules):
    """A sentence for each target that matches no linear layer of the transformer in `folder`, or something else too.

    peft would adapt a convolution as well, but the exported file and its loaders take the matrices of linear layers only; with any
    other module it raises an error. Reads only the config.
    """
    modules = dict(meta_transformer(folder).named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    known = sorted({name.split(".", 2)[-1].removeprefix("attn1.") for name in linear if name.startswith("transformer_blocks.")})
    problems = []
    for target in target_modules:
        other = [name for name in modules if is_target(name, target) and name not in linear]
        if not any(is_target(name, target) for name in linear):
            problems.append(f"--target_modules {target}: the transformer has no such linear layer; its blocks have {', '.join(known)}")
        elif other:
            meant = [name for name in known if is_target(name, target)] or [name for name in linear if is_target(name, target)]
            problems.append(
                f"--target_modules {target}: also matches {other[0]} ({type(modules[other[0]]).__name__}), and only linear layers "
                f"are trained; you probably want {' or '.join(meant)}"
            )
    return problems


def choose_precision(requested, folder, variant):
    """The compute precision: the requested one, or that of the stored weights. Returns (precision, problem).

    FSDP2 and DeepSpeed run without a scaler for an fp16 loss (`engine.unfit_flags`): they compute a base stored in fp16 in bf16.
    """
    on_gpu = torch.cuda.is_available()
    if requested == "fp16" and not on_gpu:
        return requested, "--mixed_precision fp16: this run has no GPU, and CPUs have no fast fp16; use bf16 or no"
    if requested == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        return requested, f"--mixed_precision bf16: {torch.cuda.get_device_name()} has no bf16; use fp16"
    if requested is None and folder:
        stored = stored_precision(folder, "transformer", variant)
        if stored == "fp16" and on_gpu and any(os.environ.get(name, "").lower() == "true" for name in SHARDING_ENGINES):
            usable = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
            say(f"computing in {usable.replace('no', 'fp32')}, not in the stored fp16: FSDP2 and DeepSpeed do not scale an fp16 loss here")
            return usable, None
        return ("no" if stored == "fp16" and not on_gpu else stored), None
    return requested or "no", None


def component_note(folder, part, cache, variant):
    """The path of the cache's note about a component's weights, named by its folder and config; and that config."""
    folder = Path(folder) / part
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    config = {name: value for name, value in config.items() if not name.startswith("_") and name != "transformers_version"}
    return Path(cache) / "components" / f"{key_of(str(folder.resolve()), variant, config)}.json", config


def known_components(folder, cache, variant=None):
    """The encoders that have a note in the cache: a run with complete encodings does not need their weights."""
    return [part for part in ("text_encoder", "vae") if component_note(folder, part, cache, variant)[0].exists()]
