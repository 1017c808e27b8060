"""Files that are whole or not there."""

import hashlib
import os
import uuid


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


def file_sha256(path):
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_writing(folder):
    """Make a folder and write a file there. Raises OSError where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / ".write_test", b"")
    (folder / ".write_test").unlink(missing_ok=True)
