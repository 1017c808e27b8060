"""Files that are whole or not there."""

import hashlib
import json
import os
import uuid
from pathlib import Path

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that every loader looks for


def read_json(path):
    """A JSON file's content. OSError where it cannot be read, ValueError where it is not JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_json_lines(path):
    """The values of a file that has one a line; [] without the file. A line cut by a kill is left out."""
    values = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values.append(json.loads(line))
            except ValueError:
                continue
    return values


def write_bytes(path, content, durable=False):
    """Write a file under a temporary name, then rename it. The mode follows the umask.

    durable: force the content to the disk before the rename, so that even a power cut leaves the old file or the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """`write_bytes`, forced to the disk."""
    write_bytes(path, content, durable=True)


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file whole or not at all, forced to the disk, without a second copy of it in memory. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it; save_file's own is the owner's alone
        save_file(tensors, partial, metadata)
        partial.chmod(mode)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:  # what a full disk is called there
        raise OSError(f"{path.name}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path):
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_writing(folder):
    """Make a folder and write a file there. Raises OSError where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / ".write_test", b"")
    (folder / ".write_test").unlink(missing_ok=True)
