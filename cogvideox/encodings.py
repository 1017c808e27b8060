"""The cache of encoded clips and captions: computed once, read by every step.

An entry's name is a hash of everything that its content depends on, so a stale entry is never found, and the cache needs no
clearing after a change. Clips are stored as the posterior's moments, from which each step draws a fresh sample. Files are
written under a temporary name and renamed, so a killed run leaves only complete entries, and two runs can fill one cache at once.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import math
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save

from cogvideox.console import BAD_DATA, BAD_FLAGS, BAD_OUTPUT, fail, progress, say, timed, warn
from cogvideox.decode import ENCODING_VERSION, Framing, clip_framing, image_request
from cogvideox.files import entry_path, hash_file, key_of, read_json, still_missing, write_bytes
from cogvideox.folder import PRECISIONS, component_note, latent_shape, stored_dtype, weight_files
from cogvideox.launch import free
from cogvideox.memory import memory_for_encoding, untiled_encoding_bytes
from cogvideox.model import encode_captions, encode_frames, encode_pixels, load_text_encoder, load_vae, usable_dtype, whole_frames
from cogvideox.order import seeded_generator
from cogvideox.stopping import exit_if_requested, interruptible
from cogvideox.survey import remember_survey

LARGE_TEXT_ENCODER = 2**27  # bytes of weights from which a CPU takes long enough for a caption to encode it on demand

IMAGE_DRAWS = 8  # encodings of each image, each with noise of its own
IMAGE_NOISE = (-3.0, 0.5)  # mean and standard deviation of log sigma, in pixels from -1 to 1 (add_noise_to_first_frame of the authors' SAT)

PRECISION_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}
CAPTIONS_PER_T5 = 200  # fewer captions are not worth loading T5 on one more rank


# -----------------------------------------------------------------------------
# Names


def identify(folder, part, cache, variant=None):
    """(identity, stored dtype) of a model component: a hash of its config and of its files' content, and a torch dtype.

    If the weight files are missing, both come from the cache's note of an earlier run.
    """
    note, config = component_note(folder, part, cache, variant)
    files = weight_files(Path(folder) / part, variant)[0]
    if not files and note.exists():
        known = read_json(note)
        return known["identity"], getattr(torch, known["dtype"])
    dtype = stored_dtype(folder, part, variant) if files else torch.float32
    files = files or sorted(p for p in (Path(folder) / part).iterdir() if p.is_file())
    hashes = []
    for file in files:
        exit_if_requested()  # 10 GB take half a minute
        hashes.append((file.name, hash_file(file, cache)))
    value = key_of(config, hashes)
    content = json.dumps({"identity": value, "dtype": str(dtype).removeprefix("torch.")}).encode()
    if not note.exists() or note.read_bytes() != content:
        write_bytes(note, content)
    return value, dtype


def clip_key(facts, vae_identity, dtype, slicing, tiling, flipped, decoder=""):
    """The name of a clip's entry: from the file's content, the chosen frames, their crop, what is changed to show them, the decoder,
    and how they are encoded."""
    frames = {name: facts[name] for name in ("sha256", "indices", "height", "width", "box", "reader")}
    frames |= {name: value for name, value in (("treatment", facts["treatment"]), ("decoder", decoder)) if value}
    return key_of(ENCODING_VERSION, "clip", frames, vae_identity, str(dtype), slicing, tiling, flipped)


def image_content(facts):
    """What the picture of an image depends on. facts: of the image, or of the clip whose first frame it is."""
    content = {name: facts[name] for name in ("sha256", "height", "width", "box", "reader")} | {"index": facts["indices"][0]}
    return content | ({"treatment": facts["treatment"]} if facts["treatment"] else {})


def image_key(facts, vae_identity, dtype, flipped, decoder=""):
    """The name of an image's entry: from its picture, the decoder, the noise, and the VAE. It is encoded whole, whatever the clips are."""
    return key_of(ENCODING_VERSION, "image", image_content(facts), decoder, vae_identity, str(dtype), flipped, IMAGE_DRAWS, IMAGE_NOISE)


def caption_key(caption, text_identity, dtype, max_text_seq_length):
    """The name of a caption's entry."""
    return key_of(ENCODING_VERSION, "caption", caption, text_identity, str(dtype), max_text_seq_length)


# -----------------------------------------------------------------------------
# Files


def write_entry(path, tensor):
    """Store one tensor, with the hash of its bytes for `python -m tools.cache check`. ValueError if it is not finite."""
    tensor = tensor.detach().cpu().contiguous()
    if not torch.isfinite(tensor).all():
        raise ValueError("the encoding is not finite (a typical cause: fp16 weights of a model that needs bf16 or fp32)")
    write_bytes(path, save({"encoding": tensor}, metadata={"sha256": tensor_sha256(tensor)}))


def tensor_sha256(tensor):
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def read_entry(path):
    """The tensor of an entry, which another machine may just have written. The file is memory-mapped: only the used pages are loaded."""
    try:
        return open_entry(path)
    except FileNotFoundError:
        if still_missing([path]):
            raise
        return open_entry(path)


def open_entry(path):
    """The tensor of an entry that is visible on this machine."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor("encoding")


def is_complete(path, shape):
    """Whether an entry exists with this shape and as many bytes as its header declares."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_slice("encoding").get_shape() == list(shape)
    except (OSError, safetensors.SafetensorError):
        return False


class Encodings:
    """The encodings of a dataset, read from the cache one by one.

    clip_keys, flipped_keys, prompt_keys: the key of each clip, mirrored clip and clip's caption. caption_keys: caption -> key, also
    of the empty caption and of the validation prompts. vae: everything that a decoded video depends on besides its latents.
    on_demand: a `CaptionsOnDemand`, or None if every caption is stored. image_keys, flipped_image_keys: the key of each clip's image and
    of its mirrored image, for an image-to-video model.
    """

    def __init__(
        self, cache, clip_keys, flipped_keys, prompt_keys, caption_keys, vae=(), on_demand=None, image_keys=(), flipped_image_keys=()
    ):
        self.cache, self.caption_keys, self.vae, self.on_demand = cache, caption_keys, vae, on_demand
        self.clip_keys, self.flipped_keys, self.prompt_keys = clip_keys, flipped_keys, prompt_keys
        self.image_keys, self.flipped_image_keys = image_keys, flipped_image_keys

    def __len__(self):
        return len(self.clip_keys)

    def moments(self, clip, flipped=False):
        """Moments [2C, F', H', W'] of a clip's posterior."""
        keys = self.flipped_keys if flipped else self.clip_keys
        return read_entry(entry_path(self.cache, "clips", keys[clip]))

    def image(self, clip, flipped=False):
        """Moments [IMAGE_DRAWS, 2C, H', W'] of the posteriors of a clip's image, each with other noise on its pixels."""
        keys = self.flipped_image_keys if flipped else self.image_keys
        return read_entry(entry_path(self.cache, "images", keys[clip]))

    def prompt(self, clip):
        """The embedding [T, D] of a clip's caption, or of the empty caption for None."""
        return self.embedding(self.caption_keys[""] if clip is None else self.prompt_keys[clip])

    def caption(self, text):
        """The embedding [T, D] of a validation prompt or of any other planned caption."""
        return self.embedding(self.caption_keys[text])

    def embedding(self, key):
        """The embedding [T, D] of an entry, which is encoded now if it was left for later."""
        if self.on_demand:
            self.on_demand.store(key)
        return read_entry(entry_path(self.cache, "captions", key))

    def finish(self, due):
        """Store all captions that are still missing, if due, and free T5."""
        if due and self.on_demand:
            for key in list(self.on_demand.missing):
                self.on_demand.store(key)


class CaptionsOnDemand:
    """The captions that are encoded when a step first reads them, so that the first step does not wait for the others.

    T5 stays in memory until the last one is stored. captions: key -> caption of the missing entries. models: (tokenizer, text
    encoder), loaded, so that a measurement of free memory sees them. A caption that cannot be encoded or stored ends the run.
    """

    def __init__(self, cache, captions, models, max_text_seq_length):
        self.cache, self.missing, self.models, self.length = cache, dict(captions), models, max_text_seq_length

    def store(self, key):
        """Encode and store the caption of `key`, unless that is done."""
        if key not in self.missing:
            return
        failure = encode_caption(self.cache, key, self.missing.pop(key), *self.models, self.length)
        if failure:
            fail(BAD_OUTPUT if "--encoding_cache_dir" in failure else BAD_DATA, failure)
        if not self.missing:
            self.models = None


def may_wait(text_encoder_bytes, device, processes, loader_workers):
    """Whether captions are encoded on demand: where a caption takes a CPU long, and T5 may stay in memory during training.

    A GPU takes milliseconds for a caption, and its memory is needed. text_encoder_bytes: of T5's weights.
    """
    alone = device.type == "cpu" and processes == 1 and loader_workers == 0
    return alone and LARGE_TEXT_ENCODER <= text_encoder_bytes <= memory_for_encoding(device) / 3


def missing_entries(cache, kind, shapes):
    """The keys, in order, that have no complete entry. shapes: key -> the shape its tensor must have."""
    return [key for key, shape in shapes.items() if not is_complete(entry_path(cache, kind, key), shape)]


# -----------------------------------------------------------------------------
# Filling: captions in batches, clips one by one while the next are decoded; each rank encodes its share


def encode_data(args, folder, facts, tokenizer, data, readers, accelerator, barrier, before=lambda identities: None):
    """Encode the missing entries on all ranks. Returns (Encodings, identities).

    T5 is loaded only if a caption is missing, then the VAE only if a clip or an image is; both are freed before this returns (T5 not where
    captions are encoded on demand). before: called with the identities, on all ranks, before anything is encoded; it may end the run.
    identities: a hash of all trained clips, their captions, their images (of an image-to-video model) and how they were encoded, and one
    of the transformer's weights.
    """
    cache, rank, world_size = Path(args.encoding_cache_dir), accelerator.process_index, accelerator.num_processes
    device, variant, length = accelerator.device, args.variant, facts.max_text_seq_length
    captions = [record.caption for record in data.records] + [""] + args.prompts + [args.negative_prompt]
    captions += [args.plain_prompt[1]] if args.plain_prompt else []
    # Only rank 0 checks the cache, and all ranks use its answer: another run may be filling the same cache.
    free_memory = min(gather_object([memory_for_encoding(device)]))
    plan = [plan_encodings(args, folder, facts, data, captions, cache, device, free_memory)] if accelerator.is_main_process else [None]
    keys, clip_keys, image_keys, *missing, vae, tiling, identities, problems = broadcast_object_list(plan)[0]
    if problems:
        fail(BAD_FLAGS, problems)
    before(identities)
    missing_captions, missing_clips, missing_images = missing
    jobs = plan_jobs(args, data, clip_keys, image_keys, missing_clips, missing_images)
    say(f"\nencodings in {cache}: {cached_text((keys.values(),), clip_keys, image_keys, *missing)}; {tiling.reason}")

    def load_text():
        return tokenizer, load_text_encoder(folder, device, variant)

    def load_encoder():
        return load_vae(folder, device, variant, args.enable_slicing, tiling.used)

    captions_by_key = {key: caption for caption, key in keys.items()}
    missing_captions = {key: captions_by_key[key] for key in missing_captions}
    text_encoder_bytes = sum(file.stat().st_size for file in weight_files(folder / "text_encoder", variant)[0])
    on_demand, failures = None, []
    if missing_captions and may_wait(text_encoder_bytes, device, world_size, args.dataloader_num_workers):
        say("captions are encoded when a step first reads them, at the latest at the first checkpoint")
        on_demand = CaptionsOnDemand(cache, missing_captions, load_text(), length)
    else:
        with timed("encode the captions"):
            failures += fill_captions(cache, missing_captions, load_text, length, rank, world_size)
        free(device)
    with timed("encode the clips"):
        failures += fill_clips(cache, jobs, load_encoder, readers, barrier, rank, world_size)
    if failures := gather_object(failures):
        fail(BAD_OUTPUT if any("--encoding_cache_dir" in failure for failure in failures) else BAD_DATA, list(dict.fromkeys(failures)))
    free(device)
    prompt_keys = [keys[record.caption] for record in data.records]
    images = (image_keys[0], image_keys[-1]) if image_keys else ()
    encodings = Encodings(cache, clip_keys[0], clip_keys[-1], prompt_keys, keys, vae, on_demand, *images)
    return encodings, identities


def plan_encodings(args, folder, facts, data, captions, cache, device, free_memory):
    """The keys of all captions, clips and images, which are missing, and the Tiling. Returns problems as sentences, and raises none.

    free_memory: bytes for encoding on the rank that has least. Images are encoded whole whatever the clips are: their rows of keys are
    empty for a text-to-video model.
    """
    remember_survey(data.clips + data.split + [image for image in data.images if image], cache)
    parts = {"text_encoder": args.variant, "vae": args.variant, "tokenizer": None, "transformer": args.variant}
    with timed("hash the model's files"):
        found = {part: identify(folder, part, cache, variant) for part, variant in parts.items()}
    (text_identity, text_dtype), (vae_identity, vae_dtype) = found["text_encoder"], found["vae"]
    tokenizer_identity, transformer_identity = found["tokenizer"][0], found["transformer"][0]
    text = (key_of(text_identity, tokenizer_identity), usable_dtype(text_dtype, device), facts.max_text_seq_length)
    vae = (vae_identity, usable_dtype(vae_dtype, device), args.enable_slicing, args.enable_tiling)
    keys = {caption: caption_key(caption, *text) for caption in captions}
    flips = (False, True) if args.random_flip else (False,)
    kinds = (False, True) if args.enable_tiling else (False,)
    rows = {t: [[clip_key(clip, *vae[:3], t, flipped, clip["decoder"]) for clip in data.clips] for flipped in flips] for t in kinds}
    # What a run trains does not change with the decoder's version: a checkpoint is resumed after an upgrade.
    without_decoder = {t: [[clip_key(clip, *vae[:3], t, flipped) for clip in data.clips] for flipped in flips] for t in kinds}
    caption_shape = (facts.max_text_seq_length, read_json(folder / "text_encoder/config.json").get("d_model", 512))
    missing_captions = missing_entries(cache, "captions", dict.fromkeys(keys.values(), caption_shape))
    pictures = [image or clip for image, clip in zip(data.images, data.clips, strict=True)] if facts.image_channels else []
    image_keys = [[image_key(p, *vae[:2], flipped, p["decoder"]) for p in pictures] for flipped in flips] if pictures else []
    shapes = {key: (IMAGE_DRAWS, *image_shape(p, facts)) for row in image_keys for key, p in zip(row, pictures, strict=True)}
    missing_images = set(missing_entries(cache, "images", shapes))
    trained_images = [[image_key(pictures[clip], *vae[:2], flipped) for clip in data.trained] for flipped in flips] if pictures else []
    missing, trained_clips = {}, {}
    for tiled, both in rows.items():
        shapes = {key: moments_shape(clip, facts) for row in both for key, clip in zip(row, data.clips, strict=True)}
        missing[tiled] = set(missing_entries(cache, "clips", shapes))
        prompts = [keys[data.records[clip].caption] for clip in data.trained]
        trained = [[row[clip] for clip in data.trained] for row in without_decoder[tiled]]
        trained_clips[tiled] = key_of(trained, prompts, *([trained_images] if trained_images else []))
    stored = clips_of_checkpoints(args)
    resumed = next((tiled for tiled, identity in trained_clips.items() if identity in stored), None)
    needed = functools.partial(untiled_bytes, folder, vae[1], data.clips, args.enable_slicing)
    tiling = choose_tiling({tiled: len(keys) for tiled, keys in missing.items()}, resumed, needed, free_memory)
    clip_keys, missing_clips, problems = rows[tiling.used], missing[tiling.used], []
    say_encoded_again(cache, data, clip_keys[0], without_decoder[tiling.used][0], missing_clips)
    for part, needed in (("text_encoder", missing_captions), ("vae", missing_clips or missing_images or args.prompts)):
        problem = weight_files(folder / part, args.variant)[1]
        if problem and needed:
            problems.append(f"{problem}; {len(needed)} {'captions' if part == 'text_encoder' else 'clips or videos'} need them")
    vae = (vae_identity, str(vae[1]), args.enable_slicing, args.enable_tiling)
    identities = {"clips": trained_clips[tiling.used], "transformer": transformer_identity}
    return keys, clip_keys, image_keys, missing_captions, missing_clips, missing_images, vae, tiling, identities, problems


class Job(NamedTuple):
    """A file to decode, and what is made of it: the keys of the missing entries of the clip and of the image, which is the first frame.

    frames: of the clip. name: shown. content: of the image, which seeds its noise.
    """

    path: str
    framing: Framing
    flipped: bool
    frames: int
    name: str
    clip: str | None
    image: str | None = None
    content: str = ""

    def size(self):
        """The frames that the VAE encodes."""
        return (self.frames if self.clip else 0) + (IMAGE_DRAWS if self.image else 0)

    def last_entry(self):
        """(kind, key) of the entry that is written last."""
        return ("images", self.image) if self.image else ("clips", self.clip)


def plan_jobs(args, data, clip_keys, image_keys, missing_clips, missing_images):
    """The Jobs of all missing entries. A clip's first frame is encoded from the same decoding as the clip.

    clip_keys, image_keys: rows of keys, unflipped and flipped. Clips with the same content share an entry, which one job makes.
    """
    jobs, missing_clips, missing_images = [], set(missing_clips), set(missing_images)
    for flipped, row in enumerate(clip_keys):
        for number, (record, clip, key) in enumerate(zip(data.records, data.clips, row, strict=True)):
            picture, image = data.images[number] or clip, image_keys[flipped][number] if image_keys else None
            key, image = key if key in missing_clips else None, image if image in missing_images else None
            missing_clips.discard(key)
            missing_images.discard(image)
            whole = record.path, clip_framing(record, data.framing, args.seed), bool(flipped), clip["frames"], record.listed
            content = key_of(image_content(picture)) if image else ""
            if image and record.image:
                alone = image_request(record, data.framing, args.seed, (clip["height"], clip["width"]))
                jobs.append(Job(*alone, bool(flipped), 1, record.image, None, image, content))
                image = None
            if key or image:
                jobs.append(Job(*whole, key, image, content))
    return jobs


def cached_text(captions, clips, images, missing_captions, missing_clips, missing_images):
    """How many of the entries are cached, in words. captions, clips, images: rows of their keys."""
    captions, clips, images = ({key for row in rows for key in row} for rows in (captions, clips, images))
    counts = [("clips", clips, missing_clips), ("images", images, missing_images), ("captions", captions, missing_captions)]
    *first, last = [f"{len(keys) - len(missing)} of {len(keys)} {kind}" for kind, keys, missing in counts if keys]
    return f"{', '.join(first)} and {last} are cached"


def say_encoded_again(cache, data, keys, without_decoder, missing):
    """Name the clips that have an entry from before entries were named with the decoder's version."""
    pairs = zip(data.records, data.clips, keys, without_decoder, strict=True)
    again = [(r, clip) for r, clip, key, old in pairs if key in missing and old != key and entry_path(cache, "clips", old).exists()]
    if again:
        say(
            f"{len(again)} clips are encoded again ({again[0][0].listed}{', ...' if len(again) > 1 else ''}): the names of their encodings "
            f"now hold the decoder ({again[0][1]['decoder']}), because releases of PyAV differ in their colours"
        )


# -----------------------------------------------------------------------------
# Whole frames or tiles. The pipeline that the model was trained with encodes whole frames: a tile has GroupNorm statistics of its
# own, and nine tiles of 480 x 720 have 1.4 times its pixels. Both kinds have names of their own in the cache.


class Tiling(NamedTuple):
    """Whether the clips are encoded in tiles, and why, for the run's first lines."""

    used: bool
    reason: str


def choose_tiling(missing, resumed, needed, free_memory):
    """The Tiling of all clips of a run, the same on all ranks.

    A resumed run trains on what it was trained on, whatever the memory is now. A new run prefers whole frames where they fit, but
    does not encode again what the cache has in tiles. missing: tiled -> number of missing entries; without True: tiles are off.
    resumed: the `tiled` of the checkpoint, or None. needed: () -> bytes of encoding whole frames. free_memory: bytes.
    """
    if True not in missing:
        return Tiling(False, "clips are encoded whole")
    if not missing[False] and resumed is not True:
        return Tiling(False, "clips are encoded whole")
    if resumed is None and not missing[True]:
        return Tiling(True, "the cache has the clips in tiles, and they are not encoded again (whole: --no-enable_tiling)")
    bytes_needed = needed()
    fits = bytes_needed <= free_memory
    room = f"{bytes_needed / 2**30:.1f} GiB for whole frames, {free_memory / 2**30:.1f} free"
    if resumed is not None:
        if not resumed and not fits:
            warn(f"the checkpoint was trained on clips that were encoded whole, and {missing[False]} are missing: {room}")
        return Tiling(resumed, f"clips are encoded {'in tiles' if resumed else 'whole'}, as those of the checkpoint")
    if fits and missing[False] <= missing[True]:
        return Tiling(False, f"clips are encoded whole ({room})")
    if fits:
        return Tiling(True, "clips are encoded in tiles, as most are in the cache (whole: --no-enable_tiling)")
    return Tiling(True, f"clips are encoded in tiles ({room})")


def clips_of_checkpoints(args):
    """The identities of the clips that the checkpoints to resume from were trained on, without verifying them."""
    if not args.resume_from_checkpoint:
        return []
    output_dir, asked = Path(args.output_dir), args.resume_from_checkpoint
    folders = output_dir.glob("checkpoint-*") if asked == "latest" else (Path(asked), output_dir / asked)
    found = []
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # checkpoint.py tells what is wrong with it
            found.append(read_json(folder / "manifest.json")["clips"])
    return found


def untiled_bytes(folder, dtype, clips, slicing):
    """The device memory for encoding the largest clip whole, in bytes. dtype: that the VAE runs in."""
    largest = max(clips, key=lambda clip: (clip["height"] * clip["width"], clip["frames"]))
    configs = {"vae": read_json(folder / "vae/config.json"), "dtypes": {"vae": PRECISION_NAMES[dtype]}}
    return untiled_encoding_bytes(configs, (largest["frames"], largest["height"], largest["width"]), slicing)


def image_shape(image, facts):
    """[2C, H', W'] of the posterior of one image. image: facts of its size."""
    channels, _, height, width = moments_shape(image | {"frames": 1}, facts)
    return channels, height, width


def moments_shape(clip, facts):
    """[2C, F', H', W'] of a clip's posterior: mean and log-variance of each latent channel."""
    frames, channels, height, width = latent_shape(facts, clip["frames"], clip["height"], clip["width"])
    return 2 * channels, frames, height, width


@contextlib.contextmanager
def reused_heap():
    """Have the C library keep freed memory in the block, and yield a function that gives back what is free.

    By default glibc maps large blocks anew for each operation, a fifth of the VAE's time on a CPU, and between these sizes decoded
    clips fragment the heap, which grows by 20 MiB per clip at 480 x 720. Giving back after each clip keeps it flat. At the
    end the thresholds are those that glibc's own adjustment ends with.
    """
    library = ctypes.CDLL(None)
    try:
        set_thresholds, give_back = library.mallopt, library.malloc_trim
    except AttributeError:  # another C library
        yield lambda: None
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    set_thresholds(m_mmap_threshold, 1 << 30)
    set_thresholds(m_trim_threshold, 1 << 30)
    try:
        yield lambda: give_back(0)
    finally:
        set_thresholds(m_mmap_threshold, 32 << 20)
        set_thresholds(m_trim_threshold, 64 << 20)
        give_back(0)


def share(sizes, rank, world_size):
    """The indices that one rank works on, balanced by size: largest first, each to the least loaded rank."""
    loads, shares = [0] * world_size, [[] for _ in range(world_size)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        target = loads.index(min(loads))
        loads[target] += sizes[index]
        shares[target].append(index)
    return sorted(shares[rank])


def fill_captions(cache, missing, load, max_text_seq_length, rank=0, world_size=1):
    """Encode this rank's share of the missing captions, one at a time. Few captions are rank 0's: T5 takes longer to load, on each
    rank 10.75 GiB for the real one. The other ranks go on to their clips.

    One at a time because the last bit of an embedding depends on the batch, and must not depend on what an earlier run had
    cached; the 226 tokens of one caption already fill a GPU. missing: key -> caption. load: () -> (tokenizer, text encoder),
    called only if there is work. Returns failures as sentences.
    """
    sharers = min(world_size, max(1, len(missing) // CAPTIONS_PER_T5))
    mine, failures = list(missing.items())[rank::sharers] if rank < sharers else [], []
    if not mine:
        return []
    tokenizer, text_encoder = load()
    for key, caption in progress(mine, "encoding captions", unit="caption", disable=rank != 0):
        exit_if_requested()
        if failure := encode_caption(cache, key, caption, tokenizer, text_encoder, max_text_seq_length):
            failures.append(failure)
            if "--encoding_cache_dir" in failure:
                break  # the next one would not fit either
    return failures


def encode_caption(cache, key, caption, tokenizer, text_encoder, max_text_seq_length):
    """Encode and store one caption. Returns the failure as a sentence, or None."""
    try:
        write_entry(entry_path(cache, "captions", key), encode_captions(tokenizer, text_encoder, [caption], max_text_seq_length)[0])
    except OSError as error:
        return f"--encoding_cache_dir {cache}: a caption could not be stored ({error.strerror})"
    except ValueError as error:
        return f"the caption {caption[:60]!r}: {error}"
    return None


def fill_clips(cache, jobs, load, readers, barrier, rank=0, world_size=1):
    """Encode this rank's share of the missing clips and images while the readers decode the next ones.

    jobs: of the missing entries, the same list on every rank. load: () -> VAE.
    barrier: waits for the other ranks without a timeout, and fails if one has died. Returns this rank's failures as sentences.
    """
    failures, mine = [], share([job.size() for job in jobs], rank, world_size)
    bar = progress(total=len(jobs), desc="encoding clips", unit="clip", disable=rank != 0 or not jobs)
    done = threading.Event()
    paths = [entry_path(cache, *job.last_entry()) for job in jobs]
    watcher = threading.Thread(target=show_all_ranks, args=(bar, paths, done), daemon=True)
    if rank == 0 and jobs:
        watcher.start()
    if mine:
        failures += encode_share(cache, [jobs[i] for i in mine], load(), readers)
    try:
        barrier()
    except RuntimeError:
        exit_if_requested()  # the other ranks got the same signal and have exited
        raise
    finally:
        done.set()
        if watcher.ident:
            watcher.join()
        bar.close()
    return failures


def encode_share(cache, jobs, vae, readers):
    """Encode and store clips and images, one by one, while the readers decode the next ones. Returns failures as sentences."""
    failures, decoded = [], readers.read_all([(job.path, job.framing) for job in jobs])
    with reused_heap() as give_back:
        for job, (_, frames, reason) in zip(jobs, decoded, strict=False):
            exit_if_requested()
            if reason:
                failures.append(f"{job.name}: decoded when it was checked, but not now: {reason}")
                continue
            frames = np.flip(frames, axis=2) if job.flipped else frames
            try:
                with interruptible(vae.encoder):
                    made = {("clips", job.clip): encode_frames(vae, frames)} if job.clip else {}
                    made |= {("images", job.image): encode_image(vae, frames[0], job.content)} if job.image else {}
                for entry, moments in made.items():
                    write_entry(entry_path(cache, *entry), moments)
            except InterruptedError:
                exit_if_requested()
            except ValueError as error:
                failures.append(f"{job.name}: {error}")
                continue
            except OSError as error:
                failures.append(f"--encoding_cache_dir {cache}: {job.name} could not be stored ({error.strerror})")
                break  # the next clip would not fit either
            del frames, made
            give_back()
    return failures


def encode_image(vae, frame, content):
    """The posteriors of one picture under noise: moments [IMAGE_DRAWS, 2C, H', W'], from a uint8 frame [H, W, 3].

    Draw n has sigma at the middle of the n-th of IMAGE_DRAWS equal shares of its distribution, so that together they have its mean and
    spread, and noise that depends on `content` and n alone: runs of all seeds share the entry. The noise is drawn in fp32 on the CPU. Each
    draw is one call, as the pipeline's, which encodes whole frames, not tiles.
    """
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[:, None].to(torch.float32) / 127.5 - 1  # [3, 1, H, W]
    draws = []
    with whole_frames(vae):
        for draw in range(IMAGE_DRAWS):
            noise = torch.randn(pixels.shape, generator=seeded_generator("image noise", content, draw))
            draws.append(encode_pixels(vae, (pixels + image_sigma(draw) * noise).to(vae.device))[:, 0])
    return torch.stack(draws)


def image_sigma(draw):
    """The standard deviation of the noise of one draw, in pixels from -1 to 1."""
    mean, deviation = IMAGE_NOISE
    share = torch.tensor((draw + 0.5) / IMAGE_DRAWS, dtype=torch.float64)
    return math.exp(mean + deviation * torch.special.ndtri(share).item())


def show_all_ranks(bar, paths, done):
    """In a thread of rank 0: advance its bar as all ranks write entries, until `done` is set. paths: of each job's last entry."""
    pending = set(paths)
    while pending:
        ended = done.wait(2)
        written = {path for path in pending if path.exists()}
        pending -= written
        bar.update(len(written))
        if ended:
            return
