"""Look after a cache of encodings: python -m tools.cache list|check|prune [FOLDER].

list    what is there, in entries and bytes
check   read every entry, compare it with the hash it was stored with, and find what a kill left behind; exit code 1 if any is bad
prune   remove bad entries and leftovers and, with --older_than DAYS, entries that no run has read for so long
"""

import argparse
import os
import sys
import time
from pathlib import Path

import safetensors

from cogvideox.console import progress
from cogvideox.encodings import tensor_sha256

KINDS = {"clips": "clips (moments)", "captions": "captions (T5 embeddings)"}


def entries(cache, kind):
    """The files of one kind, sorted."""
    return sorted((cache / kind).glob("??/*.safetensors"))


def leftovers(cache):
    """Files that a killed writer left: temporary names that nobody will rename any more (a day old)."""
    return [p for p in cache.rglob(".*.partial") if time.time() - p.stat().st_mtime > 86400]


def why_bad(path):
    """What is wrong with an entry, or None."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored, tensor = (file.metadata() or {}).get("sha256"), file.get_tensor("encoding")
    except Exception as error:  # safetensors raises its own kinds, OSError and ValueError for a damaged file
        return f"cannot be read ({str(error).splitlines()[0][:100]})"
    return None if tensor_sha256(tensor) == stored else "its content is not what was stored"


def check(cache):
    """Read all entries. Returns [(path, why)] of the bad ones."""
    paths = [path for kind in KINDS for path in entries(cache, kind)]
    return [
        (path, why) for path in progress(paths, "checking entries", unit="entry", disable=not sys.stderr.isatty()) if (why := why_bad(path))
    ]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "check", "prune"))
    parser.add_argument("folder", nargs="?", default="~/.cache/cogvideox-encodings", help="as in --encoding_cache_dir")
    parser.add_argument("--older_than", type=float, help="prune: days since an entry was last read")
    options = parser.parse_args()
    cache = Path(options.folder).expanduser()
    if not cache.is_dir():
        parser.exit(2, f"ERROR[2]: {cache}: no such folder\n")

    if options.command == "list":
        for kind, words in KINDS.items():
            paths = entries(cache, kind)
            print(f"{len(paths):>7} {words:<26} {sum(p.stat().st_size for p in paths) / 2**20:>10.1f} MiB")
        print(f"{len(list((cache / 'surveys').glob('*.json'))):>7} clips surveyed")
        return

    bad = check(cache)
    for path, why in bad:
        print(f"{path.relative_to(cache)}: {why}")
    print(f"{sum(len(entries(cache, kind)) for kind in KINDS)} entries, {len(bad)} bad, {len(leftovers(cache))} leftovers")
    if options.command == "check":
        raise SystemExit(1 if bad else 0)

    old = []
    if options.older_than is not None:
        limit = time.time() - options.older_than * 86400
        old = [p for kind in KINDS for p in entries(cache, kind) if max(p.stat().st_atime, p.stat().st_mtime) < limit]
    for path in {path for path, _ in bad} | set(leftovers(cache)) | set(old):
        os.unlink(path)
    print(f"removed {len(bad)} bad entries, the leftovers and {len(old)} that were not read in time")


if __name__ == "__main__":
    main()
