"""Filling the cache: captions in batches, clips one by one while the next are decoded, each process its share."""

import ctypes
import threading
import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from cogvideox.cache import entry_path, write_entry
from cogvideox.launch import say
from cogvideox.model import decode_latents, encode_captions, encode_frames
from cogvideox.stopping import leave_if_wanted
from cogvideox.video import contact_sheet, write_video

CAPTIONS_PER_BATCH = 8
CLIPS_SHOWN, SECONDS_TO_SHOW = 3, 10  # no further clip after so long: a CPU decodes one in a quarter of a minute


def keep_heap_flat():
    """Have the C library map blocks of 1 MiB and more by themselves, and give them back when they are freed.

    By default glibc raises that limit to the largest block it has seen freed; decoded clips of some MiB then lie in the
    heap between the small objects that outlive them, and the process grows with every clip (some 20 MiB each at 480 x 720).
    """
    try:
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    except (OSError, AttributeError, TypeError):  # another C library
        return


def share(sizes, rank, world_size):
    """The indices that one process works on, so that all have about the same total: largest first, to the least loaded."""
    loads, shares = [0] * world_size, [[] for _ in range(world_size)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        target = loads.index(min(loads))
        loads[target] += sizes[index]
        shares[target].append(index)
    return sorted(shares[rank])


def caption_groups(captions):
    """The distinct captions in groups of a fixed size.

    Whole groups are encoded even where some members are there already, so that an embedding does not depend, by the last
    bit of a matrix product, on what an earlier run had left to do.
    """
    distinct = list(dict.fromkeys(captions))
    return [distinct[i : i + CAPTIONS_PER_BATCH] for i in range(0, len(distinct), CAPTIONS_PER_BATCH)]


def fill_captions(cache, captions, key, missing, load, max_text_seq_length, rank=0, world_size=1):
    """Encode this process's share of the groups that hold a missing caption.

    key: caption -> key. load: () -> (tokenizer, text encoder), called only if there is something to do.
    Returns its failures as sentences.
    """
    missing = set(missing)
    groups = [group for group in caption_groups(captions) if any(key(caption) in missing for caption in group)]
    groups = groups[rank::world_size]
    if not groups:
        return []
    tokenizer, text_encoder = load()
    for group in tqdm(groups, "encoding captions", unit=f"x{CAPTIONS_PER_BATCH}", disable=rank != 0):
        # The last group is filled up, so that every product has the same shape.
        padded = group + [""] * (CAPTIONS_PER_BATCH - len(group))
        leave_if_wanted()
        embeddings = encode_captions(tokenizer, text_encoder, padded, max_text_seq_length)
        try:
            for caption, embedding in zip(group, embeddings, strict=False):
                if key(caption) in missing:
                    write_entry(entry_path(cache, "captions", key(caption)), embedding)
        except OSError as error:
            return [f"--encoding_cache_dir {cache}: a caption could not be stored ({error.strerror})"]
        except ValueError as error:
            return [f"the caption {caption[:60]!r}: {error}"]
    return []


def fill_clips(cache, jobs, load, readers, show, barrier, rank=0, world_size=1):
    """Encode this process's share of the missing clips; decoding runs ahead in the readers' processes.

    jobs: [(key, path, framing, flipped, frames, name)], the missing ones, the same list on every process. load: () -> VAE.
    show: called with (vae, name, frames, moments) of the first few clips of the main process. barrier: waits for the others,
    without a deadline, and fails where one of them has died. Returns this process's failures as sentences.
    """
    failures, mine = [], share([job[4] for job in jobs], rank, world_size)
    bar = tqdm(total=len(jobs), desc="encoding clips", unit="clip", disable=rank != 0 or not jobs)
    done = threading.Event()
    watcher = threading.Thread(target=show_all_ranks, args=(bar, cache, [job[0] for job in jobs], done), daemon=True)
    if rank == 0 and jobs:
        watcher.start()
    if mine:
        keep_heap_flat()
        vae, spent = load(), 0.0
        decoded = readers.read_all([(jobs[i][1], jobs[i][2]) for i in mine])
        for number, (i, (_, frames, reason)) in enumerate(zip(mine, decoded, strict=False)):
            leave_if_wanted()
            key, _, _, flipped, _, name = jobs[i]
            if reason:
                failures.append(f"{name}: decoded well before, and now: {reason}")
                continue
            frames = np.flip(frames, axis=2) if flipped else frames
            try:
                moments = encode_frames(vae, frames)
                write_entry(entry_path(cache, "clips", key), moments)
            except ValueError as error:
                failures.append(f"{name}: {error}")
                continue
            except OSError as error:
                failures.append(f"--encoding_cache_dir {cache}: {name} could not be stored ({error.strerror})")
                break  # the next one would not fit either
            if rank == 0 and number < CLIPS_SHOWN and spent < SECONDS_TO_SHOW:
                started = time.monotonic()
                try:
                    show(vae, name, frames, moments)
                except Exception as error:  # a picture for people must not cost the run
                    say(f"warning: the clip beside its encoding was not saved ({type(error).__name__}: {error})")
                spent += time.monotonic() - started
    try:
        barrier()
    except RuntimeError:
        leave_if_wanted()  # the same signal came to the others, and they have ended
        raise
    finally:
        done.set()
        if watcher.ident:
            watcher.join()
        bar.close()
    return failures


def show_all_ranks(bar, cache, keys, done):
    """In a thread of the main process: move its bar as all processes write entries, until `done` is set."""
    pending = set(keys)
    while pending:
        ended = done.wait(2)
        found = {key for key in pending if entry_path(cache, "clips", key).exists()}
        pending -= found
        bar.update(len(found))
        if ended:
            return


def show_encoded(output_dir, fps, rows, vae, name, frames, moments):
    """Save a clip beside what the VAE keeps of it: `encoded/00.mp4` (left: the frames, right: decoded again) and a sheet."""
    mean = moments.float().chunk(2)[0].transpose(0, 1) * vae.config.scaling_factor
    decoded = decode_latents(vae, mean)
    folder = Path(output_dir) / "encoded"
    write_video(folder / f"{len(rows) // 2:02d}.mp4", np.concatenate([frames, decoded], axis=2), fps)
    rows += [(f"{name}: as it is trained on", frames), ("decoded from its latents", decoded)]
    contact_sheet(folder / "contact_sheet.png", rows, "what the VAE keeps of the clips")
