"""Atomic file writes, and hashes of files.

A file's full content is hashed; the hash is cached under (device, inode, size, mtime, ctime). Any write changes the ctime, which
no tool can set back, so a changed file never gets the old hash.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from concurrent.futures import Future
from pathlib import Path

from cogvideox.console import rank, say

SECONDS_UNTIL_VISIBLE = 90
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that every loader expects
FILE_LIST = ".files_of_runs.jsonl"  # in --output_dir, see owned.py


def at_home(path):
    """A path as text, `~/` at its start expanded. `~x.mp4` is a file: pathlib takes x for a user, and fails if there is none."""
    text = os.fspath(path)
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def is_unicode(text):
    """Whether a text is made of whole characters. Bytes that are not UTF-8, and halves of characters in JSON, are not: no tokenizer
    takes them."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_json(path):
    """A JSON file's content. OSError if it cannot be read, ValueError, which names the file, if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, perhaps truncated ({error})") from None


def read_json_lines(path):
    """The values of a JSON-lines file; [] if there is no file. Skips lines that were truncated by a kill."""
    values = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values.append(json.loads(line))
            except ValueError:
                continue
    return values


listing = {"folder": None, "names": set()}  # the folder whose files this process lists, and those that it has named


def list_of_rank(folder):
    """The list of this process. Each rank has its own: network file systems have no append that keeps two writers apart."""
    return Path(folder) / (FILE_LIST if rank() == 0 else FILE_LIST.replace(".jsonl", f".{rank()}.jsonl"))


def lists_of_ranks(folder):
    """The lists of all processes of all runs in a folder, that of rank 0 first."""
    return sorted(Path(folder).glob(FILE_LIST.replace(".jsonl", "*.jsonl")), key=lambda path: len(path.name))


def list_files_in(folder):
    """From now on, name each file that this process writes below a folder in its list there."""
    known = {entry.get("file") for entry in read_json_lines(list_of_rank(folder)) if isinstance(entry, dict)}
    listing.update(folder=Path(folder).absolute(), names=known)


def note_file(path, content=None):
    """Name a file in the list, before it is written: after a kill in between it must not pass for somebody else's.

    content: bytes, of which the list keeps a hash.
    """
    path, folder = Path(path).absolute(), listing["folder"]
    if folder is not None and not path.is_relative_to(folder):  # reached through a link, as the folder may be
        path, folder = path.parent.resolve() / path.name, folder.resolve()
    if folder is None or not path.is_relative_to(folder):
        return
    name = path.relative_to(folder)
    if (name.as_posix() in listing["names"] and content is None) or any(
        part.startswith(".") or part.endswith(".partial") for part in name.parts
    ):
        return
    entry = {"file": name.as_posix()} | ({"sha256": hashlib.sha256(content).hexdigest()} if content else {})
    with contextlib.suppress(OSError), list_of_rank(listing["folder"]).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(entry) + "\n")  # an empty line, because a kill may have left half of one before
        listing["names"].add(name.as_posix())


def write_bytes(path, content, durable=False):
    """Write a file under a temporary name, then rename it. The mode follows the umask.

    durable: flush the content to disk before the rename, so that even a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    note_file(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_durably(path, content):
    """`write_bytes`, flushed to disk."""
    write_bytes(path, content, durable=True)


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file atomically, flushed to disk, without a second copy of it in memory. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    note_file(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # the umask's mode; save_file makes the file private
        save_file(tensors, partial, metadata)
        partial.chmod(mode)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:  # raised for a full disk
        raise OSError(f"{path.name}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path):
    """Hex SHA-256 of a file's content."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 24))  # large: for each part a thread waits for Python's lock
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def still_missing(paths):
    """The paths that do not exist, after waiting up to SECONDS_UNTIL_VISIBLE for them. For files that another machine has written.

    An NFS client remembers for up to a minute that a name did not exist; listing its folder makes it ask the server again.
    """
    missing, deadline = [Path(path) for path in paths if not Path(path).exists()], None
    while missing and (deadline is None or time.monotonic() < deadline):
        if deadline is None:
            deadline = time.monotonic() + SECONDS_UNTIL_VISIBLE
            say(f"waiting for {missing[0]}: a network file system may show it a minute late", on_every_rank=True)
        else:
            time.sleep(1)
        for folder in sorted({folder for path in missing for folder in path.parents[:3]}):  # outermost first
            with contextlib.suppress(OSError):
                os.listdir(folder)
        missing = [path for path in missing if not path.exists()]
    return missing


def try_writing(folder):
    """Create a folder and write a file there. Raises OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f".write_test-{uuid.uuid4().hex}"
    write_bytes(name, b"")
    name.unlink(missing_ok=True)


def why_unwritable(folder):
    """The system's reason why a folder cannot be made or written to, or None."""
    try:
        try_writing(folder)
    except OSError as error:
        return error.strerror
    return None


def entry_path(cache, kind, key, ending="safetensors"):
    """The path of a cache entry: cache/clips/ab/abcdef....safetensors."""
    return Path(cache) / kind / key[:2] / f"{key}.{ending}"


def lora_path(path):
    """The file of a LoRA that is given as a file or as the folder of a run."""
    path = Path(at_home(path))
    return path / LORA_FILE if path.is_dir() else path


def key_of(*parts):
    """A hash of JSON-ready values, usable as a file name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


ahead = {}  # path -> Future of its hash


def hash_ahead(paths, cache):
    """Begin to hash files in a thread: `hash_file` then waits for what is not done. For the seconds in which torch is imported."""
    futures = {os.fspath(path): Future() for path in paths}
    ahead.update(futures)

    def work():
        for path, future in futures.items():
            try:
                future.set_result(hash_now(path, cache))
            except Exception as error:  # whoever asks for the file is told
                future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()


def hash_file(path, cache):
    """SHA-256 of a file's content, cached in `cache` (which may be read-only) until the file changes."""
    pending = ahead.pop(os.fspath(path), None)
    return pending.result() if pending else hash_now(path, cache)


def hash_now(path, cache):
    """`hash_file` in this thread."""
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
    # A file written just now may be written again within the same clock tick.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > 2_000_000_000:
        with contextlib.suppress(OSError):
            write_bytes(note, content.encode())
    return content


def hub_blob_hash(path):
    """The SHA-256 of a file in the hub's cache, which names large files by their hash; None for any other file."""
    resolved = Path(path).resolve()
    name = resolved.name
    return name if resolved.parent.name == "blobs" and len(name) == 64 and set(name) <= set("0123456789abcdef") else None
