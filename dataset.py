"""Listing the clips of a data folder, and the torch Dataset that training reads.

`list_clips` pairs captions with files and never shifts a pair: it returns all problems at once, one sentence per faulty line.
`TrainingClips` is the torch Dataset over the run's positions.
"""

import csv
import difflib
import functools
import hashlib
import json
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset, default_collate

from cogvideox.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from cogvideox.files import write_bytes
from cogvideox.model import sample_latents
from cogvideox.order import sampled_timestep, seeded_generator


@dataclass(frozen=True)
class Record:
    """One clip of the data: its place in the lists (for messages), the file as listed, the file on disk, its caption, and why
    the file cannot be opened (None: it can)."""

    where: str
    listed: str
    path: str
    caption: str
    reason: str | None = None


# -----------------------------------------------------------------------------
# Records: (file, caption) pairs


def list_clips(args, root=None):
    """The records of the folder `root` or, without it, of --instance_data_root or --dataset_name, the id token before each caption.

    Returns (records, problems, layout), see `read_records`.
    """
    if args.dataset_name and not root:
        records, problems, layout = read_hub_dataset(args)
    else:
        root = root or args.instance_data_root
        records, problems, layout = read_records(root, args.caption_column, args.video_column, args.allow_external_paths)
    if args.id_token:
        records = [replace(r, caption=f"{args.id_token} {r.caption}") for r in records]
    return records, problems, layout


def list_eval_clips(args):
    """(records, problems) of --eval_data_root, each with the flag's name in front."""
    if not args.eval_data_root:
        return [], []
    records, problems, _ = list_clips(args, args.eval_data_root)
    if not records and not problems:
        problems = ["contains no clips"]
    records = [replace(record, where=f"--eval_data_root {record.where}") for record in records]
    return records, [f"--eval_data_root: {problem.removeprefix('--instance_data_root ')}" for problem in problems]


def read_hub_dataset(args):
    """Records of a dataset loaded with the datasets package. Videos are file names, or bytes, which are written to disk once."""
    import datasets

    columns = args.caption_column or "text", args.video_column or "video"
    try:
        rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, split="train")
    except Exception as error:  # the package raises many kinds of errors
        return [], [f"--dataset_name {args.dataset_name}: cannot be loaded ({str(error).splitlines()[0]})"], "datasets"
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        return (
            [],
            [f"--dataset_name {args.dataset_name}: no column {', '.join(missing)} (it has: {', '.join(rows.column_names)})"],
            "datasets",
        )
    if isinstance(rows.features[columns[1]], datasets.Video):
        rows = rows.cast_column(columns[1], datasets.Video(decode=False))
    records, problems = [], []
    for number, row in enumerate(rows, 1):
        where, caption, video = f"{args.dataset_name}:{number}", " ".join(str(row[columns[0]] or "").split()), row[columns[1]]
        name = None
        if isinstance(video, dict) and video.get("bytes"):
            name = video.get("path") or where
            path = Path(args.encoding_cache_dir) / "unpacked" / hashlib.sha256(video["bytes"]).hexdigest()
            path = path.with_suffix(Path(video.get("path") or "clip.mp4").suffix)
            if not path.exists():
                write_bytes(path, video["bytes"])
            video = {"path": str(path)}
        listed = str(video["path"] if isinstance(video, dict) else video)
        path, reason = locate(Path.cwd(), listed, allow_external_paths=True)
        if caption:
            records.append(Record(where, name or listed, str(path), caption, reason))
        else:
            problems.append(f"{where}: empty caption")
    return records, problems, "datasets"


def read_records(root, caption_column=None, video_column=None, allow_external_paths=False):
    """Read the (file, caption) pairs of a data folder or table.

    Four layouts are detected: `prompts.txt` + `videos.txt` (or the names given), a table (`metadata.csv|jsonl|parquet`, or such
    a file as `root`) with one column each, `videos/` + `labels/NAME.txt` (the layout of the SAT trainer), and clips with a
    `NAME.txt` beside each.

    Returns (records, problems, layout): problems of the lists as sentences (a file's own problem is in its record), and the
    layout's name for the log.
    """
    root = Path(root).expanduser()
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        return [], [f"--instance_data_root {root}: permission denied"], "nothing"
    if not root.exists():
        return [], [f"--instance_data_root {root}: no such folder"], "nothing"
    table = root if root.is_file() else find_table(root)
    if root.is_dir() and ((root / (caption_column or "prompts.txt")).exists() or table is None and not has_labels(root)):
        rows, problems = read_line_files(root, caption_column or "prompts.txt", video_column or "videos.txt")
        layout = "line files"
    elif table is not None:
        rows, problems = read_table(table, caption_column or "text", video_column or "video")
        root, layout = table.parent, table.name
    else:
        rows, problems = read_label_files(root)
        layout = "videos with a text file each"
    records = []
    for where, listed, caption in rows:
        path, reason = locate(root, listed, allow_external_paths)
        records.append(Record(where, listed, str(path), caption, reason))
    if not rows and not problems:
        problems.append(f"{root}: no clips listed")
    return records, problems, layout


def read_line_files(root, caption_file, video_file):
    """Pair two text files line by line. Returns ([(where, listed file, caption)], problems)."""
    problems, lines = [], {}
    for name in (caption_file, video_file):
        lines[name] = read_lines(root, name, problems)
    if problems:
        return [], problems
    captions, videos = lines[caption_file], lines[video_file]
    for name, other in ((caption_file, videos), (video_file, captions)):
        for number, line in enumerate(lines[name], 1):
            if not line and number <= len(other):
                problems.append(f"{name}:{number}: empty line; every clip needs a caption and every caption a clip")
    if len(captions) != len(videos):
        short, long = (caption_file, video_file) if len(captions) < len(videos) else (video_file, caption_file)
        first = min(len(captions), len(videos)) + 1
        problems.append(
            f"{caption_file} has {len(captions)} lines, {video_file} {len(videos)}: "
            f"{long}:{first} ({lines[long][first - 1][:60]!r}) has no partner in {short}"
        )
    pairs = zip(captions, videos, strict=False)
    return [(f"{video_file}:{n}", v, c) for n, (c, v) in enumerate(pairs, 1) if c and v], problems


def read_lines(root, name, problems):
    """The stripped lines of a UTF-8 text file (a byte order mark and CRLF are fine); appends to `problems`."""
    path = root / name
    if not os.access(root, os.R_OK | os.X_OK) or (path.is_file() and not os.access(path, os.R_OK)):
        problems.append(f"{path}: permission denied")
        return []
    if not path.is_file():
        near = difflib.get_close_matches(name, [p.name for p in root.iterdir()], n=1)
        hint = f"; there is {near[0]}" if near else ""
        problems.append(f"{path}: no such file (--caption_column and --video_column name the two lists){hint}")
        return []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        problems.append(f"{name}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8")
        return []
    # Split at line feeds only: str.splitlines also cuts at rare separators that a caption may contain.
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        problems.append(f"{path}: no entries")
    return lines


def find_table(root):
    """The table of a data folder (`metadata.csv`, `.jsonl` or `.parquet`), or None."""
    return next((root / f"metadata.{kind}" for kind in ("csv", "jsonl", "parquet") if (root / f"metadata.{kind}").is_file()), None)


def read_table(path, caption_column, video_column):
    """Rows of a CSV, JSONL or Parquet file. Returns ([(where, listed file, caption)], problems)."""
    try:
        rows = list(table_rows(path))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, OSError, ValueError) as error:
        return [], [f"{path}: cannot be read as {path.suffix[1:]} ({error})"]
    if not rows:
        return [], [f"{path}: no rows"]
    missing = [name for name in (caption_column, video_column) if name not in rows[0][1]]
    if missing:
        columns = ", ".join(map(str, rows[0][1]))
        return [], [f"{path}: no column {', '.join(missing)} (it has: {columns}); name them with --caption_column and --video_column"]
    pairs, problems = [], []
    for number, row in rows:
        values = [str(row.get(name) or "").strip() for name in (caption_column, video_column)]
        problems += [
            f"{path.name}:{number}: empty {name}" for name, value in zip((caption_column, video_column), values, strict=True) if not value
        ]
        if all(values):
            pairs.append((f"{path.name}:{number}", values[1], " ".join(values[0].split())))
    return pairs, problems


def table_rows(path):
    """Yield (line or row number, dict) of a CSV, JSONL or Parquet file. ValueError for any other suffix."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):  # a caption may hold U+2028
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no object")
                yield number, row
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("a Parquet table needs pyarrow: pip install pyarrow") from None
        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    else:
        raise ValueError("a table ends in .csv, .jsonl or .parquet")


def has_labels(root):
    """Whether `root` contains clips with a text file each (in `labels/`, or beside the clip)."""
    return (root / "labels").is_dir() or any(p.with_suffix(".txt").is_file() for p in media_files(root))


def media_files(root):
    """Clips and images in `root/videos`, or in `root` if there is no such folder, sorted by name."""
    folder = root / "videos" if (root / "videos").is_dir() else root
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)


def read_label_files(root):
    """`videos/NAME.mp4` with `labels/NAME.txt`, or with `NAME.txt` beside it."""
    labels = root / "labels"
    pairs, problems = [], []
    for path in media_files(root):
        text = (labels / path.name if labels.is_dir() else path).with_suffix(".txt")
        listed = str(path.relative_to(root))
        try:
            caption = " ".join(text.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{listed}: the caption {text.relative_to(root)} cannot be read ({type(error).__name__})")
            continue
        if caption:
            pairs.append((listed, listed, caption))
        else:
            problems.append(f"{listed}: the caption {text.relative_to(root)} is empty")
    return pairs, problems


def locate(root, listed, allow_external_paths):
    """Find a listed file below `root`. Returns (path, None), or (path, the reason why it cannot be used)."""
    if "\0" in listed or "://" in listed:
        return listed, "not a file name"
    path = Path(listed).expanduser()
    inside = not path.is_absolute()
    path = root / path
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except FileNotFoundError:
        return path, "no such file" + (" (a broken link)" if path.is_symlink() else "")
    except (OSError, RuntimeError) as error:
        return path, f"cannot be opened ({error})"
    # An absolute path is deliberate; a relative one that leaves the folder by `..` or a link may be a mistake.
    if inside and not allow_external_paths and not resolved.is_relative_to(root.resolve()):
        return path, f"outside the data folder ({resolved}); allow it with --allow_external_paths"
    if not stat.S_ISREG(status.st_mode):
        return path, "not a regular file"
    if status.st_size == 0:
        return path, "empty file"
    if not os.access(resolved, os.R_OK):
        return path, "permission denied"
    return path, None


# -----------------------------------------------------------------------------
# The torch Dataset


class TrainingClips(Dataset):
    """The inputs of the loss at each position, as CPU tensors: latents, noise, timestep and prompt embedding.

    encodings: has `moments(clip, flipped)` [2C, F', H', W'] and `prompt(clip or None)` [T, D]; None is the empty caption.
    clip_of: position -> clip, as `clip_at`. timestep_sampling: as in `sampled_timestep`.
    """

    def __init__(
        self,
        encodings,
        clip_of,
        seed,
        scaling_factor,
        num_train_timesteps,
        caption_dropout=0.0,
        random_flip=False,
        timestep_sampling="uniform",
    ):
        self.timestep_sampling = timestep_sampling
        self.encodings, self.clip_of, self.seed, self.scaling_factor = encodings, clip_of, seed, scaling_factor
        self.num_train_timesteps = num_train_timesteps
        self.caption_dropout, self.random_flip = caption_dropout, random_flip

    def __getitem__(self, position):
        return self.item(self.clip_of(position), position)

    def item(self, clip, position):
        """The item of a given clip at a given position."""
        generator = seeded_generator(self.seed, "noise", position)
        timestep = sampled_timestep(self.timestep_sampling, self.seed, position, self.num_train_timesteps, generator)
        # Always drawn, so that enabling one option does not change the noise of the others.
        drop, flip = torch.rand(2, generator=generator).tolist()
        moments = self.encodings.moments(clip, flipped=self.random_flip and flip < 0.5)
        latents = sample_latents(moments, self.scaling_factor, generator)
        return {
            "latents": latents,  # [F', C, H', W'], fp32
            "noise": torch.randn(latents.shape, generator=generator),
            "timestep": timestep,
            "prompt": self.encodings.prompt(None if drop < self.caption_dropout else clip),  # [T, D], the encoder's dtype
            "position": position,
        }

    def largest_batch(self, plan, clips, batch_size):
        """A batch of the trained clip with the most latents, at the run's first positions. clips: facts of each clip.

        Of several, the first one that the run trains on, whose caption is needed next anyway.
        """
        first = plan.clip_of(0)
        largest = max(plan.clips, key=lambda i: (clips[i]["frames"] * clips[i]["height"] * clips[i]["width"], i == first))
        return default_collate([self.item(largest, position) for position in range(batch_size)])


def one_ahead(batches, device):
    """Yield the batches of an iterator, each made in a thread while the caller works on the one before.

    At 49 x 480 x 720 a batch of one clip takes tens of milliseconds of a core, for which a GPU would wait in each step. Torch does
    not hold Python's lock meanwhile. A thread, not a process: it needs no shared memory and no fork after CUDA has started.
    """
    on_device = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None  # a new thread has GPU 0
    with ThreadPoolExecutor(1, initializer=on_device) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def lacking_shared_memory(batch, workers, folder="/dev/shm"):
    """A sentence if `workers` loading processes do not fit their batches into this machine's shared memory, else None.

    They would end with a bus error: a pod or a Docker container has 64 MB. batch: CPU tensors. Each worker keeps two batches
    ready, and each process of this machine has its own workers.
    """
    if not workers or not os.path.isdir(folder):
        return None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = processes * (2 * workers + 1) * sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return None
    return (
        f"--dataloader_num_workers {workers}: the batches need {needed / 2**20:.0f} MiB of {folder}, and {free / 2**20:.0f} are free: "
        "loading without workers (docker: --shm-size; a pod: mount an emptyDir with medium: Memory there)"
    )
