"""Listing the clips of a data folder, and the torch Dataset that training reads.

`list_clips` pairs captions with files and never shifts a pair: it returns all problems at once, one sentence per faulty line.
`TrainingClips` is the torch Dataset over the run's positions.
"""

import argparse
import contextlib
import csv
import difflib
import functools
import hashlib
import io
import json
import os
import shutil
import stat
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import torch
from torch.utils.data import Dataset, default_collate

from cogvideox.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from cogvideox.files import at_home, is_unicode, write_bytes
from cogvideox.model import pad_latents, sample_latents
from cogvideox.order import sampled_timestep, seeded_generator
from cogvideox.windows import listed_window, split_line, window_of

LINE_FILES, TEXT_FILES = "line files", "videos with a text file each"  # names of layouts; a table's is its file name

# The columns of a table, if no flag names them: ours, then those of other trainers (VideoX-Fun, finetrainers, musubi-tuner, ...).
CAPTION_COLUMNS = ("text", "caption", "prompt")
VIDEO_COLUMNS = ("video", "file_name", "file_path", "video_path", "path")
WINDOW_COLUMNS = ("start", "end")
TABLE_KINDS = (".csv", ".tsv", ".jsonl", ".parquet", ".json")
MISSING = ("nan", "none", "null", "<na>")  # what other programs write into a cell without a value

JOURNAL = "captions.jsonl"  # what tools.caption keeps in a data folder
PREPARED = ["prepare.json", "review.html", "review.txt"]  # what tools.prepare writes beside the lists
MOST_LEFT_OUT = 1000  # names of files that are not trained on: a data folder may lie in a home folder


@dataclass(frozen=True)
class Record:
    """One clip of the data: its place in the lists (for messages), the file as listed, with its window, the file on disk (an absolute
    path), its caption, why it cannot be used (None: it can), its window as (start, end) in seconds after the file's first frame
    (None: the whole file), and the absolute path of its own image (None: its first frame)."""

    where: str
    listed: str
    path: str
    caption: str
    reason: str | None = None
    window: tuple[float, float] | None = None
    image: str | None = None


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
        columns = args.caption_column, args.video_column
        records, problems, layout = read_records(root, *columns, args.allow_external_paths, image_column=args.image_column)
    if args.id_token:
        records = [replace(r, caption=f"{args.id_token} {r.caption}") for r in records]
    cache = args.encoding_cache_dir
    usable = [r if r.reason else replace(r, path=decodable(r.path, cache), image=r.image and decodable(r.image, cache)) for r in records]
    return usable, problems, layout


def decodable(path, cache):
    """The path, or that of a link to it in the cache if its name is not UTF-8: decoders take no other name."""
    if is_unicode(path):
        return path
    link = Path(cache, "unpacked", hashlib.sha256(os.fsencode(path)).hexdigest()).with_suffix(Path(path).suffix)
    with contextlib.suppress(OSError):  # another process made it; or the cache is read-only, and the decoder says what is wrong
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return str(link)


def list_eval_clips(args):
    """(records, problems, layout) of --eval_data_root, records and problems with the flag's name in front."""
    return list_second_folder(args, "eval_data_root")


def list_prior_clips(args):
    """The same of --prior_data_root, whose captions stay as they are, without the id token."""
    return list_second_folder(argparse.Namespace(**vars(args) | {"id_token": None}), "prior_data_root")


def list_second_folder(args, flag):
    """(records, problems, layout) of the folder that a flag names, nothing without it."""
    root = getattr(args, flag)
    if not root:
        return [], [], "nothing"
    records, problems, layout = list_clips(args, root)
    if not records and not problems:
        problems = ["contains no clips"]
    records = [replace(record, where=f"--{flag} {record.where}") for record in records]
    return records, [f"--{flag}: {problem.removeprefix('--instance_data_root ')}" for problem in problems], layout


def read_hub_dataset(args):
    """Records of a dataset loaded with the datasets package. Videos and images are file names, or bytes, which are written to disk
    once."""
    import datasets

    source = f"--dataset_name {args.dataset_name}"
    try:
        rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, split="train")
    except Exception as error:  # the package raises many kinds of errors
        return [], [f"{source}: cannot be loaded ({str(error).splitlines()[0]})"], "datasets"
    columns, problem = choose_columns(rows.column_names, args.caption_column, args.video_column, args.image_column)
    if problem:
        return [], [f"{source}: {problem}"], "datasets"
    for column, kind in zip(columns[1:], ("Video", "Image"), strict=False):
        if isinstance(rows.features[column], getattr(datasets, kind)):
            rows = rows.cast_column(column, getattr(datasets, kind)(decode=False))
    records, problems = [], []
    for number, row in enumerate(rows, 1):
        where = f"{args.dataset_name}:{number}"
        endings = zip(columns[1:], (".mp4", ".png"), strict=False)  # the columns of videos and, if asked for, of images
        files = [unpacked(row[column], args.encoding_cache_dir, where, ending) for column, ending in endings]
        cells = row | dict(zip(columns[1:], [file for file, _ in files], strict=True))
        listed, caption, window, image, faults = cells_of(cells, columns)
        problems += [f"{where}: {fault}" for fault in faults]
        if not faults:
            record = record_of(Path.cwd(), where, listed, caption, window, allow_external_paths=True, name=files[0][1], image=image)
            records.append(record)
    return records, problems, "datasets"


def unpacked(cell, cache, where, ending):
    """(file, name to show) of a cell of a hub dataset. Bytes are written to the cache, under `ending` if they come without a name; a
    file's name is shown as it is: None."""
    if not isinstance(cell, dict):
        return cell, None
    if not cell.get("bytes"):
        return cell.get("path"), None
    name = cell.get("path") or where
    path = Path(cache) / "unpacked" / hashlib.sha256(cell["bytes"]).hexdigest()
    path = path.with_suffix(Path(cell.get("path") or f"x{ending}").suffix)
    if not path.exists():
        write_bytes(path, cell["bytes"])
    return str(path), name


def read_records(root, caption_column=None, video_column=None, allow_external_paths=False, may_lack_captions=False, image_column=None):
    """Read the (file, caption) pairs of a data folder or table, with the images of `image_column`, a file or a table's column.

    may_lack_captions: a missing caption is "", and not a problem.

    Four layouts are detected: `prompts.txt` + `videos.txt` (or the names given), a table (`metadata.csv|jsonl|parquet|json`, or
    such a file as `root`) with one column each, `videos/` + `labels/NAME.txt` (the layout of the SAT trainer), and clips with a
    `NAME.txt` beside each.

    Returns (records, problems, layout): problems of the lists as sentences (a file's own problem is in its record), and the
    layout's name for the log.
    """
    root = Path(at_home(root)).absolute()  # a decoder takes a relative "concat:x.mp4" for an address
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        return [], [f"--instance_data_root {root}: permission denied"], "nothing"
    if not root.exists():
        return [], [f"--instance_data_root {root}: no such folder"], "nothing"
    caption_file, video_file = caption_column or "prompts.txt", video_column or "videos.txt"
    table = root if root.is_file() else None
    if table is None and not (root / caption_file).exists():
        # metadata.json comes last: a folder of another layout may hold one that is about something else.
        table = find_table(root, TABLE_KINDS[:-1]) or (None if has_labels(root) else find_table(root, TABLE_KINDS[-1:]))
    if table is not None:
        rows, problems = read_table(table, caption_column, video_column, may_lack_captions, image_column)
        root, layout = table.parent, table.name
    elif not (root / caption_file).exists() and (has_labels(root) or (may_lack_captions and not (root / video_file).exists())):
        rows, problems = read_label_files(root, may_lack_captions)
        layout = TEXT_FILES
        if image_column:
            rule = "has no list of clips to which an image could be assigned; use prompts.txt and videos.txt, or a table"
            problems.append(f"--image_column {image_column}: {root} ({layout}) {rule}")
    else:
        rows, problems = read_line_files(root, caption_file, video_file, may_lack_captions, image_column)
        layout = LINE_FILES
    records = []
    for where, listed, caption, window, image in rows:
        try:
            records.append(record_of(root, where, listed, caption, window, allow_external_paths, image=image))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if not rows and not problems:
        problems.append(f"{root}: no clips listed")
    return records, problems, layout


def record_of(root, where, listed, caption, window, allow_external_paths, name=None, image=None):
    """The Record of one entry of a list. window: from the columns of a table, or None. name: shown instead of the file. image: the
    listed image, or None.

    `FILE | START-END` is a window, unless a file has that name. Raises ValueError for a wrong window.
    """
    path, reason = locate(root, listed, allow_external_paths)
    if window:
        listed = listed_window(name or listed, window)
    elif "|" in listed and not os.path.lexists(path):
        file, window = split_line(listed)
        path, reason = locate(root, file, allow_external_paths)
    record = Record(where, listed if window else name or listed, str(path), caption, reason, window)
    if image is None:
        return record
    path, fault = locate_image(root, image, allow_external_paths)
    reasons = [reason] * bool(reason) + [f"its image {image}: {fault}"] * bool(fault)
    return replace(record, reason="; ".join(reasons) or None, image=str(path))


def read_line_files(root, caption_file, video_file, may_lack_captions=False, image_file=None):
    """Pair two text files line by line, or three with one of images. Returns ([(where, listed file, caption, None, image)], problems)."""
    problems, lines = [], {caption_file: []}
    is_blank = may_lack_captions and (not os.path.lexists(root / caption_file) or not (root / caption_file).read_bytes().strip())
    for name in (caption_file, video_file, *([image_file] if image_file else []))[is_blank:]:
        lines[name] = read_lines(root, name, problems)
    if problems:
        return [], problems
    captions, videos = lines[caption_file], lines[video_file]
    captions += [""] * (len(videos) - len(captions)) if may_lack_captions else []
    for name, other in ((caption_file, videos), (video_file, captions))[may_lack_captions:]:
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
    images = lines[image_file] if image_file else [None] * len(videos)
    if image_file and len(images) != len(videos):
        rule = "every clip needs an image; without --image_column it is the clip's first frame"
        problems.append(f"{image_file} has {len(images)} lines, {video_file} {len(videos)}: {rule}")
    problems += [f"{image_file}:{number}: empty line; every clip needs an image" for number, line in enumerate(images, 1) if line == ""]
    rows = enumerate(zip(captions, videos, images, strict=False), 1)
    return [(f"{video_file}:{n}", v, c, None, i) for n, (c, v, i) in rows if v and i != "" and (c or may_lack_captions)], problems


def read_lines(root, name, problems):
    """The stripped lines of a UTF-8 text file (a byte order mark and CRLF are fine); appends to `problems`."""
    path = root / name
    if not os.access(root, os.R_OK | os.X_OK) or (path.is_file() and not os.access(path, os.R_OK)):
        problems.append(f"{path}: permission denied")
        return []
    if not path.is_file():
        names = sorted(p.name for p in root.iterdir() if not is_hidden(p.name))
        near = difflib.get_close_matches(name, names, n=1)
        tables = [other for other in names if Path(other).suffix.lower() in TABLE_KINDS]
        hint = f"; there is {near[0]}" if near else ""
        hint = hint or (f"; there is {tables[0]}: a table is given as --instance_data_root" if tables else "")
        problems.append(f"{path}: no such file (--caption_column, --video_column and --image_column name the lists){hint}")
        return []
    try:
        text = read_text(path)
    except ValueError as error:
        problems.append(f"{name}:{str(error).removeprefix('line ')}")
        return []
    # Split at line feeds only: str.splitlines also cuts at rare separators that a caption may contain.
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        problems.append(f"{path}: no entries")
    return lines


def read_text(path):
    """The text of a UTF-8 file, without its byte order mark. OSError, or ValueError with the number of the line that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"line {number}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8") from None


def find_table(root, kinds):
    """The table of a data folder, `metadata` with the first of these suffixes, or None."""
    return next((root / f"metadata{kind}" for kind in kinds if (root / f"metadata{kind}").is_file()), None)


def read_table(path, caption_column=None, video_column=None, may_lack_captions=False, image_column=None):
    """Rows of a CSV, JSONL, Parquet or JSON file. Returns ([(where, listed file, caption, window or None, image or None)], problems)."""
    problems = []
    try:
        names, rows = table_rows(path, problems)
    except (OSError, ValueError) as error:
        return [], [f"{path}: cannot be read as {path.suffix[1:]} ({error})"]
    if not rows:
        return [], problems or [f"{path}: no rows"]
    columns, problem = choose_columns(names, caption_column, video_column, image_column)
    if problem:
        return [], [f"{path}: {problem}", *problems]
    pairs = []
    for number, row in rows:
        listed, caption, window, image, faults = cells_of(row, columns, may_lack_captions)
        problems += [f"{path.name}:{number}: {fault}" for fault in faults]
        if not faults:
            pairs.append((f"{path.name}:{number}", listed, caption, window, image))
    return pairs, problems


def choose_columns(names, caption_column=None, video_column=None, image_column=None):
    """([caption column, video column], None), or (None, the problem). Without a flag the first known name that is there; the column of
    images comes third, with its flag only."""
    columns, missing = [], []
    asked_for = [(caption_column, CAPTION_COLUMNS), (video_column, VIDEO_COLUMNS)] + ([(image_column, ())] if image_column else [])
    for asked, known in asked_for:
        columns.append(asked or next((name for name in known if name in names), known[0]))
        missing += [columns[-1]] if columns[-1] not in names else []
    if missing:
        has = ", ".join(map(str, dict.fromkeys(names)))
        return None, f"no column {', '.join(missing)} (it has: {has}); --caption_column, --video_column and --image_column name them"
    if double := [name for name in columns if names.count(name) > 1]:
        return None, f"two columns are called {double[0]}"
    return columns, None


def cells_of(row, columns, may_lack_captions=False):
    """(file, caption, window or None, image or None, faults) of a table's row: what is not a text, or empty, or no window, as
    sentences. columns: from `choose_columns`."""
    texts, faults = [], []
    for column in columns:
        value = row.get(column)
        text = value.strip() if isinstance(value, str) else ""
        if column == columns[0] and may_lack_captions and (value is None or (isinstance(value, str) and text.lower() in ("", *MISSING))):
            texts.append("")
            continue
        if value is not None and not isinstance(value, str):
            kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
            kind = kinds.get(type(value), type(value).__name__)
            faults.append(f"{column} is {kind} ({str(value)[:40]}), not a text")
        elif column == columns[0] and not is_unicode(text):
            faults.append(f"{column} has half a character: {value[:40]!r}")
        elif not text:
            faults.append(f"empty {column}")
        elif column == columns[0] and text.lower() in MISSING:
            faults.append(f"{column} is {text!r}, which stands for a missing value")
        texts.append(text)
    window = None
    try:
        window = window_cells(row)
    except ValueError as error:
        faults.append(str(error))
    return texts[1], " ".join(texts[0].split()), window, texts[2] if len(columns) > 2 else None, faults


def window_cells(row):
    """The window in the columns `start` and `end` of a table's row; None if it has none. Raises ValueError, a sentence."""
    cells = {name: value for name in WINDOW_COLUMNS if str(value := row.get(name, "")).strip().lower() not in ("", *MISSING)}
    if len(cells) == 1:
        (given,), (lacking,) = cells, set(WINDOW_COLUMNS) - set(cells)
        raise ValueError(f"{given} is {cells[given]!r} without {lacking}; give both or neither")
    return window_of(*cells.values()) if cells else None


def table_rows(path, problems):
    """(column names, [(line or row number, dict)]) of a table; appends to `problems` the rows that cannot be read.

    ValueError, or what the file's reader raises, if the whole file cannot be read.
    """
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return csv_rows(path, problems)
    if kind == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("a Parquet table needs pyarrow: pip install pyarrow") from None
        table = pyarrow.parquet.read_table(path)
        return table.column_names, list(enumerate(table.to_pylist(), 1))
    if kind not in TABLE_KINDS:
        raise ValueError(f"a table ends in {', '.join(TABLE_KINDS)}")
    text = read_text(path)
    rows = list(json_lines(text, path.name, problems) if kind == ".jsonl" else enumerate(json_entries(text), 1))
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def csv_rows(path, problems):
    """`table_rows` of a CSV file, whose cells a comma, a semicolon or a tab separates: the most frequent one in its header.

    A cell too many is a caption with a comma that was not quoted, whose end would be lost.
    """
    rows, header, start = [], None, 1
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            if header is None:
                header = [cell.strip() for cell in cells]
            elif cells:
                surplus = [cell for cell in cells[len(header) :] if cell.strip()]
                if surplus:
                    rule = f'quote a text that has a "{delimiter}": "a rabbit{delimiter} running"'
                    problems.append(f"{path.name}:{number}: {len(cells)} cells in {len(header)} columns ({surplus[0]!r}); {rule}")
                elif len(cells) < len(header):
                    problems.append(f"{path.name}:{number}: {len(cells)} cells in {len(header)} columns")
                else:
                    rows.append((number, dict(zip(header, cells, strict=False))))
    except csv.Error as error:  # an open quote takes in the rest of the file
        raise ValueError(f"line {start}: {error}; write a quote inside a quoted text twice") from None
    return header or [], rows


def json_lines(text, name, problems):
    """Yield (line number, dict) of JSON rows. Only line feeds end a row: a caption may hold any other separator."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip(), strict=False)  # a tab in a caption does no harm
        except ValueError as error:
            problems.append(f"{name}:{number}: not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f"{name}:{number}: is no object")


def json_entries(text):
    """The rows of a JSON file: a list of objects, or an object of file names, each with its caption or an object that has it."""
    content = json.loads(text, strict=False)
    if isinstance(content, dict) and all(isinstance(value, (str, dict)) for value in content.values()):
        named = {name: value if isinstance(value, dict) else {CAPTION_COLUMNS[0]: value} for name, value in content.items()}
        return [{VIDEO_COLUMNS[0]: name} | row for name, row in named.items()]
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return content
    raise ValueError("neither a list of objects nor an object of file names and captions")


def has_labels(root):
    """Whether `root` contains clips with a text file each (in `labels/`, or beside the clip)."""
    return (root / "labels").is_dir() or any(p.with_suffix(".txt").is_file() for p in media_files(root))


def is_hidden(name):
    """Whether a file or folder is a system's own, such as `._02.mp4`, which macOS writes beside 02.mp4 on other file systems."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def media_files(root):
    """Clips and images in `root/videos`, or in `root` if there is no such folder, sorted by name, without hidden ones."""
    folder = root / "videos" if (root / "videos").is_dir() else root
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not is_hidden(p.name))


def caption_file(root, path):
    """The text file of a clip: in `labels/`, or beside it."""
    return (root / "labels" / path.name if (root / "labels").is_dir() else path).with_suffix(".txt")


def read_label_files(root, may_lack_captions=False):
    """`videos/NAME.mp4` with `labels/NAME.txt`, or with `NAME.txt` beside it. Returns as `read_line_files`."""
    pairs, problems = [], []
    for path in media_files(root):
        text = caption_file(root, path)
        listed = str(path.relative_to(root))
        try:
            caption = "" if may_lack_captions and not os.path.lexists(text) else " ".join(read_text(text).split())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            problems.append(f"{listed}: the caption {text.relative_to(root)} cannot be read ({reason})")
            continue
        if caption or may_lack_captions:
            pairs.append((listed, listed, caption, None, None))
        else:
            problems.append(f"{listed}: the caption {text.relative_to(root)} is empty")
    return pairs, problems


def files_left_out(args, root, records, layout):
    """The names of up to MOST_LEFT_OUT files of a data folder that the run does not read: clips first, without hidden files.

    Beside a table that is given as `root`, only the folders of its clips are looked at. records, layout: from `read_records`.
    Skips the encodings' cache, the folders of runs, and other data folders in this one.
    """
    if not records or not root:
        return []
    others = args.encoding_cache_dir, args.instance_data_root, args.eval_data_root, args.prior_data_root
    seen = {os.path.realpath(other) for other in others if other}
    seen -= {os.path.realpath(root)}
    root = Path(root).absolute()
    lists = [args.caption_column or "prompts.txt", args.video_column or "videos.txt"] if layout == LINE_FILES else [layout]
    lists += [args.image_column] if args.image_column and layout == LINE_FILES else []
    lists += [JOURNAL, *PREPARED]
    folder = root if root.is_dir() else root.parent
    paths = [folder / record.listed for record in records]
    images = [record.image for record in records if record.image]
    read = {file_identity(path) for path in [*(record.path for record in records), *images, *(folder / name for name in lists)]}
    read |= {file_identity(caption_file(folder, path)) for path in paths if layout == TEXT_FILES}
    read.discard(None)
    own = sorted({Path(os.path.normpath(path.parent)) for path in paths})  # a linked folder is not walked from above
    own, left_out = [place for place in own if place.is_relative_to(folder)], {}
    for start in [folder, *own] if root.is_dir() else own:
        for place, folders, names in os.walk(start):
            if (real := os.path.realpath(place)) in seen or ("dataset_report.txt" in names and Path(place) != folder):
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            for name in sorted(names):
                path = Path(place, name)
                if not is_hidden(name) and file_identity(path) not in read:
                    left_out[str(path.relative_to(folder))] = path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES
            if len(left_out) >= MOST_LEFT_OUT:
                break
    return sorted(left_out, key=left_out.get)[:MOST_LEFT_OUT]


def file_identity(path):
    """The device and inode of a file, the same for all names of it; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def locate(root, listed, allow_external_paths):
    """Find a listed file below the absolute path `root`. Returns (path, None), or (path, the reason why it cannot be used)."""
    if "\0" in listed:
        return listed, "not a file name"
    path = Path(at_home(listed))
    inside = not path.is_absolute()
    path = root / path
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except FileNotFoundError:
        if "://" in listed:
            return path, "not a file name"
        return path, "no such file" + (" (a broken link)" if path.is_symlink() else near_name(root, listed))
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: half a character, which JSON can spell
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


def locate_image(root, listed, allow_external_paths):
    """`locate` of a file that has to be a picture."""
    path, reason = locate(root, listed, allow_external_paths)
    if not reason and Path(listed).suffix.lower() not in IMAGE_SUFFIXES:
        reason = f"not an image by its name, which would end in {', '.join(sorted(IMAGE_SUFFIXES))}"
    return path, reason


def near_name(root, listed):
    """The hint "; there is NAME" for a missing file: another system's spelling of the name, or its end below `root`; or ""."""
    plain = listed.strip("\"'").replace("\\", "/")
    parts = PureWindowsPath(plain).parts
    spellings = [
        plain,
        *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD")),
        *("/".join(parts[n:]) for n in range(1, len(parts))),
    ]
    for name in spellings:
        try:
            if name != listed and (root / name).is_file():
                return f"; there is {name}" + (", with / between folders" if "\\" in listed else "")
        except (OSError, ValueError):  # a name that is too long
            continue
    return ""


# -----------------------------------------------------------------------------
# The torch Dataset


class TrainingClips(Dataset):
    """The inputs of the loss at each position, as CPU tensors: latents, noise, timestep, prompt embedding and the image's latents.

    encodings: has `moments(clip, flipped)` [2C, F', H', W'], `prompt(clip or None)` [T, D], where None is the empty caption, and for
    an image-to-video model `image(clip, flipped)` [N, 2C, H', W']. clip_of: position -> clip, as `clip_at`. facts:
    folder.ModelFacts. timestep_sampling: as in `sampled_timestep`.
    """

    def __init__(
        self,
        encodings,
        clip_of,
        seed,
        facts,
        num_train_timesteps,
        caption_dropout=0.0,
        random_flip=False,
        timestep_sampling="uniform",
        image_dropout=0.0,
    ):
        self.timestep_sampling = timestep_sampling
        self.encodings, self.clip_of, self.seed, self.facts = encodings, clip_of, seed, facts
        self.num_train_timesteps = num_train_timesteps
        self.caption_dropout, self.random_flip, self.image_dropout = caption_dropout, random_flip, image_dropout

    def __getitem__(self, position):
        return self.item(self.clip_of(position), position)

    def item(self, clip, position):
        """The item of a given clip at a given position."""
        generator = seeded_generator(self.seed, "noise", position)
        timestep = sampled_timestep(self.timestep_sampling, self.seed, position, self.num_train_timesteps, generator)
        # Always drawn, so that enabling one option does not change the noise of the others.
        drop, flip = torch.rand(2, generator=generator).tolist()
        flipped = self.random_flip and flip < 0.5
        latents = sample_latents(self.encodings.moments(clip, flipped=flipped), self.facts.scaling_factor, generator)
        latents = pad_latents(latents, self.facts.latents_per_patch)
        return {
            "latents": latents,  # [F', C, H', W'], fp32
            "noise": torch.randn(latents.shape, generator=generator),
            "timestep": timestep,
            "prompt": self.encodings.prompt(None if drop < self.caption_dropout else clip),  # [T, D], the encoder's dtype
            "image": self.image(clip, flipped, position, latents.shape),
            "position": position,
        }

    def image(self, clip, flipped, position, shape):
        """The image's latents [F', I, H', W'] beside those of a clip of `shape`: the image in the first frame, zeros in the others, as in
        CogVideoXImageToVideoPipeline.prepare_latents; I = 0 for a text-to-video model.

        With the probability of `image_dropout` all are zeros. That is drawn apart from the caption's dropout: in the pipeline both
        branches of guidance have the image, so dropping both at once would train a state that is never sampled.
        """
        image = torch.zeros(shape[0], self.facts.image_channels, *shape[2:])
        if not self.facts.image_channels:
            return image
        generator = seeded_generator(self.seed, "image", position)
        drop = torch.rand((), generator=generator).item()
        draws = self.encodings.image(clip, flipped=flipped)  # of the image with noise of different strengths
        chosen = draws[torch.randint(len(draws), (), generator=generator)]
        if drop >= self.image_dropout:
            image[0] = sample_latents(chosen[:, None], self.facts.image_scaling_factor, generator)[0]
        return image

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
    on_device = None
    if device.type == "cuda":  # a new thread has GPU 0; with one process accelerate's device has no index, which set_device refuses
        index = torch.cuda.current_device() if device.index is None else device.index
        on_device = functools.partial(torch.cuda.set_device, index)
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
