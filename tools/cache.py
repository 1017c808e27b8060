"""Look after a cache of encodings: python -m tools.cache list|check|prune [FOLDER].

list    what is there, in entries and bytes
check   read every entry, compare it with the hash it was stored with, and find what a kill left behind; exit code 1 if any is bad
prune   remove bad entries and leftovers and, with --older_than DAYS, entries that no run has read for so long
"""

import time
from pathlib import Path

import safetensors

from cogvideox import base_model, flags
from cogvideox.console import progress
from cogvideox.encodings import tensor_sha256
from cogvideox.files import at_home
from cogvideox.video import read_video

KINDS = {
    "clips": "clips (moments)",
    "images": "images (moments)",
    "captions": "captions (T5 embeddings)",
    "scores": "scores of a base model",
    "videos": "videos of a base model",
}


def entries(cache, kind):
    """The files of one kind, sorted."""
    return sorted((cache / kind).glob(f"??/*.{base_model.ENDINGS.get(kind, 'safetensors')}"))


def leftovers(cache):
    """Temporary files older than a day, which a killed writer left."""
    return [p for p in cache.rglob(".*.partial") if time.time() - p.stat().st_mtime > 86400]


def why_bad(path):
    """What is wrong with an entry, or None."""
    if path.suffix == ".json":
        return None if base_model.read_score(path.parents[2], path.stem) else "is not a score"
    try:
        if path.suffix == ".mp4":
            read_video(path)
            return None
        with safetensors.safe_open(path, framework="pt") as file:
            stored, tensor = (file.metadata() or {}).get("sha256"), file.get_tensor("encoding")
    except Exception as error:  # safetensors and the video reader raise many kinds for a damaged file
        return f"cannot be read ({str(error).splitlines()[0][:100]})"
    return None if tensor_sha256(tensor) == stored else "its content is not what was stored"


def check(cache):
    """Read all entries. Returns [(path, reason)] of the bad ones."""
    paths = [path for kind in KINDS for path in entries(cache, kind)]
    return [(path, reason) for path in progress(paths, "checking entries", unit="entry") if (reason := why_bad(path))]


def parse(words):
    """The checked flags, with the folder as a path. Ends with exit code 2 and all problems."""
    parser = flags.new_parser(__doc__)
    parser.usage = "python -m tools.cache list|check|prune [FOLDER] [flags]"
    parser.add_argument("command", choices=("list", "check", "prune"))
    parser.add_argument(
        "folder", nargs="?", default="~/.cache/cogvideox-encodings", help="as in --encoding_cache_dir (default: %(default)s)"
    )
    flag = flags.flag_group(parser, "prune")
    flag("--older_than", None, "also remove entries that no run has read for so many days", type=float, at_least=0)
    return flags.parse(parser, words, check_flags)


def check_flags(options):
    """What is wrong with the flags beside their bounds, as sentences."""
    options.folder = Path(at_home(options.folder))
    problems = [] if options.folder.is_dir() else [f"{options.folder}: no such folder"]
    if options.older_than is not None and options.command != "prune":
        problems.append(f"--older_than: only prune removes entries, {options.command} does not; leave it out")
    return problems


def main(words=None):
    """The command line."""
    options = parse(words)
    cache = options.folder
    if options.command == "list":
        for kind, label in KINDS.items():
            paths = entries(cache, kind)
            print(f"{len(paths):>7} {label:<26} {sum(path.stat().st_size for path in paths) / 2**20:>10.1f} MiB")
        print(f"{len(list((cache / 'surveys').glob('*.json'))):>7} clips surveyed")
        return

    bad, left = check(cache), leftovers(cache)
    for path, reason in bad:
        print(f"{path.relative_to(cache)}: {reason}")
    print(f"{sum(len(entries(cache, kind)) for kind in KINDS)} entries, {len(bad)} bad, {len(left)} leftovers")
    if options.command == "check":
        raise SystemExit(1 if bad else 0)

    old = []
    if options.older_than is not None:
        limit = time.time() - options.older_than * 86400
        times = [(path, path.stat()) for kind in KINDS for path in entries(cache, kind)]
        old = [path for path, status in times if max(status.st_atime, status.st_mtime) < limit]
    for path in {path for path, _ in bad} | {*left, *old}:
        path.unlink(missing_ok=True)  # another prune may have been faster
    unread = "" if options.older_than is None else f", {len(old)} entries unread for {options.older_than:g} days"
    print(f"removed {len(bad)} bad entries, {len(left)} leftovers{unread}")


if __name__ == "__main__":
    main()
