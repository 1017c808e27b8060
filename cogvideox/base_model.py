"""What depends on the base model alone: its score on the fixed clips, and the videos of step 0. Kept in the cache of encodings.

Every run on the same model, clips, prompts, seed and settings has the same ones, and on a GPU they cost minutes. As for encodings,
an entry's name is a hash of everything that its content depends on. A failed write is a warning: the next run computes it again.
"""

import contextlib
import json
import math

import diffusers

from cogvideox.console import warn
from cogvideox.files import entry_path, file_sha256, key_of, lora_path, read_json, write_bytes
from cogvideox.lora import lora_modules
from cogvideox.video import read_video

VERSION = 2  # raise it when the score, or the way a video is made, changes
ENDINGS = {"scores": "json", "videos": "mp4"}  # folder of the cache: the ending of its files


def identity_of(args, transformer_identity, scheduler, device):
    """A hash of what the base model's outputs depend on, beside their inputs. transformer_identity: of its files.

    Another kind of device or another release of diffusers rounds differently.
    """
    noise = type(scheduler).__name__, {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    precision = args.training_type, args.base_precision, args.mixed_precision
    return key_of(VERSION, diffusers.__version__, transformer_identity, noise, precision, device.type)


def initial_lora(args):
    """A hash of the LoRA of --init_lora, or None."""
    return file_sha256(lora_path(args.init_lora)) if args.init_lora else None


@contextlib.contextmanager
def without_lora(transformer):
    """The base model inside the block: the LoRA, if there is one, is switched off."""
    if not lora_modules(transformer):
        yield
        return
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
        for parameter in trained:
            parameter.requires_grad_(True)


def stays_available(args, transformer):
    """Whether the model of step 0 can still be run after a step: a new LoRA can be switched off, but an earlier one is trained on."""
    return bool(lora_modules(transformer)) and not args.init_lora


def read_score(cache, key):
    """The stored score, in the form of `scoring.score`, or None."""
    try:
        score = read_json(entry_path(cache, "scores", key, ENDINGS["scores"]))
        numbers = [*score["train"], *(score["held_out"] or []), *(score["gap"] or [])]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return score if all(math.isfinite(number) for number in numbers) else None


def write_score(cache, key, score):
    """Store a score."""
    try:
        write_bytes(entry_path(cache, "scores", key, ENDINGS["scores"]), json.dumps(score).encode())
    except OSError as error:
        warn(f"the base model's score was not kept in the cache ({error.strerror})")


def has_video(cache, key):
    """Whether a video is stored."""
    return entry_path(cache, "videos", key, ENDINGS["videos"]).exists()


def take_video(cache, key, path, frames):
    """Copy a stored video to `path`. Returns whether there is one of this many frames."""
    stored = entry_path(cache, "videos", key, ENDINGS["videos"])
    try:
        if stored.exists() and len(read_video(stored)) == frames:
            write_bytes(path, stored.read_bytes())
            return True
    except Exception:  # the video reader raises many kinds of errors on a damaged file, which is then made again
        return False
    return False


def keep_video(cache, key, path):
    """Store the video at `path`."""
    try:
        write_bytes(entry_path(cache, "videos", key, ENDINGS["videos"]), path.read_bytes())
    except OSError as error:
        warn(f"a video of the base model was not kept in the cache ({error.strerror})")
