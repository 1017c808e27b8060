"""The disk cache of encodings: one file a clip, one a distinct caption, each encoded once.

An entry's name is a hash of everything its content depends on, so that an entry is either right or not found: there is
no "clear the cache after changing ...". Clips are stored as the posterior's moments, from which each step draws a fresh
sample. Files are written under a temporary name and renamed, so a killed run leaves whole entries only, and two runs may
fill one cache at once.

A file's content is hashed in full; the hash is remembered under (device, inode, size, mtime, ctime). Any write to a file
changes its ctime, which no tool sets back, so a changed file is never taken for the old one.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save

from cogvideox.files import file_sha256, read_json, write_bytes
from cogvideox.folder import safetensors_header, stored_dtype, weight_files

ENCODING_VERSION = 1  # raise it when the code below, or dataset.py, makes other numbers from the same input


# -----------------------------------------------------------------------------
# Names


def key_of(*parts):
    """A hash of JSON-ready values, as a file name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def hash_file(path, cache):
    """SHA-256 of a file's content, remembered in `cache` (which may be read-only) for as long as the file is untouched."""
    status = os.stat(path)
    if resolved_blob := hub_blob_hash(path):
        return resolved_blob
    stamp = key_of(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    note = cache / "hashes" / stamp
    with contextlib.suppress(OSError):
        known = note.read_text()
        if len(known) == 64:
            return known
    content = file_sha256(path)
    # A file written in the last moments may be written again within the same clock tick.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > 2_000_000_000:
        with contextlib.suppress(OSError):
            write_bytes(note, content.encode())
    return content


def hub_blob_hash(path):
    """The SHA-256 of a file in the hub's cache, which names large files by it; None for any other file."""
    resolved = Path(path).resolve()
    name = resolved.name
    return name if resolved.parent.name == "blobs" and len(name) == 64 and set(name) <= set("0123456789abcdef") else None


def component_note(folder, part, cache, variant):
    """Where is remembered what a component was when its weights were last seen: under its place and its config."""
    folder = Path(folder) / part
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    config = {name: value for name, value in config.items() if not name.startswith("_") and name != "transformers_version"}
    return Path(cache) / "components" / f"{key_of(str(folder.resolve()), variant, config)}.json", config


def known_components(folder, cache, variant=None):
    """The encoders whose weights were seen before, so that a run with a full cache can do without the files."""
    return [part for part in ("text_encoder", "vae") if component_note(folder, part, cache, variant)[0].exists()]


def identify(folder, part, cache, variant=None):
    """(identity, stored dtype) of a model component: a hash of its config and of its files' content, and a torch dtype.

    Where the weight files are gone there is nothing that could disagree with what was remembered of them.
    """
    note, config = component_note(folder, part, cache, variant)
    files = weight_files(Path(folder) / part, variant)[0]
    if not files and note.exists():
        known = read_json(note)
        return known["identity"], getattr(torch, known["dtype"])
    dtype = stored_dtype(folder, part, variant) if files else torch.float32
    files = files or sorted(p for p in (Path(folder) / part).iterdir() if p.is_file())
    value = key_of(config, [(file.name, hash_file(file, cache)) for file in files])
    content = json.dumps({"identity": value, "dtype": str(dtype).removeprefix("torch.")}).encode()
    if not note.exists() or note.read_bytes() != content:
        write_bytes(note, content)
    return value, dtype


def clip_key(facts, vae_identity, dtype, slicing, tiling, flipped):
    """The name of a clip's entry. The frames are named by the file's content, the frames taken and the box kept of each."""
    frames = {name: facts[name] for name in ("sha256", "indices", "height", "width", "box", "reader")}
    return key_of(ENCODING_VERSION, "clip", frames, vae_identity, str(dtype), slicing, tiling, flipped)


def caption_key(caption, text_identity, dtype, max_text_seq_length):
    """The name of a caption's entry."""
    return key_of(ENCODING_VERSION, "caption", caption, text_identity, str(dtype), max_text_seq_length)


# -----------------------------------------------------------------------------
# Files


def entry_path(cache, kind, key):
    """Where an entry lies: cache/clips/ab/abcdef....safetensors."""
    return cache / kind / key[:2] / f"{key}.safetensors"


def write_entry(path, tensor):
    """Store one tensor, with the hash of its bytes for `python -m tools.cache check`. Refuses numbers that are not finite."""
    tensor = tensor.detach().cpu().contiguous()
    if not torch.isfinite(tensor).all():
        raise ValueError("the encoding is not finite (a model in fp16 that needs bf16 or fp32 does this)")
    write_bytes(path, save({"encoding": tensor}, metadata={"sha256": tensor_sha256(tensor)}))


def tensor_sha256(tensor):
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def read_entry(path):
    """The tensor of an entry. The file is mapped, not read: only what is used is loaded."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor("encoding")


def is_complete(path, shape):
    """Whether an entry is there, of this shape, with as many bytes as its header announces."""
    try:
        return safetensors_header(path)["encoding"]["shape"] == list(shape)
    except (OSError, ValueError, KeyError):
        return False


class Encodings:
    """The encodings of a data set, read from the cache one by one. keys: as `plan_encodings` makes them."""

    def __init__(self, cache, clip_keys, flipped_keys, prompt_keys, empty_key):
        self.cache, self.empty_key = cache, empty_key
        self.clip_keys, self.flipped_keys, self.prompt_keys = clip_keys, flipped_keys, prompt_keys

    def __len__(self):
        return len(self.clip_keys)

    def moments(self, clip, flipped=False):
        """Moments [2C, F', H', W'] of a clip's posterior."""
        keys = self.flipped_keys if flipped else self.clip_keys
        return read_entry(entry_path(self.cache, "clips", keys[clip]))

    def prompt(self, clip):
        """The embedding [T, D] of a clip's caption; of the empty caption for None."""
        return read_entry(entry_path(self.cache, "captions", self.empty_key if clip is None else self.prompt_keys[clip]))


def missing_entries(cache, kind, shapes):
    """The keys, in order, that have no complete entry. shapes: key -> the shape that its tensor has to have."""
    return [key for key, shape in shapes.items() if not is_complete(entry_path(cache, kind, key), shape)]
